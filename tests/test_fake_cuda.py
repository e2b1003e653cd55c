"""The step on fake CUDA tensors: nothing waits, all is on the device, and counts are right."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils.flop_counter import FlopCounterMode

import main_lmim
from bench import roofline
from bench.fake_cuda import CUDA, Recorder, fake_cuda
from bench.roofline import add_up, left_when_fused, record_step, seconds
from bench.step import build_training, step_of
from data.transforms import normalise
from launch.config import compose_config
from models.vit import LayerNorm
from tests import test_engine
from tests.published import PLACES, recipe
from tests.runs import TINY, records
from tests.test_models import random_inputs, small_model
from util.build import Training
from util.distributed import Ranks
from util.metrics import dense_peak
from util.precision import write_out_attention
from util.preemption import stoppable

SMALL = {
    "embed_dim": 48,
    "depth": 1,
    "num_heads": 3,
    "grid_size": 4,
    "num_vis": 4,
    "mlp_dim": 64,
    "mlp_depth": 2,
    "decoder_embed_dim": 64,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
    "batch_size": 2,
    "accum_iter": 2,
    "clip_grad": 1.0,
}
ONCE = {"accum_iter": 1}
TRACED = {
    "recipe": ("bf16", {}),
    "self": ("fp16", {"decoder": "self", "mask_target": False, "target_layers": [0], **ONCE}),
    "joint": ("bf16", {"target": "joint", "recompute": True, **ONCE}),
}
EACH_TRACE = [
    "recipe",
    pytest.param("self", marks=pytest.mark.slow),
    pytest.param("joint", marks=pytest.mark.slow),
]
CPU = Ranks(0, 1, torch.device("cpu"))


def small_config(**changes) -> DictConfig:
    cfg = recipe().copy()
    for name, value in (SMALL | changes).items():
        OmegaConf.update(cfg, PLACES.get(name, name), value)
    return cfg


def real_step(cfg: DictConfig) -> tuple[Training, Callable]:
    training = build_training(cfg, CPU, "fp32", tuned=False)
    return training, step_of(cfg, training, CPU)


def flops_of(step: Callable) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@cache
def traced(name: str) -> tuple[Training, Recorder]:
    """The second step."""
    precision, changes = TRACED[name]
    return record_step(small_config(**changes), precision)


@pytest.mark.parametrize("name", EACH_TRACE)
def test_nothing_waits_and_all_is_on_the_device(name):
    """With clipping, the recipe with accumulation, and in fp16 with a scaler that works."""
    training, recorder = traced(name)
    precision = TRACED[name][0]
    assert recorder.copies == []
    names = {operation.name for operation in recorder.operations}
    assert ("_amp_update_scale_" in names) == (precision == "fp16")
    assert {"_fused_adamw_", "_foreach_mul_"} <= names
    assert ("_foreach_lerp_" in names) == (name != "joint")  # the moving average
    products = {o.precision for o in recorder.operations if o.flops and o.part != "loss"}
    assert products - {"fp32"} == {precision}
    trained = [p for p in training.model.parameters() if p.requires_grad]
    states = [state["exp_avg"] for state in training.optimizer.state.values()]
    assert len(states) == len(trained) and {state.device for state in states} == {CUDA}


def from_host() -> torch.Tensor:
    return torch.ones(3)


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda loss: loss.item(), DataDependentOutputException),
        (lambda loss: bool(loss > 0), DataDependentOutputException),
        (lambda loss: loss[None][loss[None] > 0], DynamicOutputShapeException),
        (lambda loss: loss[None].nonzero(), DynamicOutputShapeException),
        (lambda loss: loss + from_host(), RuntimeError),
    ],
    ids=["item", "if", "mask", "nonzero", "mismatch"],
)
def test_a_wait_or_mismatch_raises(wait, error):
    with fake_cuda(), pytest.raises(error):
        wait(torch.ones((), device=CUDA))


def test_copies_are_noted_with_their_lines():
    def copy(loss: torch.Tensor) -> None:
        loss + from_host().to(CUDA)
        loss + torch.tensor([1.0], device=CUDA)
        torch.empty(3, device=CUDA).copy_(from_host())
        loss.cpu()

    first = copy.__code__.co_firstlineno
    with fake_cuda() as recorder, recorder:
        copy(torch.ones((), device=CUDA))
    places = [copy.partition(" at ")[2] for copy in recorder.copies]
    assert places == [f"tests/test_fake_cuda.py:{first + line}" for line in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", EACH_TRACE)
def test_all_products_are_in_compiled_code(name):
    _, recorder = traced(name)
    products = [operation for operation in recorder.operations if operation.flops]
    outside = {(o.name, o.part, o.line, o.backward) for o in products if o.region is None}
    assert outside == set()
    assert {o.backward for o in products} == {True, False}
    # The heads compute in low precision, where CUDA's autocast would not.
    gelus = {o.precision for o in recorder.operations if o.name == "gelu"}
    assert gelus == {TRACED[name][0]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_in_low_precision(dtype):
    torch.manual_seed(0)
    norm, tokens = LayerNorm(64), torch.randn(5, 64)
    torch.nn.init.normal_(norm.weight)
    expected = norm(tokens)
    torch.set_autocast_enabled("cuda", True)
    try:
        found, full = norm(tokens.to(dtype)), norm(tokens)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert found.dtype == dtype and torch.equal(full, expected)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    found.sum().backward()
    assert norm.weight.grad.dtype == torch.float32


def test_bytes_become_floats_late():
    """As if the images had been normalised first: to the last bit."""
    model, config = small_model()
    model = model.float()
    images, views = random_inputs(config)
    images = (40 * images + 128).clamp(0, 255).to(torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model.scale.copy_(torch.tensor([1 / (255 * s) for s in std]).repeat(9))
    model.shift.copy_(torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).repeat(9))
    found, expected = model(images, views), model(normalise(images, mean, std), views)
    assert all(map(torch.equal, found, expected))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "decoder": "self",
            "mask_target": False,
            "target_layers": [1],
            "target_tap": "mlp",
            "recompute": True,
        },
        {"target": "joint", "target_depth": 1, **ONCE},
    ],
    ids=["self", "joint"],
)
def test_compiled_parts_are_traced_whole_and_change_no_bit(changes, monkeypatch):
    """Without the code that a compiler writes, which rounds elsewhere."""
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weights = []
    for compiled in (False, True):
        cfg = small_config(depth=2, compile=compiled, **changes)
        training, step = real_step(cfg)
        step(0)
        step(1)
        weights.append([p.detach() for p in training.model.parameters()])
    assert all(map(torch.equal, *weights))
    # The blocks of a network share one; a joint target has other shapes.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (10 if "target" in changes else 8)


def test_the_share_of_the_peak(monkeypatch, tmp_path):
    """In an in-process run of the worker, on a GPU that is said to do 1 GFLOP/s."""
    monkeypatch.setattr("main_lmim.dense_peak", lambda device, precision: 1e9)
    changes = ["max_steps=2", "num_workers=0", "watch_images=0", "eval_at_start=False"]
    tiny = [text for text in TINY if "=" in text and not text.startswith("--")]
    cfg = compose_config("demo", [*tiny, *changes, "precision=fp32", f"output_dir={tmp_path}"])
    with stoppable(CPU) as stop_flag:
        main_lmim.pretrain(cfg, CPU, stop_flag)
    flops = flops_of(real_step(OmegaConf.merge(cfg, {"batch_size": 2}))[1]) / 2
    lines = [line for line in records(tmp_path / "demo") if "loss" in line]
    for line in lines:
        share = line["images_per_second"] * flops / 1e9
        assert line["share_of_peak"] == pytest.approx(share, rel=1e-2)  # a product of all images
    console = (tmp_path / "demo" / "logs" / "console.txt").read_text()
    share = f"images/s  {lines[-1]['share_of_peak']:.0%} of peak  waiting"
    assert len(lines) == 2 and share in console


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 PCIe", "bf16", None),
    ],
)
def test_peaks_are_known_by_the_name_of_the_gpu(monkeypatch, name, precision, peak):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
    assert dense_peak(CUDA, precision) == peak
    assert dense_peak(torch.device("cpu"), precision) is None


# ---- What is counted. ----------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_the_backward_pass_is_autograds(decoder):
    gradients = []
    for backward in (Recorder().backward, torch.Tensor.backward):
        training = test_engine.build_training(decoder=decoder)
        latents = training.network(*test_engine.draw(0, 8))
        for _ in range(2):  # added to those that are there
            backward(training.objective(training.network(*test_engine.draw(0, 8)), 0.5)[0])
        backward(latents.visible.square().mean())
        gradients.append([p.grad for p in training.model.parameters() if p.requires_grad])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_work_is_what_a_real_step_does():
    """Another counter, of real operations on a CPU."""
    training, step = real_step(small_config())
    write_out_attention(training.model)
    work = sum(operation.flops for operation in traced("recipe")[1].operations)
    # The backward pass of attention makes its scores again.
    tokens = {"encoder": (5, 5, 48), "decoder": (13, 13, 64), "cross": (13, 5, 64)}
    again = sum(2 * 2 * queries * keys * dim for queries, keys, dim in tokens.values())
    assert work == flops_of(step) + 2 * again


def test_bytes_and_time_as_by_hand():
    """[6, 4] x [4, 8] + [8], GELU, doubled; then, not compiled, summed."""
    with fake_cuda() as recorder:
        x, weight, bias = torch.empty(6, 4), torch.empty(4, 8), torch.empty(8)
        compiled = torch.compile(lambda x: 2 * F.gelu(x @ weight + bias))
        with recorder:
            compiled(x).T[1:].sum()
    operations = recorder.operations
    result = 4 * 6 * 8
    expected = {
        "mm": (4 * (24 + 32) + result, 4 * (24 + 32) + result),
        "add": (2 * result + 32, result + 32),  # the product and the bias are read
        "gelu": (2 * result, 0),
        "mul": (2 * result, result),  # written for the sum
        "sum": (4 * 6 * 7 + 4, 4 * 6 * 7 + 4),
    }
    found = zip(operations, left_when_fused(operations), strict=True)
    assert {o.name: (o.bytes, left) for o, left in found} == expected
    assert [o.flops for o in operations] == [2 * 6 * 4 * 8, 0, 0, 0, 0]
    machine = {"practical": {"fp32": 1e-9}, "practical_bandwidth": 1e-6}  # 1 kFLOP/s, 1 MB/s
    assert seconds(operations[0], machine) == pytest.approx(0.384)
    assert seconds(operations[1], machine) == pytest.approx(416e-6)
    assert seconds(operations[2], machine, left=0) == 0
    fast = {"practical": {"fp32": 1e3}, "practical_bandwidth": 1e3}
    assert seconds(operations[2], fast) == 3e-6, "an operation takes that long to start"
    assert operations[4].region is None and seconds(operations[4], fast, left=0) == 3e-6
    sums = add_up(operations, {"A": machine}, micro_steps=2)["all"]
    assert sums["operations"] == 2.5 and sums["TFLOP"] == sums["in fp32"] == 192e-12
    eager = 384 + 0.416 + 2 * 0.384 + 0.172
    assert sums["A eager ms"] == pytest.approx(eager / 2)
    assert sums["A compiled ms"] == pytest.approx((384 + 0.224 + 0.192 + 0.172) / 2)


def test_what_a_product_reads_is_written_and_each_pass_reads_again():
    """Of (2 a + 1) @ weight the sum alone leaves fused code; backward code reads again."""
    with fake_cuda() as recorder:
        a, weight = torch.empty(6, 4), torch.empty(4, 8)
        with recorder:
            torch.compile(lambda a: (2 * a + 1) @ weight)(a)
    size, left = 4 * 6 * 4, left_when_fused(recorder.operations)
    assert [o.name for o in recorder.operations] == ["mul", "add", "mm"]
    assert left[:2] == [size, size]
    forward = recorder.operations[0]
    backward = replace(forward, backward=True, writes={-1: size})
    assert left_when_fused([forward, backward]) == [size, size]
    assert left_when_fused([forward, replace(backward, backward=False)]) == [size, 0]


# ---- bench/roofline.py ---------------------------------------------------------------------------


@pytest.fixture
def one_gpu(monkeypatch):
    """Of 2 MFLOP/s in bf16 and 1 in fp32, and 3 MB/s."""
    speed = {"practical": {"bf16": 2e-6, "fp32": 1e-6}, "practical_bandwidth": 3e-6}
    machine = {"peak": {"bf16": 4e-6, "fp32": 1.5e-6}, "bandwidth": 9e-6, **speed}
    monkeypatch.setattr(roofline, "GPUS", {"slow": machine})
    monkeypatch.setattr(roofline, "record_step", lambda cfg, precision: traced("recipe"))
    return machine


def table_rows(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_roofline_adds_up_the_step_and_says_how_long_training_takes(one_gpu, capsys):
    """Tables are per micro-step, hours are those of both."""
    roofline.main(small_config(epochs=7), gpus=3, images=1003)
    output = capsys.readouterr().out
    operations = traced("recipe")[1].operations
    micro_step = add_up(operations, {"slow": one_gpu}, 2)["all"]
    head, _, *rows = table_rows(output)
    assert head == ["per micro-step", *micro_step]
    whole = next(row for row in rows if row[0] == "all")
    assert [float(cell) for cell in whole[1:]] == pytest.approx([*micro_step.values()], rel=1e-3)
    largest = rows[rows.index(["the 10 that move most", "operation", "line", "GB"]) + 2 :]
    assert len(largest) == 10 and largest[0][1] == "_fused_adamw_ fp32"
    adamw = sum(o.bytes for o in operations if o.name == "_fused_adamw_")
    assert float(largest[0][3]) == pytest.approx(adamw / 2 / 1e9, rel=1e-3)
    assert {row[0].split()[-1] for row in largest} == {"forward", "backward"}
    steps = 7 * (1003 // (2 * 2 * 3))  # of two images on three GPUs, twice
    for how in ("eager", "compiled"):
        ms = micro_step[f"slow {how} ms"]
        share = micro_step["TFLOP"] / (ms / 1e3) / 4e-6
        expected = f"{ms * 2 * steps / 3.6e6:.1f} h, {6e3 / ms:.0f} images/s to load, {share:.0%}"
        assert f"slow {how}: {expected} of the peak" in output
    assert "\n7 epochs of 1003 images, at least:" in output


def test_roofline_counts_memory_and_gpus(one_gpu, capsys):
    """GPUs by the config where the command does not say; a network of 8 GB, half of it trained."""
    model = torch.nn.Sequential(*(torch.nn.Linear(10**5, 10**4, device="meta") for _ in range(2)))
    model[1].requires_grad_(False)
    inside, outside = (torch.empty(1).untyped_storage() for _ in range(2))
    kept = {inside._cdata: 6e9, outside._cdata: 1e9}
    recorder = SimpleNamespace(made=[inside], kept=kept)
    costs = SimpleNamespace(model=model, precision="bf16"), recorder
    sums = Counter({"slow eager ms": 36e5, "slow compiled ms": 18e5, "TFLOP": 3.6e-3})
    cfg = small_config(epochs=1)
    cfg.env.ngpu, cfg.env.world_size = 4, 2
    roofline.show_costs(cfg, *costs, sums, gpus=0, images=1003)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "memory: weights 8.00 GB, gradients 4.00, moments 8.00, for the backward pass 3.0: 23.0 GB",
        "all-reduce: 4.00 GB of gradients per step among 8 GPUs",
    ]
    assert lines[4].startswith("slow eager: 62.0 h, 0 images/s")  # 1003 // 32 steps of two hours
    assert lines[5].endswith("50% of the peak")
    cfg.env.ngpu = None
    roofline.show_costs(cfg, *costs, sums, gpus=0, images=1003)
    assert "among 2 GPUs" in capsys.readouterr().out
