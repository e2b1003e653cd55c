"""The parts of bench/gpu.py: checks that need a GPU, and figures. Each gives rows: what it is,
numbers, and, where they are not what they have to be, "failed" with the reason."""

import gc
import os
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from bench import loader as loading
from bench import step
from data.datasets import build_dataset
from engine_pretrain import train_step
from eval.features import unit_length
from eval.nn import QUERIES, nearest
from launch.config import compose_config
from launch.job import git
from main_lmim import Pretraining
from tests.golden.replay import compare, relative_error
from tests.runs import LAUNCHER, ROOT, final_state, finish, kill_at_step, start_process
from util.checkpoint import CheckpointWriter, first_words
from util.distributed import Ranks, default_workers, join_processes
from util.loop import job_folder, train
from util.metrics import dense_peak
from util.preemption import stoppable

STEPS = 20
ROUNDS = 7  # of a step and the plain one
# Largest relative errors: of gradients, of all else. On a CPU bf16 has 3.4e-2 and 8.2e-3.
GOLDEN_LIMITS = {"fp32": (1e-4, 1e-4), "bf16": (1e-1, 3e-2)}
STEP_LIMITS = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 1e-2)}  # of losses, of weights
DEMO = "watch_images=0 eval_freq=0 eval_at_start=False warmup_epochs=1 num_workers=2".split()
WIDTH, NEIGHBOURS, CHECKED = 768, 200, 10  # of the search


