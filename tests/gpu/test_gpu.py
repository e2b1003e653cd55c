"""What needs a GPU: checks, and figures. The most important comes first. On a CPU, as a test of
itself, and at tiny sizes:

python -m pytest tests/gpu -m gpu -n1 --small
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from bench import loader as loading
from bench import step
from eval.nn import QUERIES, nearest
from launch.config import compose_config
from launch.job import git
from main_lmim import Pretraining
from tests.golden.replay import compare, relative_error
from tests.gpu.conftest import Bench, set_up
from tests.runs import LAUNCHER, ROOT, final_state, finish, kill_at_step, records, start_process
from util.build import open_split
from util.checkpoint import CheckpointWriter
from util.distributed import default_workers
from util.loop import job_folder, train
from util.metrics import dense_peak
from util.preemption import stoppable

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
STEPS = 20
ROUNDS = 7  # of a step and the plain one
# Largest relative errors: of gradients, of all else. On a CPU bf16 has 3.4e-2 and 8.2e-3.
GOLDEN_LIMITS = {"fp32": (1e-4, 1e-4), "bf16": (1e-1, 3e-2)}
STEP_LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 1e-2)}  # of losses, of weights
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.npz"))
DEMO = "watch_images=0 eval_freq=0 eval_at_start=False warmup_epochs=1 num_workers=2".split()
WIDTH, NEIGHBOURS, CHECKED = 768, 200, 10  # of the search


def configured(bench: Bench, encoder: str, batch_size: int = 256, **changes) -> DictConfig:
    settings = [f"encoder={encoder}", f"batch_size={batch_size}", f"precision={bench.precision}"]
    if bench.small:
        settings = ["encoder=vit_nano", "batch_size=2", "precision=fp32", "num_vis=4"]
        settings += ["proj.mlp_dim=64", "decoder_embed_dim=64", "decoder_depth=1"]
        settings += ["decoder_num_heads=4"]
    changed = [f"{key}={value}" for key, value in changes.items()]
    return compose_config("lmim", [*settings, "accum_iter=1", *changed])


def test_environment(bench, row):
    row |= {"torch": torch.__version__, "commit": git("rev-parse", "--short", "HEAD")}
    row |= {"device": step.device_name(bench.device), "cores": os.cpu_count()}
    if bench.device.type == "cuda":
        row |= {"CUDA": torch.version.cuda, "NCCL": str(torch.cuda.nccl.version())}
        row["GB"] = torch.cuda.get_device_properties(bench.device).total_memory / 1e9
        query = ["--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        asked = subprocess.check_output(["nvidia-smi", *query], text=True)
        row["driver, power, clock"] = asked.strip()


@pytest.mark.parametrize("precision", GOLDEN_LIMITS)
@pytest.mark.parametrize("pair", GOLDEN, ids=lambda path: path.stem)
def test_golden(pair, precision, bench, row):
    """The published numbers."""
    errors, decay_agrees = compare(pair, bench.device, precision)
    of_gradients, limit = GOLDEN_LIMITS[precision]
    row |= {"limit": limit, "of gradients": of_gradients, **errors}
    limits = dict.fromkeys(errors, limit) | {"gradients": of_gradients}
    assert {name: errors[name] for name in errors if errors[name] > limits[name]} == {}
    assert decay_agrees


def take_steps(
    cfg: DictConfig, bench: Bench, around: Callable = lambda model: model
) -> tuple[list[float], list[Tensor]]:
    """around: the network. -> losses, weights"""
    training = step.build_training(cfg, bench.ranks, cfg.precision)
    training.network = around(training.network)
    take, losses = step.step_of(cfg, training, bench.ranks), []
    for number in range(STEPS):
        take(number)
        losses.append(training.meters.read()["loss"])
    return losses, [p.detach().cpu() for p in training.model.parameters()]


def hold_equal(row: dict, found: tuple, expected: tuple, precision: str) -> None:
    of_losses, of_weights = STEP_LIMITS[precision]
    losses = max(abs(a / b - 1) for a, b in zip(found[0], expected[0], strict=True))
    weights = relative_error(found[1], expected[1])
    row |= {"losses": losses, "limit": of_losses}
    row |= {"weights": weights, "limit of weights": of_weights}
    assert losses <= of_losses and weights <= of_weights


@pytest.mark.parametrize(("encoder", "precision"), [("vit_base", "bf16"), ("vit_tiny", "fp32")])
def test_compiled_is_eager(encoder, precision, bench, row):
    precision = bench.size(precision, "fp32")
    settings = {"precision": precision, "seed": 1}
    found, expected = (
        take_steps(configured(bench, encoder, compile=how, **settings), bench)
        for how in (True, False)
    )
    hold_equal(row, found, expected, precision)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Inside, waiting for the GPU is an error. On a CPU nothing is looked for."""
    mode = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    mode("error")
    try:
        yield
    finally:
        mode("default")


