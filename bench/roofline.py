"""What a training step costs on a GPU, counted without one (bench/fake_cuda.py):

python -m bench.roofline                                          # the published recipe, 8 GPUs
python -m bench.roofline encoder=vit_large batch_size=64 gpus=64  # any other, in bf16
python -m bench.roofline --config-name=images images=50000        # another config, and data set

Per micro-step: operations, bytes moved, TFLOP, by part; what moves most; milliseconds on each GPU
of bench/machines.yaml; hours, images/s, memory and what the all-reduce moves.

eager: each operation takes the longest of its arithmetic, its bytes and 3 microseconds.
compiled: a lower bound of compile=True. Matrix products and attention stay operations of their own.
Everything else of one call of a compiled region is fused, forward and backward each: it reads once
what products or other regions have written, and writes once what products or others read; its
arithmetic is free. What its forward pass hands to its own backward pass is not written but made
again. Outside of regions it is as eager. Kernels that reach neither rate, gaps between them, and
waiting for other GPUs come on top: no GPU has run this yet.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import torch
import yaml

from bench.fake_cuda import CUDA, Operation, Recorder, fake_cuda
from engine_pretrain import Training, train_step
from main_lmim import view_source
from util.build import build_model, read_geometry, training_parts
from util.command import run_worker
from util.distributed import Ranks

MACHINES = yaml.safe_load((Path(__file__).parent / "machines.yaml").read_text())
LAUNCH = 3e-6  # seconds between two operations, at least
LARGEST = 10


def record_step(cfg, precision: str = "bf16") -> tuple[Training, Recorder]:
    """The second step of a run with this config: the first one makes the optimiser's state."""
    with fake_cuda() as recorder:
        ranks, geometry = Ranks(0, 1, CUDA), read_geometry(cfg)
        training = Training(**training_parts(cfg, build_model(cfg), ranks, precision))
        training.compile()
        draw_views = view_source(cfg, ranks, geometry)
        images = torch.empty(cfg.batch_size, 3, geometry.side, geometry.side, dtype=torch.uint8)
        train_step(training, repeat(images), draw_views, 0, 0.0)
        with recorder:
            train_step(training, repeat(images), draw_views, 1, 0.5)
    return training, recorder


def seconds_of(operation: Operation, machine: dict) -> float:
    rate = 1e12 * machine["practical"][operation.precision]
    return max(operation.flops / rate, operation.bytes / (1e12 * machine["practical_bandwidth"]))


def eager_seconds(operations: Iterable[Operation], machine: dict) -> float:
    return sum(max(LAUNCH, seconds_of(operation, machine)) for operation in operations)


def fused_bytes(operations: list[Operation]) -> dict[tuple[str, str], float]:
    """What is left to move for the fused operations of all regions, by part."""
    left: dict = defaultdict(float)
    readers = defaultdict(set)  # of each storage: the regions, None for products and what is eager
    for operation in operations:
        for key in operation.reads:
            readers[key].add(None if operation.flops else operation.region)
    passes = defaultdict(list)
    for operation in operations:
        if operation.region is not None and not operation.flops:
            passes[operation.region, operation.backward].append(operation)
    for (region, _), fused in passes.items():
        own = {key for operation in fused for key in operation.writes}
        moved: dict = {}
        for operation in fused:
            moved |= {("in", key): size for key, size in operation.reads.items() if key not in own}
            for key, size in operation.writes.items():
                if readers[key] - {region}:
                    moved["out", key] = size
        left[fused[0].part] += sum(moved.values())
    return left


def compiled_seconds(operations: list[Operation], machine: dict) -> dict[str, float]:
    """By part."""
    seconds: dict = defaultdict(float)
    for operation in operations:
        if operation.region is None:
            seconds[operation.part] += eager_seconds([operation], machine)
        elif operation.flops:
            seconds[operation.part] += seconds_of(operation, machine)
    for part, moved in fused_bytes(operations).items():
        seconds[part] += moved / (1e12 * machine["practical_bandwidth"])
    return seconds


