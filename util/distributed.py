"""Ranks, their devices, and the collective operations."""

import ctypes
import multiprocessing
import os
import re
import signal
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

# A rank gives up waiting after this long, so that a lost rank ends the job.
TIMEOUT = timedelta(minutes=10)
SIGN_OF_LIFE = 60  # seconds, while the others wait for what rank 0 alone does
ROWS = 65536  # that are sent at a time: bounds the memory
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_slurm_step() -> None:
    """The tasks of an srun are processes of one run, unless torchrun has said who is who. Of the
    step, not of the job: what a batch script starts without srun is alone."""
    names = [name for name in os.environ if name.startswith("SLURM_")]
    step = {name.removeprefix("SLURM_"): os.environ[name] for name in names}
    if "RANK" in os.environ or int(step.get("STEP_NUM_TASKS", 1)) == 1:
        return
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", step["STEP_TASKS_PER_NODE"])  # 2(x3),1
    per_node = [count for count, times in counts for _ in range(int(times or 1))]
    first_node = re.sub(r"\[(\w+)[^]]*\]", r"\1", step["STEP_NODELIST"]).split(",")[0]
    port = 20000 + (int(step["JOB_ID"]) + 997 * int(step["STEP_ID"])) % 40000
    os.environ |= {
        "RANK": step["PROCID"],
        "LOCAL_RANK": step["LOCALID"],
        "WORLD_SIZE": step["STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": per_node[int(step["NODEID"])],
    }
    # A node need not know its own name.
    os.environ.setdefault("MASTER_ADDR", first_node if len(per_node) > 1 else "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(port))


def join_processes() -> Ranks:
    """Join the others through env://, which torchrun sets, or as Slurm says; alone where neither
    does."""
    read_slurm_step()
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        # Slurm may have given each process a GPU of its own, and then it sees no others.
        device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        # Processes that each use all cores are ten times slower. A user's setting counts; with
        # several processes it is torchrun's, which is 1.
        if processes > 1 or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, own_cores(processes)))
    if "TORCHELASTIC_RUN_ID" in os.environ or multiprocessing.parent_process() is not None:
        end_with_parent()
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
        # torchrun's own store outlives its processes: it still has the addresses of those that are
        # started again.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            backend,
            timeout=TIMEOUT,
            store=dist.PrefixStore(f"start {start}", store),
            rank=rank,
            world_size=world_size,
            device_id=device if backend == "nccl" else None,  # which NCCL would have to guess
        )
        # A rank that finds an error at once must not leave while others are still connecting: they
        # would report a crash.
        dist.barrier()
    return Ranks(rank, world_size, device)


def end_with_parent() -> None:
    """Ask the kernel for a TERM when the parent dies (Linux only): after a kill -9 of torchrun or
    the launcher its processes would otherwise train on, alongside those of the next start."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def own_cores(processes: int) -> int:
    """Cores of each process. Slurm may have bound each to its own, and then it sees no others."""
    visible = len(os.sched_getaffinity(0))
    given = int(os.environ.get("SLURM_CPUS_PER_TASK", 0))
    return max(visible // processes, min(visible, given))


def default_workers() -> int:
    """Loader processes per training process: one for each of its cores but one."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(16, max(0, own_cores(processes) - 1))


def synchronised(model: nn.Module, ranks: Ranks) -> nn.Module:
    """DistributedDataParallel around the model; the model itself in a single process."""
    if ranks.world_size == 1:
        return model
    constant = [name for name, _ in model.named_buffers()]  # need not be sent at each step
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, constant)
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def leave_processes() -> None:
    """After success only: after an error in one process NCCL would wait here for the others, and
    the error would never be shown."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce(values: torch.Tensor) -> torch.Tensor:
    """In place: the sum over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast_object(value, ranks: Ranks):
    """Return the value of rank 0 in all processes."""
    if not dist.is_initialized():
        return value
    box = [value if ranks.is_main else None]
    dist.broadcast_object_list(box, device=ranks.device)
    return box[0]


def broadcast_tensors(value, ranks: Ranks):
    """Return the nested dicts and lists of rank 0 in all processes: tensors are sent one by one, to
    the CPU of each."""
    if ranks.world_size == 1:
        return value
    outline = broadcast_object(tree_map_only(torch.Tensor, lambda t: t.to("meta"), value), ranks)

    def send(tensor: torch.Tensor) -> torch.Tensor:
        buffer = torch.empty_like(tensor, device=ranks.device)
        dist.broadcast(buffer.copy_(tensor) if ranks.is_main else buffer, 0)
        return tensor if ranks.is_main else buffer.cpu()

    return tree_map_only(torch.Tensor, send, value if ranks.is_main else outline)


def on_main(function, ranks: Ranks):
    """Return what rank 0's call returns; an error that it raises is raised by all. It may take
    longer than TIMEOUT."""
    if not dist.is_initialized():
        return function()
    result = error = None
    calls = [futures.ThreadPoolExecutor(1).submit(function)] if ranks.is_main else []
    while not broadcast_object(not futures.wait(calls, SIGN_OF_LIFE).not_done, ranks):
        pass
    for call in calls:
        error = call.exception()
        result = None if error else call.result()
    result, error = broadcast_object((result, error), ranks)
    if error is not None:
        raise error
    return result


def gather_objects(value, ranks: Ranks) -> list:
    """Return the values of all processes, by rank, in all of them."""
    if not dist.is_initialized():
        return [value]
    boxes = [None] * ranks.world_size
    dist.all_gather_object(boxes, value)
    return boxes


def sum_rows(rows: torch.Tensor, ranks: Ranks) -> None:
    """In place, on the CPU: the sum over all processes."""
    for part in rows.split(ROWS):
        part.copy_(all_reduce(part.to(ranks.device)))
