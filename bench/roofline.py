"""What a training step costs on a GPU, counted without one (bench/fake_cuda.py):

python -m bench.roofline                                          # the published recipe, 8 GPUs
python -m bench.roofline encoder=vit_large batch_size=64 gpus=64  # any other, in bf16
python -m bench.roofline --config-name=textures images=50000      # another config, and data set

eager: each operation takes the longest of its arithmetic, its bytes and 3 microseconds.
compiled: a lower bound of compile=True. Matrix products and attention are as they were. All else in
one call of compiled code is fused, forward and backward each: it reads once what others have
written, writes what others read, and its arithmetic is free; what only its own backward pass reads
is not written but made again. Outside of compiled code it is as eager. On top comes what keeps
kernels below both rates (util/machines.yaml), and waiting for other GPUs. No GPU has run this yet.
"""

from collections import Counter, defaultdict

import yaml
from omegaconf import OmegaConf

from bench.fake_cuda import CUDA, Operation, Recorder, fake_cuda
from bench.step import build_training, run_bench, step_of
from util.build import Training
from util.distributed import Ranks
from util.metrics import MACHINES

GPUS = yaml.safe_load(MACHINES.read_text())
LAUNCH = 3e-6  # seconds between two operations, at least
LARGEST = 10


def record_step(cfg, precision: str) -> tuple[Training, Recorder]:
    """The second step of a run: the first one makes the optimiser's state."""
    with fake_cuda() as recorder:
        ranks = Ranks(0, 1, CUDA)
        training = build_training(OmegaConf.merge(cfg, {"compile": True}), ranks, precision)
        step = step_of(cfg, training, ranks)
        step(0)
        recorder.kept.clear()
        with recorder:
            step(1)
    return training, recorder


def left_when_fused(operations: list[Operation]) -> list[int]:
    """Of each operation the bytes that are left to move in compiled code."""
    readers, seen, left = defaultdict(set), defaultdict(set), []
    for operation in operations:
        for key in operation.reads:
            readers[key].add(None if operation.flops else operation.region)
    for operation in operations:
        reads, writes, region = operation.reads, operation.writes, operation.region
        if region is None or operation.flops:
            left.append(operation.bytes)
            continue
        known = seen[region, operation.backward]
        moved = sum(size for key, size in reads.items() if key not in known)
        left.append(moved + sum(size for key, size in writes.items() if readers[key] - {region}))
        known |= reads.keys() | writes.keys()
    return left


def seconds(operation: Operation, machine: dict, left: int | None = None) -> float:
    """left: bytes, in compiled code."""
    moved = operation.bytes if left is None else left
    work = operation.flops / machine["practical"][operation.precision]
    least = LAUNCH if left is None or operation.region is None else 0
    return max(least, work / 1e12, moved / 1e12 / machine["practical_bandwidth"])


def add_up(operations: list[Operation], machines: dict, micro_steps: int) -> dict[str, Counter]:
    """By part, and of all, per micro-step."""
    sums: dict[str, Counter] = defaultdict(Counter)
    for operation, left in zip(operations, left_when_fused(operations), strict=True):
        work = operation.flops / 1e12
        found = {"operations": 1, "GB": operation.bytes / 1e9, "TFLOP": work}
        found["in fp32"] = work if operation.precision == "fp32" else 0
        for name, machine in machines.items():
            found[f"{name} eager ms"] = 1e3 * seconds(operation, machine)
            found[f"{name} compiled ms"] = 1e3 * seconds(operation, machine, left)
        for row in (operation.part, "all"):
            sums[row].update({key: value / micro_steps for key, value in found.items()})
    return dict(sorted(sums.items(), key=lambda item: (item[0] == "all", item[0])))


def show(head: list[str], rows: dict[str, list[float]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * (len(head) - 1)}---:|")
    for name, cells in rows.items():
        print(f"| {' | '.join([name, *(f'{cell:.4g}' for cell in cells)])} |")


def show_costs(
    cfg, training: Training, recorder: Recorder, sums: Counter, gpus: int, images: int
) -> None:
    gpus = gpus or (cfg.env.ngpu or 1) * cfg.env.world_size
    made = {storage._cdata for storage in recorder.made}
    kept = sum(size for key, size in recorder.kept.items() if key in made) / cfg.accum_iter / 1e9
    sizes = [(4e-9 * p.numel(), p.requires_grad) for p in training.model.parameters()]
    weights, trained = sum(size for size, _ in sizes), sum(size * used for size, used in sizes)
    print(
        f"\nmemory: weights {weights:.2f} GB, gradients {trained:.2f}, moments {2 * trained:.2f}, "
        f"for the backward pass {kept:.1f}: {weights + 3 * trained + kept:.1f} GB\n"
        f"all-reduce: {trained:.2f} GB of gradients per step among {gpus} GPUs\n"
        f"{cfg.epochs} epochs of {images} images, at least:"
    )
    steps = cfg.epochs * (images // (cfg.batch_size * cfg.accum_iter * gpus))
    for name, machine in GPUS.items():
        for how in ("eager", "compiled"):
            value = sums[f"{name} {how} ms"]
            rate, hours = 1e3 * cfg.batch_size * gpus / value, value * steps * cfg.accum_iter / 36e5
            share = 1e3 * sums["TFLOP"] / value / machine["peak"][training.precision]
            print(
                f"{name} {how}: {hours:.1f} h, {rate:.0f} images/s to load, {share:.0%} of the peak"
            )


def main(cfg, gpus: int, images: int) -> None:
    """gpus: 0, as many as the config says. images: of the data set."""
    precision = "bf16" if cfg.precision == "auto" else cfg.precision
    training, recorder = record_step(cfg, precision)
    sums = add_up(recorder.operations, GPUS, cfg.accum_iter)
    show(["per micro-step", *sums["all"]], {row: list(sums[row].values()) for row in sums})
    moved: Counter[str] = Counter()
    for o in recorder.operations:
        direction = "backward" if o.backward else "forward"
        what = f"{o.part} {direction} | {o.name} {o.precision} | {o.line}"
        moved[what] += o.bytes / cfg.accum_iter / 1e9
    rows = {what: [size] for what, size in moved.most_common(LARGEST)}
    show([f"the {LARGEST} that move most", "operation", "line", "GB"], rows)
    show_costs(cfg, training, recorder, sums["all"], gpus, images)


if __name__ == "__main__":
    run_bench(main, __doc__, gpus=0, images=1281167)
