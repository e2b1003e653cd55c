"""The step on fake CUDA tensors: nothing waits, all is on the device, and counts are right."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat

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
from bench.fake_cuda import CUDA, Recorder, fake_cuda
from bench.roofline import add_up, left_when_fused, seconds
from data.transforms import normalise
from engine_pretrain import train_step
from launch.config import compose_config
from main_lmim import view_source
from models.vit import LayerNorm
from tests.published import PLACES, recipe
from tests.runs import TINY, records
from tests.test_engine import build_training, draw
from tests.test_models import random_inputs, small_model
from util.build import Training, build_model, read_geometry
from util.cpu import write_out_attention
from util.distributed import Ranks
from util.metrics import dense_peak
from util.preemption import stoppable

SLOW = pytest.mark.slow
SMALL = {
    **{"embed_dim": 48, "depth": 1, "num_heads": 3, "grid_size": 4, "num_vis": 4, "mlp_dim": 64},
    **{"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4, "mlp_depth": 2},
    **{"batch_size": 2, "accum_iter": 1, "clip_grad": 1.0},
}


def small_config(**changes) -> DictConfig:
    cfg = recipe().copy()
    for name, value in (SMALL | changes).items():
        OmegaConf.update(cfg, PLACES.get(name, name), value)
    return cfg


def real_steps(cfg: DictConfig) -> tuple[Training, Callable[[int], None]]:
    """On the CPU, in fp32. -> what takes so many steps"""
    torch.manual_seed(0)
    cpu, geometry = Ranks(0, 1, torch.device("cpu")), read_geometry(cfg)
    training = Training(cfg, build_model(cfg), cpu, "fp32", cfg.batch_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, geometry.side, geometry.side), generator=generator)

    def run(steps: int) -> None:
        batches, views = repeat(images.to(torch.uint8)), view_source(cfg, cpu, geometry)
        for step in range(steps):
            train_step(training, batches, views, step, step / 10)

    return training, run


def fake_step(
    precision: str = "bf16", plant: Callable | None = None, **changes
) -> tuple[Training, Recorder]:
    """The second step; with a plant, which is called with the loss, the first."""
    cfg = small_config(**changes)
    with fake_cuda() as recorder:
        ranks, geometry = Ranks(0, 1, CUDA), read_geometry(cfg)
        training = Training(cfg, build_model(cfg), ranks, precision, cfg.batch_size)
        training.compile()
        draw_views = view_source(cfg, ranks, geometry)
        images = repeat(torch.empty(2, 3, geometry.side, geometry.side, dtype=torch.uint8))
        if plant is None:
            train_step(training, images, draw_views, 0, 0.0)
        else:
            objective = training.objective

            def planted(*inputs):
                loss, metrics = objective(*inputs)
                plant(loss.detach())
                return loss, metrics

            training.objective = planted
        with recorder:
            train_step(training, images, draw_views, 1, 0.5)
    return training, recorder


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16", pytest.param("fp32", marks=SLOW)])
def test_nothing_waits_and_all_is_on_the_device(precision):
    """With clipping and accumulation, and in fp16 with a scaler that works."""
    training, recorder = fake_step(precision, accum_iter=2)
    assert recorder.copies == []
    names = {operation.name for operation in recorder.operations}
    assert ("_amp_update_scale_" in names) == (precision == "fp16")
    assert {"_fused_adamw_", "_foreach_lerp_", "_foreach_mul_"} <= names
    products = {o.precision for o in recorder.operations if o.flops and o.part != "loss"}
    assert products - {"fp32"} == {precision} - {"fp32"}
    trained = [p for p in training.model.parameters() if p.requires_grad]
    states = [state["exp_avg"] for state in training.optimizer.state.values()]
    assert len(states) == len(trained) and {state.device for state in states} == {CUDA}


def from_host() -> torch.Tensor:
    return torch.ones(3, device="cpu")


RAISES = {
    "item": (lambda loss: loss.item(), DataDependentOutputException),
    "if": (lambda loss: bool(loss > 0), DataDependentOutputException),
    "mask": (lambda loss: loss[None][loss[None] > 0], DynamicOutputShapeException),
    "nonzero": (lambda loss: loss[None].nonzero(), DynamicOutputShapeException),
    "mismatch": (lambda loss: loss + from_host(), RuntimeError),
}


@pytest.mark.parametrize("way", RAISES)
def test_a_planted_wait_or_mismatch_raises(way):
    plant, error = RAISES[way]
    with pytest.raises(error):
        fake_step(plant=plant)


def test_planted_copies_are_noted_with_their_lines():
    def copy(loss: torch.Tensor) -> None:
        loss + from_host().to(CUDA)
        loss + torch.tensor([1.0], device=CUDA)
        torch.empty(3).copy_(from_host())
        loss.cpu()

    first = copy.__code__.co_firstlineno
    places = [copy.partition(" at ")[2] for copy in fake_step(plant=copy)[1].copies]
    assert places == [f"tests/test_fake_cuda.py:{first + line}" for line in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(changes, marks=SLOW)
            for changes in (
                {"decoder": "self", "mask_target": False},
                {"target": "joint"},
                {"target": "stopgrad"},
                {"target": "projection", "avg_sim_coeff": 0.0},
                {"target_layers": [0]},
                {"recompute": True},
            )
        ),
    ],
    ids=str,
)
def test_all_products_are_in_compiled_code(changes):
    _, recorder = fake_step(**changes)
    products = [operation for operation in recorder.operations if operation.flops]
    outside = {(o.name, o.part, o.line, o.backward) for o in products if o.region is None}
    assert outside == set()
    assert {o.backward for o in products} == {True, False}
    # The heads compute in low precision, where CUDA's autocast would not.
    assert {o.precision for o in recorder.operations if o.name == "gelu"} == {"bf16"}


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


@SLOW
@pytest.mark.parametrize(
    "changes",
    [
        {"accum_iter": 2},
        {"decoder": "self", "mask_target": False},
        {"target": "joint", "target_depth": 1},
        {"target": "stopgrad"},
        {"target": "projection", "avg_sim_coeff": 0.0},
        {"target_layers": [0, 1]},
        {"target_layers": [1], "target_tap": "mlp"},
        {"recompute": True},
    ],
    ids=str,
)
def test_compiled_parts_are_traced_whole_and_change_no_bit(changes, monkeypatch):
    """Without the code that a compiler writes, which rounds elsewhere."""
    cfg, weights = small_config(depth=2, **changes), []
    compile_it = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr("torch.compile", compile_it)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        training, run = real_steps(cfg)
        if compiled:
            training.compile()
        run(2)
        weights.append([p.detach() for p in training.model.parameters()])
    assert all(map(torch.equal, *weights))
    # The blocks of a network share one; a joint target has other shapes.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == (10 if changes.get("target") == "joint" else 8)


def test_the_share_of_the_peak(monkeypatch, tmp_path):
    """In an in-process run of the worker, on a GPU that is said to do 1 GFLOP/s."""
    monkeypatch.setattr("main_lmim.dense_peak", lambda device, precision: 1e9)
    changes = ["max_steps=2", "num_workers=0", "watch_images=0", "eval_at_start=False"]
    tiny = [text for text in TINY if "=" in text and not text.startswith("--")]
    cfg = compose_config("demo", [*tiny, *changes, "precision=fp32", f"output_dir={tmp_path}"])
    cpu = Ranks(0, 1, torch.device("cpu"))
    with stoppable(cpu) as stop_flag:
        main_lmim.pretrain(cfg, cpu, stop_flag)
    with FlopCounterMode(display=False) as counter:
        real_steps(cfg)[1](1)  # two images
    lines = [line for line in records(tmp_path / "demo") if "loss" in line]
    for line in lines:
        share = line["images_per_second"] * counter.get_total_flops() / 2 / 1e9
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
        training = build_training(decoder=decoder)
        latents = training.network(*draw(0, 8))
        for _ in range(2):  # added to those that are there
            backward(training.objective(training.network(*draw(0, 8)), 0.5)[0])
        backward(latents.visible.square().mean())
        gradients.append([p.grad for p in training.model.parameters() if p.requires_grad])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_work_is_what_a_real_step_does():
    """Another counter, of real operations on a CPU."""
    training, run = real_steps(small_config())
    write_out_attention(training.model)
    with FlopCounterMode(display=False) as counter:
        run(1)
    work = sum(operation.flops for operation in fake_step()[1].operations)
    # The backward pass of attention makes its scores again.
    tokens = {"encoder": (5, 5, 48), "decoder": (13, 13, 64), "cross": (13, 5, 64)}
    again = sum(2 * 2 * queries * keys * dim for queries, keys, dim in tokens.values())
    assert work == counter.get_total_flops() + again


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