class WithoutWaits(Pretraining):
    def step(self, step: int, batches: Iterator) -> None:
        with no_waits(self.ranks.device):
            super().step(step, batches)


def run_here(cfg: DictConfig, bench: Bench, worker: type[Pretraining] = Pretraining) -> dict:
    """A training in this process. -> the last line of its log"""
    with stoppable(bench.ranks) as stop_flag, job_folder(cfg, bench.ranks) as job:
        train(worker(cfg, bench.ranks), cfg, bench.ranks, job, stop_flag)
    return records(job)[-1]


def test_a_planted_wait_is_found(bench):
    if bench.device.type == "cuda":
        with pytest.raises(RuntimeError), no_waits(bench.device):
            torch.ones(1, device=bench.device).item()


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_no_waits(how, bench, row, tmp_path):
    """In the worker's step, with its loader."""
    settings = [f"output_dir={tmp_path}", f"compile={how == 'compiled'}", "accum_iter=2"]
    settings += [f"precision={bench.precision}", "clip_grad=1", "print_freq=10"]
    settings += [f"max_steps={STEPS}", f"batch_size={bench.size(64, 4)}"]
    row["steps"] = run_here(compose_config("demo", [*DEMO, *settings]), bench, WithoutWaits)["step"]
    assert row["steps"] == STEPS


def test_killed_and_resumed(bench, row, tmp_path):
    """kill -9. Two runs without it say how far apart equal runs are."""
    settings = [f"output_dir={tmp_path}", f"precision={bench.precision}", "resume=True"]
    settings += [f"max_steps={bench.size(100, 12)}", "print_freq=1", "save_minutes=1e-6"]
    settings += bench.size([], ["batch_size=16"])
    worker = [*LAUNCHER, "--config-name=demo", *DEMO, *settings]
    names = ("killed", "first", "second")
    runs = {name: start_process([*worker, f"job_name={name}"]) for name in names}
    kill_at_step(runs["killed"], tmp_path / "killed", step=bench.size(40, 8))
    runs["killed"] = start_process([*worker, "job_name=killed"])
    for code, output in [finish(run) for run in runs.values()]:
        assert code == 0, output[-200:]
    states = [tree_leaves(final_state(tmp_path / name)) for name in names]
    killed, first, second = (
        [leaf for leaf in state if isinstance(leaf, Tensor)] for state in states
    )
    row["two runs apart"] = apart = relative_error(second, first)
    row["killed apart"] = difference = relative_error(killed, first)
    row["bit for bit"] = difference == 0
    assert difference <= 3 * apart


def in_group(cfg: DictConfig, small: bool) -> tuple[str, tuple]:
    """What torchrun's process does."""
    bench = set_up(small)
    dist.init_process_group("nccl" if bench.device.type == "cuda" else "gloo")
    taken = take_steps(cfg, bench, DistributedDataParallel)
    backend = dist.get_backend()
    dist.destroy_process_group()
    return backend, taken


def test_nccl(bench, row):
    """torchrun with one process: DistributedDataParallel against the step without."""
    cfg = configured(bench, "vit_tiny", precision="fp32")
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1, **meeting)
    row["backend"], together = elastic_launch(config, in_group)(cfg, bench.small)[0]
    hold_equal(row, together, take_steps(cfg, bench), "fp32")


