"""Fine-tuning: layer decay by name, mixing as timm does it, augmentation, resume, bad input."""

import copy
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from data.transforms import FinetuneTransform, posterize
from eval.backbone import TimmBackbone
from eval.common import run_joined
from eval.finetune import (
    Classifier,
    Finetuning,
    build_mixup,
    decaying_groups,
    evaluate,
    freeze_what_is_not_used,
    main,
)
from launch.config import ConfigError, TrainingStopped
from tests.backbones import digits_checkpoint, load_backbone
from tests.evaluations import (
    EVAL,
    assert_bad_input,
    config,
    few_digits,
    launch,
    numbers,
    results,
    stop_in_step,
)
from tests.runs import assert_same_state, final_state, records
from tests.test_distributed import spawn
from util.distributed import Ranks
from util.streams import Stream, seeded


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory):
    with few_digits():
        yield digits_checkpoint(tmp_path_factory.mktemp("pretrained"))


# ---- The network and its optimiser. --------------------------------------------------------------


def groups_by_name(model: Classifier, layer_decay: float = 0.5) -> dict[str, tuple[float, float]]:
    """name -> (share of the learning rate, weight decay)"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in decaying_groups(model, 0.05, layer_decay)
        for parameter in group["params"]
    }


def test_layer_decay_by_name_in_this_projects_encoder(checkpoint):
    """Three blocks: 0.5^4 for the embeddings, 1 for the head."""
    model = Classifier(load_backbone(checkpoint, final_norm=False), "mean", 10, 0)
    found = groups_by_name(model)
    assert len(found) == len(list(model.parameters()))
    expected = {
        "backbone.encoder.cls_token": (0.0625, 0.0),
        "backbone.encoder.embed.proj.weight": (0.0625, 0.05),
        "backbone.encoder.embed.proj.bias": (0.0625, 0.0),
        "backbone.encoder.blocks.0.attn.qkv.weight": (0.125, 0.05),
        "backbone.encoder.blocks.0.norm1.weight": (0.125, 0.0),
        "backbone.encoder.blocks.2.mlp.fc2.weight": (0.5, 0.05),
        "norm.weight": (1.0, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
    }
    assert {name: found[name] for name in expected} == expected


def test_layer_decay_equals_timms():
    """On timm's own ViT, which has a class token and learned positions."""
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    backbone = TimmBackbone(model, family="timm", name="small", layer=-1, final_norm=False)
    found = groups_by_name(Classifier(backbone, "mean", 10, 0), 0.65)
    reference = VisionTransformer(**sizes, global_pool="avg", num_classes=10)
    names = {id(parameter): name for name, parameter in reference.named_parameters()}
    groups = param_groups_layer_decay(
        reference,
        weight_decay=0.05,
        no_weight_decay_list=reference.no_weight_decay(),
        layer_decay=0.65,
    )
    expected = {
        names[id(parameter)].replace("fc_norm", "norm"): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    ours = {name.removeprefix("backbone.model."): value for name, value in found.items()}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value), name


def test_the_head_starts_almost_at_zero_and_from_the_seed(checkpoint):
    backbone = load_backbone(checkpoint, final_norm=False)
    one, same, other = (Classifier(backbone, "mean", 1000, seed) for seed in (1, 1, 2))
    assert one.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not one.head.bias.any()
    assert torch.equal(one.head.weight, same.head.weight)
    assert not torch.equal(one.head.weight, other.head.weight)


def test_the_classifier_pools_norms_and_projects(checkpoint):
    model = Classifier(load_backbone(checkpoint, final_norm=False), "mean", 10, 0).eval()
    images = torch.randn(2, 3, 24, 24)
    mean = model.backbone(images).patches.mean(dim=1)
    normed = F.layer_norm(mean, mean.shape[-1:], eps=1e-6)
    torch.testing.assert_close(model(images), normed @ model.head.weight.T)
    assert model.norm.eps == 1e-6


