"""Whole pre-training against one that is written by hand (tests/by_hand.py), with every key away
from its default: a run that is compared with another run of the same code proves nothing about
what connects its parts."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import main_lmim
from launch.config import CONFIG_DIR, compose_config, flatten, read_yaml
from launch.validate import check_config
from models.lmim import TARGETS
from models.losses import LOSSES
from tests import by_hand
from tests.runs import final_state, records
from tests.test_distributed import spawn
from util.distributed import Ranks
from util.preemption import stoppable

ALONE = Ranks(0, 1, torch.device("cpu"))

COMMON = {
    "seed": 7,
    "precision": "fp32",
    "grid_size": 5,
    "patch_size": 3,
    "patch_gap": 2,
    "num_vis": 6,
    "min_crop": 0.45,
    "dataset": "textures",
    "dataset.options.image_size": 20,
    "dataset.options.train_images": 64,
    "dataset.options.eval_images": 60,
    "dataset.options.seed": 5,
    "dataset.flip": True,
    "dataset.mean": [0.4, 0.5, 0.6],
    "dataset.std": [0.3, 0.2, 0.25],
    "dataset.crop_ratio": 0.8,
    "encoder.embed_dim": 24,
    "encoder.depth": 3,
    "encoder.num_heads": 2,
    "freeze_pe": False,
    "proj.mlp_dim": 40,
    "proj.mlp_depth": 2,
    "decoder": "cross",
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
    "avg_vis_mask_token": True,
    "target": "ema",
    "target_depth": 2,
    "mask_target": False,
    **dict.fromkeys("target_layers target_norm target_post_norm same_target".split()),
    **{"masks": "random", "pred_unit": "image", "negatives": "image", "target_tap": "block"},
    **{"loss_beta": 1.0, "sigreg": 0, "sigreg_slices": 5, "sigreg_on": "token"},
    "loss": "infonce_patches",
    "tau": 0.3,
    "avg_sim_coeff": 0.7,
    "sim_init": 0.9,
    "sim_end": 0.1,
    "target_mom": 0.8,
    "epochs": 3,
    "warmup_epochs": 1.5,
    "blr": 0.05,
    "min_lr_frac": 0.1,
    "weight_decay": 0.4,
    "batch_size": 5,
    "accum_iter": 3,
    "shrink_batch": False,
    "clip_grad": 0.3,
    "eval_freq": 2,
    "eval_at_start": True,
    "watch_images": 0,
}
VARIANTS = {
    "infonce_patches, ema": {},
    "norm_l2, stopgrad": {
        "seed": 3,
        "loss": "norm_l2",
        "target": "stopgrad",
        "target_depth": None,
        "decoder": "self",
        "avg_vis_mask_token": False,
        "mask_target": True,
        "patch_gap": 0,
        "proj.mlp_depth": 0,
        "freeze_pe": True,
        "dataset.flip": False,
        "clip_grad": None,
        "avg_sim_coeff": 0,
        "warmup_epochs": 0,
        "batch_size": 15,
        "accum_iter": 1,
        "eval_freq": 0,
    },
    "l1, joint": {"loss": "l1", "target": "joint", "decoder_depth": 2, "watch_images": 9},
    "cosine, frozen": {
        "loss": "cosine",
        "eval_freq": 3,
        "epochs": 4,
        "sim_init": 0.2,
        "sim_end": 0.6,
        "target": "frozen",
        "batch_size": 30,
        "shrink_batch": True,
    },
}
SWITCHES = {  # in two processes
    "pixels": {
        "target": "pixels",
        "loss": "norm_l2",
        "target_depth": None,
        "avg_sim_coeff": 0,
        "masks": "inverse",
    },
    "projection in batches": {
        "target": "projection",
        "target_depth": None,
        "pred_unit": "batch",
        "negatives": "batch",
        "masks": "block_roll",
    },
    "same targets": {"pred_unit": None, "same_target": 0.8, "masks": "block"},
    "layers and sigreg on tokens": {
        "target_layers": [0, 1],
        "target_tap": "mlp",
        "target_norm": "batch",
        "target_post_norm": "layer",
        "loss": "smooth_l1",
        "loss_beta": 0.4,
        "sigreg": 0.1,
        "masks": "inverse_roll",
    },
    "sigreg on images": {
        "target": "joint",
        "loss": "l2",
        "avg_sim_coeff": 0,
        "sigreg": 0.2,
        "sigreg_on": "image",
    },
}


def configured(keys: dict, folder: Path, **others) -> DictConfig:
    """The composed config of these keys, in which each has the value that is asked for."""
    cfg = compose_config("demo", overrides(keys, folder, **others))
    check_config(cfg)
    return cfg


def overrides(keys: dict, folder: Path, **others) -> list[str]:
    keys = keys | {"output_dir": str(folder), "job_name": "run", "print_freq": 1} | others
    return [f"{key}={'null' if value is None else value}" for key, value in keys.items()]


def pretrain(cfg: DictConfig, ranks: Ranks = ALONE) -> main_lmim.LatentMIM:
    """-> the trained networks of this process"""
    built = []
    build_model = main_lmim.build_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_lmim, "build_model", lambda c: built.append(build_model(c)) or built[0])
        with stoppable(ranks) as stop_flag:
            main_lmim.pretrain(cfg, ranks, stop_flag)
    return built[0]


def assert_same_run(job: Path, weights: dict, expected: by_hand.ByHand) -> None:
    lines = records(job)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [line["step"] for line in expected.losses]
    for found, wanted in zip(steps, expected.losses, strict=True):
        for name, value in wanted.items():
            rounding = 1e-5 if name == "grad_norm" else 1e-6
            assert found[name] == pytest.approx(value, rel=rounding), (name, wanted["step"])
    accuracies = {line["epoch"]: line["nn_accuracy"] for line in lines if "nn_accuracy" in line}
    assert accuracies == pytest.approx(expected.accuracies)
    wanted = expected.model.state_dict()
    assert weights.keys() == wanted.keys()
    assert relative_difference(weights, wanted) < 1e-6


def relative_difference(found: dict, wanted: dict) -> float:
    ours, theirs = (
        torch.cat(list(map(moved_by_more_than_rounding, w.items()))) for w in (found, wanted)
    )
    return float((ours - theirs).norm() / theirs.norm())


def moved_by_more_than_rounding(item: tuple[str, torch.Tensor]) -> torch.Tensor:
    """Without the biases of attention's keys: softmax does not see them, so that their gradients
    are rounding alone, of which Adam makes whole steps."""
    name, value = item
    if name.endswith("qkv.bias"):
        query, _, values = value.chunk(3)
        return torch.cat([query, values])
    return value.chunk(2)[1] if name.endswith("kv_proj.bias") else value.flatten()


ONE, *OTHERS = VARIANTS


@pytest.mark.parametrize(
    "variant", [ONE, *(pytest.param(v, marks=pytest.mark.slow) for v in OTHERS)]
)
def test_ten_steps_equal_those_written_by_hand(tmp_path, variant):
    keys = COMMON | VARIANTS[variant]
    model = pretrain(configured(keys, tmp_path))
    assert_same_run(tmp_path / "run", model.state_dict(), by_hand.train(keys))
    saved = final_state(tmp_path / "run")
    assert relative_difference(saved["state_dict"], model.state_dict()) == 0
    # shrink_batch changes the loader's batches, not what the user has typed.
    for config in (saved["config"], read_yaml(tmp_path / "run" / "config.yaml")):
        assert config["batch_size"] == keys["batch_size"]


def test_the_keys_of_these_runs_are_away_from_their_defaults():
    """Of all that change results, in at least one of the runs."""
    below = (CONFIG_DIR / "lmim.yaml").read_text().partition("# --- everything below")[2]
    settings = OmegaConf.create(below.partition("\n")[2])
    names = set(flatten(OmegaConf.to_container(settings))) - {"compile"}
    assert names <= set(COMMON) - {"decoder", "target", "loss"}
    defaults = compose_config("lmim", [])
    runs = [COMMON | changes for changes in (VARIANTS | SWITCHES).values()]
    for name in names - {"precision"}:
        assert {str(run[name]) for run in runs} - {str(OmegaConf.select(defaults, name))}, name
    assert {run["loss"] for run in runs} == set(LOSSES)
    assert {run["target"] for run in runs} == set(TARGETS)


def test_bf16_is_what_is_asked_for(tmp_path):
    """Rounding differs from one formulation to the next, so the numbers are near and not equal."""
    keys = COMMON | {"epochs": 1, "warmup_epochs": 0, "eval_freq": 0, "eval_at_start": False}
    pretrain(configured(keys | {"precision": "bf16"}, tmp_path))
    found = [line["loss"] for line in records(tmp_path / "run")]
    rounded, exact = (
        [line["loss"] for line in by_hand.train(keys | {"precision": precision}).losses]
        for precision in ("bf16", "fp32")
    )
    assert found == pytest.approx(rounded, rel=1e-2)
    assert abs(found[0] - exact[0]) > 1e-5


def test_views_differ_in_each_part_of_their_counter():
    """Seed, step, and the place of the image in the step: process, micro-step, batch."""
    seen = {}
    for seed in (0, 1):
        for step in (0, 1, 2):
            for rank in (0, 1):
                keys = COMMON | {"seed": seed, "accum_iter": 2}
                cfg = OmegaConf.create({"accum_iter": 2, "seed": seed} | dict(keys))
                ranks = Ranks(rank, 2, torch.device("cpu"))
                draw = main_lmim.view_source(cfg, ranks, main_lmim.read_geometry(cfg))
                for micro in (0, 1):
                    views = draw(step, micro, 3)
                    for image in range(3):
                        own = torch.cat([part[image].flatten() for part in views])
                        seen[seed, step, rank, micro, image] = own
    assert len({tuple(view.tolist()) for view in seen.values()}) == len(seen) == 72


@pytest.mark.slow
def test_a_checkpoint_of_before_the_steps_had_their_name_is_resumed(tmp_path):
    keys = COMMON | {"eval_freq": 0, "eval_at_start": False, "epochs": 2}
    whole = pretrain(configured(keys, tmp_path / "whole"), ALONE).state_dict()
    pretrain(configured(keys, tmp_path / "old", save_freq=1), ALONE)
    first, last = sorted((tmp_path / "old/run/checkpoints").iterdir())
    last.unlink()
    contents = torch.load(first, weights_only=True)
    contents["windows_per_epoch"] = contents.pop("steps_per_epoch")
    torch.save(contents, first)
    resumed = pretrain(configured(keys, tmp_path / "old", resume=True), ALONE).state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert [line["step"] for line in records(tmp_path / "old/run")] == list(range(1, 9))


# --- several processes --------------------------------------------------------------------------


WHOLE = COMMON | {"avg_sim_coeff": 0, "loss": "norm_l2", "batch_size": 16, "accum_iter": 1}
SPLIT = WHOLE | {"batch_size": 4, "accum_iter": 2}
BEGUN = COMMON | {"avg_sim_coeff": 0, "epochs": 6, "blr": 1e-3, "accum_iter": 1}
BEGUN |= {"eval_freq": 0, "eval_at_start": False, "batch_size": 8}


def pretrain_in_two(ranks: Ranks, folder: Path) -> None:
    """All that the tests below look at. Of each switch two steps; then two more in a run that is
    resumed."""
    keys = {"common": [COMMON], "split": [SPLIT], "begun": [BEGUN | {"max_steps": 10}]}
    for variant in SWITCHES:
        steps = [{"max_steps": steps, "watch_images": 0, "resume": True} for steps in (2, 4)]
        keys[variant] = [switched(variant) | more for more in steps]
    for name, starts in keys.items():
        for start in starts:
            weights = pretrain(configured(start, folder / name), ranks).state_dict()
        torch.save(weights, folder / f"{name}{ranks.rank}")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    spawn(pretrain_in_two, 2, folder, folder)
    return folder


def weights_of(folder: Path, name: str) -> dict:
    """They are the same in both processes."""
    first, second = (torch.load(folder / f"{name}{rank}") for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(second[key], value), f"the processes have drifted apart: {key}"
    return first


@pytest.mark.slow
def test_two_processes_average_the_gradients_of_their_parts(two_processes):
    """The similarity constraint squares a mean over the images of one process: each has its own."""
    weights = weights_of(two_processes, "common")
    assert_same_run(two_processes / "common/run", weights, by_hand.train(COMMON, processes=2))


def switched(variant: str) -> dict:
    return COMMON | SWITCHES[variant] | {"eval_freq": 0, "eval_at_start": False}


@pytest.mark.slow
@pytest.mark.parametrize("variant", SWITCHES)
def test_each_switch_in_two_processes_that_are_resumed(two_processes, variant):
    expected = by_hand.train(switched(variant), processes=2, last_step=4)
    assert_same_run(two_processes / variant / "run", weights_of(two_processes, variant), expected)


@pytest.mark.slow
def test_the_split_of_a_step_changes_nothing(two_processes):
    """The same images and the same views. Without the similarity constraint, whose mean is taken
    over the images of one process and micro-step."""
    weights, whole = weights_of(two_processes, "split"), by_hand.train(WHOLE)
    assert relative_difference(weights, whole.model.state_dict()) < 1e-4
    found = [line for line in records(two_processes / "split/run") if "loss" in line]
    assert len(found) == len(whole.losses) == 12
    for line, wanted in zip(found, whole.losses, strict=True):
        for name in ("loss", "grad_norm", "lr"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-4), name


def pretrain_a_share(ranks: Ranks, folder: Path) -> None:
    keys = BEGUN | {"batch_size": 4, "resume": True}
    pretrain(configured(keys, folder), ranks)


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_views_on_another_number_of_processes(tmp_path, two_processes):
    whole = BEGUN | {"batch_size": 16}
    pretrain(configured(whole, tmp_path / "whole"))
    wanted = {line["step"]: line["loss"] for line in records(tmp_path / "whole/run")}
    assert len(wanted) == 24
    for processes in (1, 4):
        folder = tmp_path / str(processes)
        shutil.copytree(two_processes / "begun", folder)
        if processes == 1:
            pretrain(configured(whole | {"resume": True}, folder))
        else:
            spawn(pretrain_a_share, processes, folder, folder)
        found = {line["step"]: line["loss"] for line in records(folder / "run")}
        assert found == pytest.approx(wanted, rel=1e-3), processes