def test_checkpoint(bench, row, tmp_path):
    """Steps without one and while one is written in the background."""
    cfg = configured(bench, "vit_base")
    training = step.build_training(cfg, bench.ranks, cfg.precision)
    take = step.step_of(cfg, training, bench.ranks)
    usual = [step.seconds_of(take, bench.device) for _ in range(STEPS)][3:]
    writer, begin = CheckpointWriter(tmp_path, print), time.perf_counter()
    parts = {"model": training.model, "optimizer": training.optimizer}
    writer.save({name: part.state_dict() for name, part in parts.items()}, step=1)
    copied, meanwhile = time.perf_counter() - begin, []
    while not (meanwhile and writer.writing.done()):
        meanwhile.append(step.seconds_of(take, bench.device))
    written = time.perf_counter() - begin
    writer.wait()
    row["GB"] = sum(path.stat().st_size for path in tmp_path.iterdir()) / 1e9
    row["step, ms"] = 1e3 * statistics.median(usual)
    row["step while it is written, ms"] = 1e3 * statistics.median(meanwhile)
    row |= {"waiting for the copy, s": copied, "written after, s": written}


@pytest.fixture
def photos(bench, tmp_path) -> Path:
    """A thousand files with the contents of 64; the validation images are the same."""
    loading.write_photos(tmp_path, bench.size(64, 4))
    for path in list(tmp_path.rglob("*.jpg")):
        for number in range(1, bench.size(16, 4)):
            os.link(path, path.with_name(f"{number}-{path.name}"))
    (tmp_path / "val").symlink_to("train")
    return tmp_path


def test_loader_alone(bench, row, photos):
    """JPEG files and all cores."""
    cfg = configured(bench, "vit_base", dataset="imagefolder", data_path=photos)
    row["processes"] = workers = default_workers()
    transform, images = loading.recipe_transform(cfg), bench.size(40 * max(1, workers), 1)
    dataset = open_split(cfg, "train")
    row["images/s"] = loading.rate(cfg, dataset, transform, images * loading.BATCH)


def test_loader_and_step(bench, row, photos):
    cfg = configured(
        *(bench, "vit_base"),
        dataset="imagefolder",
        data_path=photos,
        output_dir=photos / "checkpoints",
        max_steps=bench.size(STEPS, 4),
        print_freq=bench.size(STEPS, 4) // 2,
        watch_images=0,
        eval_at_start=False,
        eval_freq=0,
    )
    line = run_here(cfg, bench)
    row |= {"processes": default_workers(), "images/s": line["images_per_second"]}
    row["waiting"] = line["data_wait"]


def test_search(bench, row):
    """Exact, in the CPU's memory, as evaluations have it."""
    torch.manual_seed(0)
    sizes = bench.size((1_280_000, 5 * QUERIES), (3000, 20))
    bank, queries = (F.normalize(torch.randn(n, WIDTH, device=bench.device).cpu()) for n in sizes)
    find = partial(nearest, bank, k=NEIGHBOURS, device=bench.device)
    find(queries=queries[:1])
    begin = time.perf_counter()
    found = [find(queries=part) for part in queries.split(QUERIES)]
    row |= {"bank": sizes[0], "queries": sizes[1], "s": time.perf_counter() - begin}
    few = queries[:CHECKED].to(bench.device).double()
    products = [part.to(bench.device).double() @ few.T for part in bank.split(2**16)]
    expected = torch.cat(products).topk(NEIGHBOURS, dim=0).indices.T.cpu()
    equal = int((found[0].indices[:CHECKED] == expected).all(dim=1).sum())
    row["as in float64"] = f"{equal} of {CHECKED}"
    assert equal == CHECKED


@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["compiled", "eager"])
@pytest.mark.parametrize("batch_size", [256, 512])
@pytest.mark.parametrize("encoder", ["vit_base", "vit_large", "vit_small"])
def test_speed(encoder, batch_size, how, bench, row):
    """Of the step, next to the plain formulation in the same precision."""
    cfg = configured(bench, encoder, batch_size, compile=how == "compiled")
    found = step.measure(cfg, bench.ranks, cfg.precision, bench.size(ROUNDS, 1))
    row["images/s"] = found["images_per_second"]
    if peak := dense_peak(bench.device, cfg.precision):
        row["of the dense peak"] = 1e9 * found["gflop_per_second"] / peak
    row["of the best product"] = found["share_of_peak"]
    row |= {"times plain": found["times_plain"], "GB": found["memory_gb"]}
    row["spread"] = found["spread"]