class Bench(NamedTuple):
    ranks: Ranks
    small: bool
    folder: Path

    def size(self, full, small):
        return small if self.small else full

    @property
    def precision(self) -> str:
        return self.size("bf16", "fp32")

    def setting(self, encoder: str, precision: str, batch: int = 256, compiled: bool = False):
        sizes = self.size((encoder, batch, step.GRID), ("vit_nano", batch // 128, 4))
        return step.Setting(*sizes, precision, compiled, recompute=False)


def rows_of(part: str, device: str, small: bool) -> Iterator[dict]:
    ranks = set_up(small)
    if ranks.device.type != device:
        raise RuntimeError(f"--device {device}: torch has found {ranks.device.type}")
    with tempfile.TemporaryDirectory() as folder:
        yield from PARTS[part](Bench(ranks, small, Path(folder)))


def set_up(small: bool) -> Ranks:
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    if small:
        step.MATRIX_SIDES = {"cpu": (128,), "cuda": (512,)}
        step.RECIPE["proj"]["mlp_dim"] = 64
        step.RECIPE |= {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4}
        torch.compile = partial(torch.compile, backend="aot_eager")  # building C++ takes minutes
    return join_processes()


def attempt(what: str, measure: Callable[..., dict], *arguments) -> dict:
    """A row, so that others can follow one that fails."""
    try:
        return {"what": what} | measure(*arguments)
    except Exception as error:
        traceback.print_exc()
        return {"what": what, "failed": f"{type(error).__name__}: {first_words(error)}"}


def judged(row: dict, is_good: dict[str, bool]) -> dict:
    beyond = ", ".join(name for name, good in is_good.items() if not good)
    return row | ({"failed": f"not as it has to be: {beyond}"} if beyond else {})


def environment(bench: Bench) -> Iterator[dict]:
    values = {"torch": torch.__version__, "commit": git("rev-parse", "HEAD")}
    values |= {"device": step.device_name(bench.ranks.device), "cores": os.cpu_count()}
    values["torch.compile"] = bench.size("inductor", "aot_eager, for a test")
    if bench.ranks.device.type == "cuda":
        values |= {"CUDA": torch.version.cuda, "NCCL": torch.cuda.nccl.version()}
        values["GB"] = torch.cuda.get_device_properties(bench.ranks.device).total_memory / 1e9
    for what, value in values.items():
        yield {"what": what, "value": value}
    if bench.ranks.device.type == "cuda":
        query = ["--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        ask = partial(subprocess.check_output, ["nvidia-smi", *query], text=True)
        yield attempt("driver, power, clock", lambda: {"value": ask().strip()})


def golden(bench: Bench) -> Iterator[dict]:
    """The published numbers."""

    def measure(pair: Path, precision: str) -> dict:
        errors, decay_agrees = compare(pair, bench.ranks.device, precision)
        of_gradients, limit = GOLDEN_LIMITS[precision]
        limits = dict.fromkeys(errors, limit) | {"gradients": of_gradients}
        is_good = {name: error <= limits[name] for name, error in errors.items()}
        about = {"limit": limit, "of gradients": of_gradients}
        return judged(about | errors, is_good | {"decay sets": decay_agrees})

    for pair in sorted((ROOT / "tests" / "golden").glob("*.npz")):
        for precision in GOLDEN_LIMITS:
            yield attempt(f"{pair.stem}, {precision}", measure, pair, precision)


def take_steps(
    setting: step.Setting, ranks: Ranks, around: Callable = lambda model: model
) -> tuple[list[float], list[Tensor]]:
    """around: the network. -> losses, weights"""
    training = step.build_training(setting, ranks)
    training.network = around(training.network)
    images, draw_views = step.draw_images(training, setting), step.view_source(setting, ranks)
    losses = []
    for number in range(STEPS):
        epoch = step.EPOCH + number / STEPS
        train_step(training, repeat(images), lambda *_: draw_views(), number, epoch)
        losses.append(training.meters.read()["loss"])
    return losses, [p.detach().cpu() for p in training.model.parameters()]


def compare_steps(found: tuple, expected: tuple, precision: str) -> dict:
    losses = max(abs(a / b - 1) for a, b in zip(found[0], expected[0], strict=True))
    weights, limits = relative_error(found[1], expected[1]), STEP_LIMITS[precision]
    row = {"losses": losses, "limit": limits[0], "weights": weights, "limit of weights": limits[1]}
    return judged(row, {"losses": losses <= limits[0], "weights": weights <= limits[1]})


def compiled(bench: Bench) -> Iterator[dict]:
    """Are they what they are uncompiled?"""

    def measure(setting: step.Setting) -> dict:
        both = [take_steps(replace(setting, compile=how), bench.ranks) for how in (True, False)]
        return compare_steps(*both, setting.precision)

    for encoder, precision in bench.size(
        {"vit_base": "bf16", "vit_tiny": "fp32"}, {"": "fp32"}
    ).items():
        setting = bench.setting(encoder, precision)
        yield attempt(f"{setting.encoder}, {precision}, {STEPS} steps", measure, setting)


def speed(bench: Bench, encoder: str) -> Iterator[dict]:
    """Of the step, next to the plain formulation in the same precision."""
    peak = dense_peak(bench.ranks.device, bench.precision)

    def measure(setting: step.Setting) -> dict:
        torch._dynamo.reset()
        gc.collect()  # what is compiled and what it belongs to hold each other
        found = step.measure(setting, setting.precision, bench.size(ROUNDS, 1), bench.ranks)
        return {
            "images/s": found["images_per_second"],
            "of the dense peak": 1e9 * found["gflop_per_second"] / peak if peak else "",
            "of the best product": found["share_of_peak"],
            "times plain": found["times_plain"],
            "GB": found["memory_gb"],
            "spread": found["spread"],
        }

    for batch in bench.size((256, 512), (256,)):
        for how in ("compiled", "eager"):
            setting = bench.setting(encoder, bench.precision, batch, how == "compiled")
            yield attempt(f"{setting.encoder}, {setting.batch}, {how}", measure, setting)


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


def waits(bench: Bench) -> Iterator[dict]:
    """Does the worker's step, with its loader, wait for the GPU?"""

    def plant() -> dict:
        try:
            with no_waits(bench.ranks.device):
                torch.ones(1, device=bench.ranks.device).item()
        except RuntimeError as error:
            return {"found": first_words(error)}
        is_cpu = bench.ranks.device.type == "cpu"
        return {"found": "needs CUDA"} if is_cpu else {"failed": "was not found"}

    def measure(how: str) -> dict:
        settings = [f"output_dir={bench.folder}", f"job_name={how}", f"compile={how == 'compiled'}"]
        settings += [f"precision={bench.precision}", "accum_iter=2", "clip_grad=1"]
        settings += [f"max_steps={STEPS}", "print_freq=10", f"batch_size={bench.size(64, 4)}"]
        cfg = compose_config("demo", [*DEMO, *settings])
        with stoppable(bench.ranks) as stop_flag, job_folder(cfg, bench.ranks) as job:
            train(WithoutWaits(cfg, bench.ranks), cfg, bench.ranks, job, stop_flag)
        return {"steps": STEPS}

    yield attempt("planted wait", plant)
    for how in bench.size(("eager", "compiled"), ("eager",)):
        yield attempt(how, measure, how)


def resume(bench: Bench) -> Iterator[dict]:
    """kill -9. Two runs without it say how far apart equal runs are."""
    settings = [f"output_dir={bench.folder}", f"precision={bench.precision}", "resume=True"]
    settings += [f"max_steps={bench.size(100, 12)}", "print_freq=1", "save_minutes=1e-6"]
    settings += bench.size([], ["batch_size=16"])
    worker = [*LAUNCHER, "--config-name=demo", *DEMO, *settings]
    runs = {
        name: start_process([*worker, f"job_name={name}"]) for name in ("killed", "first", "second")
    }
    kill_at_step(runs["killed"], bench.folder / "killed", step=(kill := bench.size(40, 8)))
    runs["killed"] = start_process([*worker, "job_name=killed"])
    for code, output in [finish(run) for run in runs.values()]:
        if code:
            raise RuntimeError(output[-200:])
    states = [tree_leaves(final_state(bench.folder / name)) for name in runs]
    states = [[leaf for leaf in state if isinstance(leaf, Tensor)] for state in states]
    killed, apart = (relative_error(state, states[1]) for state in (states[0], states[2]))
    yield {"what": "two runs", "relative difference": apart, "bit for bit": apart == 0}
    row = {"what": f"killed at step {kill} and resumed", "relative difference": killed}
    yield judged(row | {"bit for bit": killed == 0}, {"difference": killed <= 3 * apart})


def in_group(bench: Bench) -> tuple[str, tuple]:
    """What torchrun's process does."""
    ranks = set_up(bench.small)
    dist.init_process_group("nccl" if ranks.device.type == "cuda" else "gloo")
    steps = take_steps(bench.setting("vit_tiny", "fp32"), ranks, DistributedDataParallel)
    backend = dist.get_backend()
    dist.destroy_process_group()
    return backend, steps


def nccl(bench: Bench) -> Iterator[dict]:
    """torchrun with one process: DistributedDataParallel against the step without."""
    alone = take_steps(bench.setting("vit_tiny", "fp32"), bench.ranks)
    meeting = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1, **meeting)
    backend, together = elastic_launch(config, in_group)(bench)[0]
    yield {"what": f"{backend}, {STEPS} steps"} | compare_steps(together, alone, "fp32")


def checkpoint(bench: Bench) -> Iterator[dict]:
    """Steps without one and while one is written in the background."""
    setting = bench.setting("vit_base", bench.precision)
    training, draw_views = (
        step.build_training(setting, bench.ranks),
        step.view_source(setting, bench.ranks),
    )
    images = repeat(step.draw_images(training, setting))
    take = partial(train_step, training, images, lambda *_: draw_views(), 0, step.EPOCH)
    seconds = partial(step.seconds_of, take, bench.ranks.device)
    usual = [seconds() for _ in range(STEPS)][3:]
    writer, begin = CheckpointWriter(bench.folder, print), time.perf_counter()
    parts = {"model": training.model, "optimizer": training.optimizer}
    writer.save({name: part.state_dict() for name, part in parts.items()}, step=1)
    copied, meanwhile = time.perf_counter() - begin, [seconds()]
    while not writer.writing.done():
        meanwhile.append(seconds())
    written = time.perf_counter() - begin
    writer.wait()
    yield {
        "what": setting.encoder,
        "GB": sum(path.stat().st_size for path in bench.folder.iterdir()) / 1e9,
        "step, ms": 1e3 * statistics.median(usual),
        "step while it is written, ms": 1e3 * statistics.median(meanwhile),
        "waiting for the copy, s": copied,
        "written after, s": written,
    }


def loader(bench: Bench) -> Iterator[dict]:
    """JPEG files and all cores: the loader alone, and with the step."""
    setting, workers = bench.setting("vit_base", bench.precision), default_workers()
    loading.write_photos(bench.folder, bench.size(64, 4))
    for path in list(bench.folder.rglob("*.jpg")):
        for number in range(1, bench.size(16, 4)):
            os.link(path, path.with_name(f"{number}-{path.name}"))
    dataset = build_dataset("imagefolder", "train", str(bench.folder))
    transform = loading.recipe_transform(loading.SIDE)

    def alone() -> dict:
        images = bench.size(40 * max(1, workers), 1) * loading.BATCH
        return {"images/s": loading.rate(dataset, transform, workers, images)}

    def together() -> dict:
        steps = bench.size(STEPS, 2)
        found = loading.train(bench.folder, setting, workers, steps, bench.ranks)
        return {"images/s": found["images_per_second"], "waiting": found["waiting"]}

    yield attempt(f"{workers} processes", alone)
    yield attempt(f"{workers} processes and {setting.encoder}", together)


def search(bench: Bench) -> Iterator[dict]:
    """Exact, in the CPU's memory, as evaluations have it."""
    torch.manual_seed(0)
    sizes, device = bench.size((1_280_000, 5 * QUERIES), (3000, 20)), bench.ranks.device
    bank, queries = (unit_length(torch.randn(n, WIDTH, device=device).cpu()) for n in sizes)
    find = partial(nearest, bank, k=NEIGHBOURS, device=device)
    find(queries=queries[:1])
    begin = time.perf_counter()
    found = [find(queries=part) for part in queries.split(QUERIES)]
    seconds = time.perf_counter() - begin
    few = queries[:CHECKED].to(device).double()
    products = [part.to(device).double() @ few.T for part in bank.split(2**16)]
    expected = torch.cat(products).topk(NEIGHBOURS, dim=0).indices.T.cpu()
    equal = int((found[0].indices[:CHECKED] == expected).all(dim=1).sum())
    row = {"what": f"{sizes[1]} queries in {sizes[0]} x {WIDTH}", "s": seconds}
    row["as in float64"] = f"{equal} of {CHECKED}"
    yield judged(row, {"neighbours": equal == CHECKED})


OWN = (environment, golden, compiled, waits, resume, nccl, checkpoint, loader, search)
PARTS: dict[str, Callable[[Bench], Iterator[dict]]] = {part.__name__: part for part in OWN}
PARTS |= {name: partial(speed, encoder=name) for name in ("vit_small", "vit_base", "vit_large")}