def table(operations: list[Operation], micro_steps: int) -> Iterator[str]:
    times = " | ".join(f"{name} eager | compiled" for name in MACHINES)
    yield f"| per micro-step | operations | GB | TFLOP bf16 | fp32 | {times} |"
    yield "|---|" + "---:|" * (4 + 2 * len(MACHINES))
    bounds = {name: compiled_seconds(operations, machine) for name, machine in MACHINES.items()}
    for part in [*dict.fromkeys(operation.part for operation in operations), ""]:
        own = [operation for operation in operations if part in ("", operation.part)]
        low, full = (
            sum(o.flops for o in own if (o.precision == "fp32") == is_full) / 1e12
            for is_full in (False, True)
        )
        moved = sum(operation.bytes for operation in own) / 1e9
        cells = [f"{len(own) / micro_steps:.0f}", f"{moved / micro_steps:.1f}"]
        cells += [f"{low / micro_steps:.2f}", f"{full / micro_steps:.2f}"]
        for name, machine in MACHINES.items():
            bound = bounds[name][part] if part else sum(bounds[name].values())
            for seconds in (eager_seconds(own, machine), bound):
                cells.append(f"{1e3 * seconds / micro_steps:.1f} ms")
        yield f"| {part or 'all'} | {' | '.join(cells)} |"


def largest(operations: list[Operation], micro_steps: int) -> Iterator[str]:
    yield f"\n| the {LARGEST} that move most | line | part | | GB |\n|---|---|---|---|---:|"
    moved: dict = defaultdict(float)
    for o in operations:
        direction = "backward" if o.backward else "forward"
        moved[f"{o.name} {o.precision} | {o.line} | {o.part} | {direction}"] += o.bytes
    for what, size in sorted(moved.items(), key=lambda item: -item[1])[:LARGEST]:
        yield f"| {what} | {size / micro_steps / 1e9:.2f} |"


def costs(cfg, training: Training, recorder: Recorder, gpus: int, images: int) -> Iterator[str]:
    """What a whole run takes."""
    model = training.model
    stored = sum(tensor.numel() for tensor in model.state_dict().values()) * 4 / 1e9
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 / 1e9
    kept = recorder.kept / 1e9
    steps = images // (cfg.batch_size * cfg.accum_iter * gpus) * cfg.epochs
    yield (
        f"\nmemory of one GPU: weights {stored:.2f} GB, gradients {trained:.2f}, moments "
        f"{2 * trained:.2f}, what the backward pass needs {kept:.1f}: "
        f"{stored + 3 * trained + kept:.1f} GB\n"
        f"all-reduce: {trained:.2f} GB of gradients per step, "
        f"{2 * (gpus - 1) / gpus * trained:.2f} GB from and to each of {gpus} GPUs\n"
        f"{steps} steps of {gpus} x {cfg.batch_size} x {cfg.accum_iter} images, "
        f"{cfg.epochs} epochs of {images} images"
    )
    for name, machine in MACHINES.items():
        eager = eager_seconds(recorder.operations, machine)
        bound = sum(compiled_seconds(recorder.operations, machine).values())
        work = sum(o.flops / machine["peak"][o.precision] for o in recorder.operations) / 1e12
        for how, seconds in (("eager", eager), ("compiled", bound)):
            rate = cfg.batch_size * cfg.accum_iter / seconds
            yield (
                f"{name} {how}: at least {steps * seconds / 3600:.0f} h, loader {rate * gpus:.0f} "
                f"images/s ({rate:.0f} per GPU), {work / seconds:.0%} of the dense peak"
            )


def main(cfg) -> None:
    gpus = OWN["gpus"] or (cfg.env.ngpu or 1) * cfg.env.world_size
    precision = "bf16" if cfg.precision == "auto" else cfg.precision
    training, recorder = record_step(cfg, precision)
    micro_steps = cfg.accum_iter
    for lines in (
        table(recorder.operations, micro_steps),
        largest(recorder.operations, micro_steps),
        costs(cfg, training, recorder, gpus, OWN["images"]),
    ):
        print(*lines, sep="\n")


if __name__ == "__main__":
    OWN = {"gpus": 0, "images": 1281167}
    for text in sys.argv[1:]:
        if text.partition("=")[0] in OWN:
            sys.argv.remove(text)
            OWN[text.partition("=")[0]] = int(text.partition("=")[2])
    run_worker(main, __doc__)
