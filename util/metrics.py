"""Numbers of a run: sums that stay on the device until they are read, speed, memory."""

import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from torch import Tensor

from util.distributed import Ranks, gather_objects

MOST_WAITING = 0.05  # of the time; more is a warning
MACHINES = Path(__file__).with_name("machines.yaml")


class DeviceMeters:
    """Sums since the last log point, on the device. Only `read` waits for it."""

    def __init__(self, device: torch.device, names: Sequence[str]):
        self.names = names
        self.sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self.grad_norm, self.step_loss = torch.zeros(2, dtype=torch.float64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64)  # micro-steps and steps
        # Since the start of the process. The loss is this rank's own; the gradient is common.
        bad = torch.zeros(3, dtype=torch.int64, device=device)
        self.bad_steps, self.first_bad_step, self.bad_in_a_row = bad

    def add_micro_step(self, metrics: Tensor) -> None:
        self.sums += metrics
        self.step_loss += metrics[0]
        self.counts[0] += 1

    def add_step(self, step: int, grad_norm: Tensor, most_in_a_row: int = 0) -> None:
        """A bad gradient is a fault only after more than most_in_a_row in a row."""
        self.bad_in_a_row = (self.bad_in_a_row + 1) * ~grad_norm.isfinite()
        is_bad = (self.bad_in_a_row > most_in_a_row) | ~self.step_loss.isfinite()
        self.first_bad_step += (is_bad & (self.bad_steps == 0)) * step
        self.bad_steps += is_bad
        self.step_loss.zero_()
        self.grad_norm += grad_norm.nan_to_num(0.0, 0.0)  # of a step that was left out
        self.counts[1] += 1

    def read(self, keep: bool = False) -> dict[str, float]:
        """Means since the last call, on this rank; then start again, or keep the sums."""
        micro_steps, steps = self.counts.clamp(min=1).tolist()
        values = torch.cat([self.sums / micro_steps, self.grad_norm[None] / steps]).tolist()
        if not keep:
            for tensor in (self.sums, self.grad_norm, self.counts):
                tensor.zero_()
        return dict(zip((*self.names, "grad_norm"), values, strict=True))


class Speed:
    """Images per second, share of the time spent waiting for data, and time left."""

    def __init__(self):
        self.start = time.perf_counter()
        self.waited = 0.0

    def clock(self) -> tuple[float, float]:
        """Seconds of training so far, and how many of them were spent waiting for data."""
        return time.perf_counter() - self.start, self.waited

    def timed(self, batches: Iterator) -> Iterator:
        """Pass batches through; the time until each is there counts as waiting."""
        start = time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def since(self, then: tuple[float, float], steps: int, images_per_step: int, left: int) -> dict:
        """The speed of the steps since the clock said `then`. left: steps"""
        seconds, waited = (now - before for now, before in zip(self.clock(), then, strict=True))
        return {
            "images_per_second": steps * images_per_step / seconds,
            "data_wait": waited / seconds,
            "eta_seconds": left * seconds / steps,
        }

    @contextmanager
    def pause(self):
        """Time spent inside (an evaluation) counts neither as training nor as waiting."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start


def dense_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of matrix products by the data sheet; None where machines.yaml has none."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    machines = yaml.safe_load(MACHINES.read_text()).values()
    peaks = (1e12 * machine["peak"][precision] for machine in machines if name in machine["names"])
    return next(peaks, None)


def memory_in_use(device: torch.device) -> float:
    """Peak, in GB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def describe_nodes(ranks: Ranks) -> str:
    """The devices of each node, and how much memory was used. All processes together."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    is_gpu = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if is_gpu else "cpu"
    found = gather_objects((node, name, memory_in_use(ranks.device)), ranks)
    counts = Counter((node, name) for node, name, _ in found)
    nodes = ", ".join(f"{node}: {count} x {name}" for (node, name), count in counts.items())
    return f"{nodes}; {max(gb for *_, gb in found):.1f} GB at most per process"


def readable_time(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))  # 2 days, 1:01:01


def describe_speed(speed: dict[str, float]) -> str:
    share = f"{speed['share_of_peak']:.0%} of peak  " if "share_of_peak" in speed else ""
    images, eta = speed["images_per_second"], readable_time(speed["eta_seconds"])
    return f"{images:.0f} images/s  {share}waiting {speed['data_wait']:.0%}  eta {eta}"


def warn_of_supply(speed: dict[str, float], processes: int, workers: int) -> str | None:
    """Return a warning where steps wait too long for images, else nothing."""
    images, waiting = speed["images_per_second"], speed["data_wait"]
    if waiting <= MOST_WAITING:
        return None
    could = f"{images:.1f} images/s where steps could take {images / (1 - waiting):.1f}"
    remedy = "more of them are num_workers, on Slurm env.workers (cores of a process)"
    return f"warning: {processes} x {workers} loader processes give {could}; {remedy}"


def bar_text(summary: str, speed: dict[str, float]) -> str:
    """Short, for a terminal of 80 columns."""
    return f"{' '.join(summary.split()[:2])}  {describe_speed(speed)} "