def test_what_the_loss_does_not_reach_is_frozen(checkpoint):
    model = Classifier(load_backbone(checkpoint, final_norm=False), "mean", 10, 0)
    model.unused = nn.Linear(2, 2)
    freeze_what_is_not_used(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["unused.weight", "unused.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- Mixing, smoothing, augmentation. ------------------------------------------------------------


def test_mixing_is_off_only_without_both(checkpoint, tmp_path):
    cfg = config("finetune", checkpoint, tmp_path)
    mixup = build_mixup(cfg, 10)
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.8, 1.0, 0.1)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode) == (1.0, 0.5, "batch")
    assert build_mixup(config("finetune", checkpoint, tmp_path, "mixup=0", "cutmix=0"), 10) is None
    assert build_mixup(config("finetune", checkpoint, tmp_path, "mixup=0"), 10).cutmix_alpha == 1
    assert build_mixup(config("finetune", checkpoint, tmp_path, "cutmix=0"), 10).mixup_alpha == 0.8


def transform(seed: int = 0, **changes) -> FinetuneTransform:
    options = {"hflip": 0.5, "scale": (0.08, 1.0), "auto_augment": "rand-m9-mstd0.5-inc1"}
    options |= {"re_prob": 0.25, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)} | changes
    return FinetuneTransform(seed, input_size=24, **options)


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    first = transform()(picture(), 3, 7)
    assert first.shape == (3, 24, 24) and first.dtype == torch.float32
    random.random(), np.random.rand(), torch.rand(1)
    assert torch.equal(transform()(picture(), 3, 7), first)
    for other in (transform(seed=1)(picture(), 3, 7), transform()(picture(), 4, 7)):
        assert not torch.equal(other, first)
    assert not torch.equal(transform()(picture(), 3, 8), first)


def test_other_random_numbers_go_on_as_if_nothing_had_been_drawn():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with seeded(Stream.MIXUP, 1):
        expected = [draw(), draw()]
    with seeded(Stream.MIXUP, 1):
        found = [draw()]
        transform()(picture(), 0, 0)
        found.append(draw())
    assert found == expected


def test_augmentation_takes_every_strength():
    """Among them posterising to 0 bits, which Pillow refuses."""
    black = posterize(picture(), 0)
    assert black.size == (50, 40) and not np.array(black).any()
    assert set(np.unique(posterize(picture(), 1))) == {0, 128}
    augment = transform()
    for epoch in range(500):
        augment(picture(), epoch, 0)


def test_erasing_leaves_the_rest_as_it_is():
    plain, erased = (transform(auto_augment=None, re_prob=e)(picture(), 0, 0) for e in (0.0, 1.0))
    changed = (plain != erased).any(dim=0)
    rows, columns = changed.any(dim=1), changed.any(dim=0)
    assert 0 < changed.sum() < changed.numel()
    assert torch.equal(changed, rows[:, None] & columns)  # a rectangle


# ---- Runs. ---------------------------------------------------------------------------------------

SHORT = ["epochs=2", "warmup_epochs=1", "batch_size=32", "print_freq=1", "blr=1e-3", "eval_freq=1"]


def finetune(checkpoint, folder, *overrides: str) -> dict:
    main(config("finetune", checkpoint, folder, *SHORT, *overrides))
    return final_state(folder / "finetune")


def run_main(ranks, checkpoint, folder, overrides) -> None:
    cfg = config("finetune", checkpoint, folder, *SHORT, *overrides)
    with few_digits():
        run_joined(cfg, ranks, evaluate)


