"""The calculator on paper against what torch builds, counts and keeps."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import plan
from main_lmim import build_model
from models.decoder import write_out_attention
from models.losses import Objective
from models.views import Views

MACHINES, _ = plan.read_machines(plan.MACHINES)
SMALL = (
    "encoder=vit_tiny encoder.depth=3 grid_size=6 num_vis=6 proj.mlp_dim=320 batch_size=4 "
    "decoder_embed_dim=96 decoder_num_heads=4 decoder_depth=2 gpu=cpu2"
).split()
VARIANTS = {
    "published": [],
    "batch of one": ["batch_size=1"],
    "self decoder": ["decoder=self"],
    "shallow target": ["target_depth=1"],
    "target sees all": ["mask_target=False"],
    "no head": ["proj.mlp_depth=0"],
    "head of one layer": ["proj.mlp_depth=1"],
    "joint": ["target=joint"],
    "joint, target sees all": ["target=joint", "mask_target=False", "target_depth=2"],
    "stopgrad": ["target=stopgrad"],
    "frozen": ["target=frozen"],
    "regression": ["loss=norm_l2"],
    "no cue": ["avg_vis_mask_token=False"],
    "learned positions": ["freeze_pe=False"],
    "no constraint": ["avg_sim_coeff=0"],
    "recompute": ["recompute=True"],
    "recompute, self decoder, joint": ["recompute=True", "decoder=self", "target=joint"],
    "other sizes": ["encoder=vit_nano", "grid_size=5", "patch_gap=0", "decoder_depth=1"],
}
# A target that does not learn keeps nothing, whatever it sees.
SAME_MEMORY = ("batch of one", "shallow target", "target sees all", "stopgrad", "frozen")


def settings(*overrides: str):
    return plan.read_settings([*SMALL, *overrides], MACHINES)[0]


def forward(cfg, precision: str, model: nn.Module, device: str = "cpu") -> torch.Tensor:
    """The loss of one micro-step. What is in the pixels and which patches are masked is no matter
    of size."""
    count, side = cfg.batch_size, cfg.grid_size * (cfg.patch_size + cfg.patch_gap)
    images = torch.zeros(count, 3, side, side, device=device)
    ids = torch.zeros(count, cfg.grid_size**2, dtype=torch.int64, device=device)
    offsets = torch.zeros(2, count, cfg.grid_size, cfg.grid_size, dtype=torch.int64, device=device)
    views = Views(ids[:, : cfg.num_vis], ids[:, cfg.num_vis :], *offsets)
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        latents = model(images, views)
    return Objective(cfg.loss.name, cfg.tau, cfg.avg_sim_coeff)(latents, 0.5)[0]


# --- parameters and work --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_and_work_are_what_torch_counts(variant):
    """Attention as its two products and their gradients: that fused kernels repeat the first one
    in the backward pass is left out, in the count and in the plan."""
    cfg = settings(*VARIANTS[variant])
    network, found = build_model(cfg), plan.Model(cfg)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(cfg, "fp32", network).backward()
    assert found.work == pytest.approx(counter.get_total_flops() / cfg.batch_size, rel=0.01)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert found.trained == trained
    assert found.copied == sum(p.numel() for p in network.parameters()) - trained


# --- memory ---------------------------------------------------------------------------------------


def kept_bytes(run, model: nn.Module) -> int:
    """What autograd keeps for the backward pass, beside the parameters."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, or its address would be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run(model=model)
    for parameter in model.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    kept = sum(storage.nbytes() for storage in storages.values())
    del loss
    return kept


def kept_per_image(cfg, precision: str, model: nn.Module, device: str = "cpu") -> tuple[int, int]:
    """And what is kept whatever the number of images: copies of weights."""
    kept = []
    for cfg.batch_size in (2, 4):
        kept.append(kept_bytes(partial(forward, cfg, precision, device=device), model))
    return (kept[1] - kept[0]) // 2, 2 * kept[0] - kept[1]


MEMORY = [(variant, "bf16") for variant in VARIANTS if variant not in SAME_MEMORY]
MEMORY += [("published", "fp32"), ("joint", "fp32")]


@pytest.mark.parametrize("variant, precision", MEMORY)
def test_activations_are_what_autograd_keeps(variant, precision):
    cfg = settings(*VARIANTS[variant])
    model = build_model(cfg)
    if precision == "bf16":
        write_out_attention(model)  # as training does on CPUs
    per_image, copies = kept_per_image(cfg, precision, model)
    memory = plan.Model(cfg).memory(precision, on_cpu=True)
    assert memory["activations"] / cfg.batch_size == pytest.approx(per_image, rel=0.03)
    assert memory["weight copies"] == pytest.approx(copies, rel=0.01, abs=100)


def fused_attention(query, key, value, **_) -> torch.Tensor:
    """The kernel of GPUs, under autocast."""
    tensors = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention(*tensors)[0]


ON_GPU = {"full size": ["encoder=vit_base"]}
ON_GPU |= {name: [*SMALL, *VARIANTS[name]] for name in ("self decoder", "joint", "recompute")}


@pytest.mark.parametrize("variant", ON_GPU)
def test_activations_on_a_gpu(variant):
    """Tensors without contents tell sizes and types where there is no GPU, also at full size."""
    # A target of its own would be copied, which these tensors cannot; nothing is kept of it anyway.
    target = [] if variant == "joint" else ["target=stopgrad"]
    cfg, _ = plan.read_settings([*ON_GPU[variant], *target], MACHINES)
    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.is_bf16_supported", lambda: True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention),
    ):
        with torch.device("cuda"):
            model = build_model(cfg)
        per_image, copies = kept_per_image(cfg, "bf16", model, "cuda")
    memory = plan.Model(cfg).memory("bf16", on_cpu=False)
    assert memory["activations"] / cfg.batch_size == pytest.approx(per_image, rel=0.03)
    assert memory["weight copies"] == pytest.approx(copies, rel=0.01, abs=100)


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_the_block_that_is_computed_again(decoder):
    """Of all blocks, one of the decoder keeps most: what another one makes autograd keep."""
    kept = []
    for depth in (1, 2):
        cfg = settings(f"decoder={decoder}", f"decoder_depth={depth}")
        kept.append(kept_per_image(cfg, "fp32", build_model(cfg))[0])
    cfg = settings(f"decoder={decoder}", "recompute=True")
    again = plan.Model(cfg).memory("fp32", on_cpu=True)["recomputed block"]
    assert again / cfg.batch_size == pytest.approx(kept[1] - kept[0], rel=0.03)


def test_memory_without_activations():
    cfg = settings()
    model = build_model(cfg)
    memory = plan.Model(cfg).memory("bf16", on_cpu=True)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    copied = 4 * sum(p.numel() for p in model.target_encoder.parameters())
    assert (memory["weights"], memory["gradients"], memory["moments"]) == (
        trained,
        trained,
        2 * trained,
    )
    assert memory["target"] == copied
    images, patches = 3 * (6 * 20) ** 2, 36 * 768
    assert memory["images and targets"] == 4 * 4 * (images + patches + 31 * 192)


# --- time, machines and measured points -----------------------------------------------------------


def planned(*overrides: str, points=()) -> dict:
    return plan.make_plan(list(overrides), MACHINES, list(points))