@pytest.mark.slow
def test_the_split_into_processes_and_micro_steps_changes_nothing(checkpoint, tmp_path):
    """Mixing, dropped paths and augmentation included."""
    spread = ["batch_size=16", "epochs=1"]
    one = finetune(checkpoint, tmp_path / "one", *spread, "accum_iter=2")["state_dict"]
    spawn(run_main, 2, tmp_path, checkpoint, tmp_path / "two", spread)
    two = final_state(tmp_path / "two" / "finetune")["state_dict"]
    for key, value in one.items():
        # Adam turns the rounding of near-zero gradients into full steps.
        assert (two[key] - value).norm() <= 1e-2 * value.norm() + 1e-4, key
    losses = [
        [r["loss"] for r in records(tmp_path / name / "finetune") if "loss" in r]
        for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_stopped_and_resumed_equals_undisturbed(checkpoint, tmp_path, monkeypatch):
    finetune(checkpoint, tmp_path / "whole", "resume=True")
    with monkeypatch.context() as patch:
        stop_in_step(patch, Finetuning, 6)
        with pytest.raises(SystemExit):
            finetune(checkpoint, tmp_path / "broken", "resume=True")
    whole, broken = (tmp_path / name / "finetune" for name in ("whole", "broken"))
    assert final_state(broken)["step"] == 7
    finetune(checkpoint, tmp_path / "broken", "resume=True")
    assert_same_state(final_state(broken), final_state(whole))
    assert numbers(broken) == numbers(whole)
    found = results(tmp_path / "broken", "finetune")["results"]
    assert found == results(tmp_path / "whole", "finetune")["results"]


def test_the_results_file_and_a_second_start(checkpoint, tmp_path, capsys):
    quick = ["epochs=1", "mixup=0", "cutmix=0", "auto_augment=null", "erase=0", "pooling=cls"]
    finetune(checkpoint, tmp_path, *quick)
    found = results(tmp_path, "finetune")
    assert found["images"] == EVAL
    assert 0 < found["results"]["top1"] <= found["results"]["top5"] <= 100
    finetune(checkpoint, tmp_path, *quick, "resume=True")
    assert results(tmp_path, "finetune")["results"] == found["results"]
    assert "from step 5" in capsys.readouterr().out


# ---- Bad input. ----------------------------------------------------------------------------------


def test_mixing_needs_pairs(checkpoint, tmp_path):
    cfg = config("finetune", checkpoint, tmp_path, "batch_size=33")
    assert_bad_input(main, cfg, ConfigError, "batch_size=33: expected an even number")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("auto_augment=strong", "auto_augment=strong: expected a RandAugment of timm"),
        ("auto_augment=rand-x9", "auto_augment=rand-x9: expected a RandAugment of timm"),
        ("drop_path=1", "drop_path=1: expected a number from 0 to 0.99"),
        ("layer_decay=0", "layer_decay=0: expected a number above 0"),
        ("label_smoothing=1", "label_smoothing=1: expected a number from 0 to 0.99"),
        ("erase=2", "erase=2: expected a number from 0 to 1"),
        ("warmup_epochs=101", "warmup_epochs=101: expected 0 to 100"),
    ],
)
def test_invalid_values_are_refused(checkpoint, tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        config("finetune", checkpoint, tmp_path, override)


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_a_step_that_is_not_finite_is_left_out(checkpoint, tmp_path, what):
    def take_steps(run):
        task = Finetuning(run)
        task.prepare()
        task.step(10, task.batches(10, 11))
        task.log_line(11, 1)
        weights, factor = copy.deepcopy(task.model.state_dict()), math.inf
        if what == "gradient":
            task.model.head.weight.register_hook(lambda gradient: gradient * factor)
        else:
            task.model.head.register_forward_hook(lambda head, tokens, logits: logits * factor)
        task.step(11, task.batches(11, 12))
        for name, value in task.model.state_dict().items():
            assert torch.equal(value, weights[name]), name
        with pytest.raises(TrainingStopped, match="the loss or gradient is not finite before"):
            task.log_line(12, 1)
        factor = 1
        task.step(12, task.batches(12, 13))
        assert not torch.equal(task.model.head.weight, weights["head.weight"])

    cfg = config("finetune", checkpoint, tmp_path, *SHORT)
    run_joined(cfg, Ranks(0, 1, torch.device("cpu")), take_steps)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(checkpoint, tmp_path):
    """Exit code 3: again would be the same."""
    code, output = launch("finetune", checkpoint, tmp_path, *SHORT, "blr=1e30", "mixup=0")
    assert code == 3 and "error: the loss or gradient is not finite" in output
    assert "last good checkpoint" in output and "Traceback" not in output