def test_time_of_the_recipe():
    found = planned("gpu=h100", "gpus=16", "batch_size=128")
    speed = 0.4 * 989e12 / sum(found["flops_per_image"].values())
    assert "ASSUMED" in found["source"]
    assert found["images_per_second"]["gpu"] == pytest.approx(speed)
    assert found["images_per_second"]["node"] == pytest.approx(8 * speed)
    assert found["images_per_second"]["all"] == pytest.approx(16 * speed)
    # 312 whole steps of 4096 images are in an epoch.
    assert found["time"]["steps"] == 800 * 312
    assert found["time"]["hours"] == pytest.approx(800 * 312 * 4096 / (16 * speed) / 3600)
    assert found["loader_cores"] == -(-8 * speed // 460)


def test_own_keys_change_what_they_say():
    base = planned("gpu=h100")
    assert planned("gpu=h100", "efficiency=0.2")["time"]["hours"] == pytest.approx(
        2 * base["time"]["hours"]
    )
    assert planned("gpu=h100", "images=4096", "epochs=9", "warmup_epochs=1")["time"]["steps"] == 9
    assert planned("gpu=h100", "images_per_core=50")["loader_cores"] > base["loader_cores"]
    two_nodes = planned("gpu=h100", "gpus_per_node=4")
    assert two_nodes["images_per_second"]["node"] == base["images_per_second"]["node"] / 2
    assert (base["bandwidth"], two_nodes["bandwidth"]) == (450, 200)


def test_all_reduce_update_and_checkpoint():
    found = planned("gpus=32", "gpu=h100", "bandwidth=10")
    trained, target = found["parameters"]["trained"], found["parameters"]["target"]
    assert found["all_reduce"]["bytes"] == pytest.approx(2 * 31 / 32 * 4 * trained)
    assert found["all_reduce"]["seconds"] == pytest.approx(found["all_reduce"]["bytes"] / 1e10)
    assert found["update_seconds"] == pytest.approx((32 * trained + 12 * target) / 3350e9)
    assert planned("gpus=1")["all_reduce"]["seconds"] == 0
    assert planned("target=frozen")["update_seconds"] < planned()["update_seconds"]


def test_size_of_a_checkpoint():
    cfg = settings("freeze_pe=False")
    state = sum(4 * tensor.numel() for tensor in build_model(cfg).state_dict().values())
    found = planned(*SMALL, "freeze_pe=False")["checkpoint"]
    assert found["bytes"] == state + 8 * plan.Model(cfg).trained
    assert found["seconds"] == found["bytes"] / 1e9


@pytest.mark.parametrize("machine", MACHINES)
def test_each_machine(machine):
    keys = {"tflops", "memory", "memory_bandwidth", "link", "network"}
    assert set(MACHINES[machine]) == keys
    found = planned(f"gpu={machine}")
    assert found["precision"] == ("fp16" if machine == "v100" else "bf16")
    assert MACHINES[machine]["tflops"]["fp32"] < MACHINES[machine]["tflops"][found["precision"]]


def point(**changes) -> dict:
    return {
        "machine": "h200",
        "encoder": "vit_base",
        "batch": 256,
        "precision": "bf16",
        "images_per_second": 5000.0,
        "date": "2025-01-31",
        "source": "bench.step",
    } | changes


def test_measured_points_replace_the_assumption():
    points = [
        plan.Point(**point()),
        plan.Point(**point(images_per_second=900.0, precision="fp32")),
        plan.Point(**point(images_per_second=6000.0, batch=64)),
        plan.Point(**point(images_per_second=7000.0, settings=["compile=True"])),
        plan.Point(**point(images_per_second=3000.0, encoder="vit_large")),
        plan.Point(**point(images_per_second=1.0, machine="a100")),
    ]

    def speed(*overrides: str) -> float:
        found = planned("gpu=h200", *overrides, points=points)
        assert "ASSUMED" not in found["source"]
        return found["images_per_second"]["gpu"]

    assert speed() == 5000
    assert speed("precision=fp32") == 900
    assert speed("batch_size=32") == pytest.approx(6000, rel=1e-3)  # the cue's shared products
    assert speed("compile=True") == 7000
    assert speed("encoder=vit_large") == 3000
    work = {e: planned(f"encoder={e}")["flops_per_image"] for e in ("vit_large", "vit_huge")}
    ratio = sum(work["vit_large"].values()) / sum(work["vit_huge"].values())
    assert speed("encoder=vit_huge") == pytest.approx(3000 * ratio)
    share = planned("gpu=h200", "efficiency=0.4", points=points)
    assert "ASSUMED: 40%" in share["source"]  # what is said on the command line counts


# --- the command ----------------------------------------------------------------------------------


def run_plan(capsys, *arguments: str) -> tuple[int, str, str]:
    exit_code = plan.main(list(arguments))
    return exit_code, *capsys.readouterr()


def write_machines(folder: Path, measured: list[dict]) -> str:
    path = folder / "machines.yaml"
    path.write_text(yaml.safe_dump({"machines": MACHINES, "measured": measured}))
    return f"--machines={path}"


def test_table_and_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    exit_code, output, _ = run_plan(
        capsys, "encoder=vit_large", "gpus=64", "gpu=h100", f"--json={path}"
    )
    assert exit_code == 0
    assert "vit_large on 64 x h100, bf16, 800 epochs of 1,281,167 images" in output
    assert "32,768 = 64 x 256 x 2 (the published recipe: 4,096)" in output
    assert "ASSUMED: 40% of 989 TFLOP/s" in output and "yours: python -m bench.loader" in output
    assert "DOES NOT FIT" not in output
    assert max(map(len, output.splitlines())) < 200
    assert json.loads(path.read_text()) == planned("encoder=vit_large", "gpus=64", "gpu=h100")


def test_what_does_not_fit_is_said(capsys):
    huge = ("encoder=vit_huge", "gpu=rtx4090", "batch_size=256")
    assert "DOES NOT FIT" in run_plan(capsys, *huge)[1]
    small = ("encoder=vit_huge", "gpu=rtx4090", "batch_size=16", "recompute=True")
    assert "DOES NOT FIT" not in run_plan(capsys, *small)[1]


def test_check_compares_each_point_with_the_others(tmp_path, capsys):
    assert run_plan(capsys, "--check", write_machines(tmp_path, []))[1].startswith("no points")
    peak = planned("gpu=a100", "efficiency=1")["images_per_second"]["gpu"]
    points = [
        point(),
        point(images_per_second=10000.0, batch=128),
        point(machine="a100", images_per_second=0.3 * peak),
    ]
    exit_code, output, _ = run_plan(capsys, "--check", write_machines(tmp_path, points))
    first, second, alone = output.splitlines()
    assert exit_code == 0
    assert first.startswith("h200 bf16 vit_base batch 256: 5000 images/s")
    assert "0.50 of the prediction (from vit_base, batch 128, measured 2025-01-31)" in first
    assert "2.00 of the prediction (from vit_base, batch 256" in second
    assert "30.0% of the peak, 0.75 of the prediction (ASSUMED: 40% of 312 TFLOP/s)" in alone


def test_the_points_that_are_shipped_can_be_read(capsys):
    assert run_plan(capsys, "--check")[0] == 0


BAD = {
    "gpu=x100": "valid is one of a100-40, a100, h100",
    "gpus=12": "valid is 1 to gpus_per_node=8, or a multiple",
    "gpus=0": "valid is a whole number of at least 1",
    "gpus=1,2": "valid is a whole number of at least 1",
    "+gpus=8": "keys can be set",
    "efficiency=1.5": "valid is a number above 0 and at most 1, or null",
    "bandwidth=-1": "valid is a number above 0, or null",
    "images=4095": "valid is at least 4096, one step's",
    "images=[": "the value cannot be read",
    "gpuz=8": "unknown key",
    "nmu_vis=20": "did you mean num_vis?",
    "num_vis=500": "valid is 1 to 194",
    "encoder=resnet": "no such choice",
    "foo": "is not of the form key=value",
    "precision=fp8": "valid is one of auto, bf16, fp16, fp32",
    "--machines=/nowhere.yaml": "valid is a file like bench/machines.yaml",
    "--json=/nowhere/plan.json": "No such file",
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input_is_one_sentence(argument, capsys):
    exit_code, _, error = run_plan(capsys, argument)
    assert exit_code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert BAD[argument] in error


def test_a_precision_that_the_machine_lacks(capsys):
    exit_code, _, error = run_plan(capsys, "gpu=v100", "precision=bf16")
    assert (exit_code, error) == (2, "error: precision=bf16: v100 has fp16, fp32\n")


BAD_POINTS = {
    "without a date": {key: value for key, value in point().items() if key != "date"},
    "with a key too many": point(threads=2),
    "of an unknown machine": point(machine="x100"),
    "in a precision that the machine lacks": point(precision="fp8"),
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_a_bad_point_is_one_sentence(name, tmp_path, capsys):
    exit_code, _, error = run_plan(capsys, write_machines(tmp_path, [BAD_POINTS[name]]))
    assert exit_code == 2
    assert error.count("\n") == 1 and "valid is a file like bench/machines.yaml" in error


def test_the_command_answers_without_torch():
    program = "import sys, bench.plan; code = bench.plan.main(['gpu=x']); "
    program += "sys.exit(9 if 'torch' in sys.modules else code)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
