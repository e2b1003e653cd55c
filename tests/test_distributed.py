"""Several processes: one all-reduce per step, and how they exchange numbers."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import data.files
import util.distributed
from bench.loader import write_photos
from data.base import DataError
from data.files import list_folder
from engine_pretrain import train_step
from launch.config import compose_config
from tests.test_engine import build_training, draw
from util.build import open_split
from util.distributed import (
    Ranks,
    all_reduce,
    broadcast_object,
    broadcast_tensors,
    default_workers,
    gather_objects,
    on_main,
    read_slurm_step,
    sum_rows,
)

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


def spawn(function, processes: int, folder, *arguments) -> None:
    """Run function(ranks, *arguments) in real processes that talk through gloo."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    inner = (function, processes, rendezvous, *arguments)
    multiprocessing.start_processes(start, inner, processes, start_method="forkserver")


def start(rank: int, function, processes: int, rendezvous: str, *arguments) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    function(Ranks(rank, processes, CPU), *arguments)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("visible", "processes", "given", "workers"),
    [(96, 8, None, 11), (2, 2, None, 0), (1, 1, None, 0), (80, 8, 10, 9), (10, 8, 10, 9)],
)
def test_loader_processes_are_counted_from_the_cores(
    monkeypatch, visible, processes, given, workers
):
    """Also where Slurm has bound each process to its own cores (the last case)."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(visible)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if given:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(given))
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("nodes", "tasks", "node", "given", "expected"),
    [
        ("gpu[07-08,11]", "2(x2),1", 2, {}, "4 0 5 1 gpu07 20501"),
        ("a[1-2]-b[3,5],c", "1(x3)", 1, {"MASTER_ADDR": "here"}, "4 0 3 1 here 20501"),
        ("nameless", "3", 0, {"MASTER_PORT": "7"}, "4 0 3 3 127.0.0.1 7"),
    ],
)
def test_ranks_are_read_from_a_step_of_srun(monkeypatch, nodes, tasks, node, given, expected):
    world = {"gpu[07-08,11]": "5"}.get(nodes, "3")
    step = {"STEP_NUM_TASKS": world, "STEP_TASKS_PER_NODE": tasks, "STEP_NODELIST": nodes}
    step |= {"STEP_ID": "1", "JOB_ID": "39504", "PROCID": "4", "LOCALID": "0", "NODEID": str(node)}
    variables = {f"SLURM_{name}": value for name, value in step.items()} | given
    monkeypatch.setattr("os.environ", variables)
    read_slurm_step()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert " ".join(map(variables.get, names)) == expected


def count_reductions(ranks: Ranks, folder) -> None:
    training = build_training(accum_iter=2)
    training.network = DistributedDataParallel(training.model, broadcast_buffers=False)
    reduced = []

    def counting_hook(group, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(group, bucket)

    training.network.register_comm_hook(dist.group.WORLD, counting_hook)
    images, views = draw(ranks.rank, 4)
    before_each = []

    def draw_views(step: int, micro_step: int, batch_size: int):
        before_each.append(len(reduced))
        return views

    batches = iter([images] * 4)
    for step in range(2):
        train_step(training, batches, draw_views, step, epoch=0.0)
    torch.save([*before_each, len(reduced)], folder / f"reductions{ranks.rank}")


def test_gradients_travel_only_at_the_last_micro_step(tmp_path):
    spawn(count_reductions, 2, tmp_path, tmp_path)
    start, first, second, third, fourth = torch.load(tmp_path / "reductions0")
    assert start == first == 0
    assert second > 0
    assert third == second
    assert fourth > third


def open_both(ranks: Ranks, folder, name: str) -> None:
    """A marker for each folder that this process lists; then one that is not there."""

    def listing(path, *others):
        (folder / f"listed by {ranks.rank}: {Path(path).name}").touch()
        return list_folder(path, *others)

    data.files.list_folder = listing
    found = []
    for data_path in (folder / "photos", folder / "nowhere"):
        cfg = compose_config("demo", [f"dataset={name}", f"data_path={data_path}"])
        try:
            dataset = open_split(cfg, "train", ranks)
            labels = None if dataset.labels is None else dataset.labels.tolist()
            found += [*map(dataset.describe, range(len(dataset))), labels]
        except DataError as error:
            found.append(str(error))
    torch.save(found, folder / f"found{ranks.rank}")


@pytest.mark.parametrize("name", ["imagefolder", "images"])
def test_one_process_lists_the_files_for_all(tmp_path, name):
    write_photos(tmp_path / "photos", 3)
    spawn(open_both, 2, tmp_path, tmp_path, name)
    first, second = (torch.load(tmp_path / f"found{rank}") for rank in range(2))
    assert first == second and len(first) == 5 and "nowhere is not a folder" in first[-1]
    listed = {path.name for path in tmp_path.glob("listed*")}
    assert "listed by 0: class2" in listed and all("by 0:" in name for name in listed)


def exchange(ranks: Ranks, folder) -> None:
    util.distributed.ROWS = 4  # at a time
    rows = torch.zeros(9, 1)
    own = (slice(0, 2), slice(2, 6), slice(6, 9))[ranks.rank]
    rows[own, 0] = torch.arange(own.start, own.stop) + 10.0 * ranks.rank
    sum_rows(rows, ranks)
    state = {
        "a": [torch.arange(6).reshape(2, 3).T, "text"],
        4: {"b": torch.tensor(0.5)},
        "none": None,
    }
    sent = broadcast_tensors(state if ranks.is_main else None, ranks)
    result = {
        "sent": str(sent) == str(state),
        "rows": rows.flatten().tolist(),
        "objects": gather_objects({"rank": ranks.rank}, ranks),
        "broadcast": broadcast_object(f"from {ranks.rank}", ranks),
        "sum": all_reduce(torch.tensor(ranks.rank + 1.0)).item(),
    }
    torch.save(result, folder / f"result{ranks.rank}")


def test_exchange_between_three_processes(tmp_path):
    spawn(exchange, 3, tmp_path, tmp_path)
    for rank in range(3):
        assert torch.load(tmp_path / f"result{rank}") == {
            "sent": True,
            "rows": [0, 1, 12, 13, 14, 15, 26, 27, 28],
            "objects": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "broadcast": "from 0",
            "sum": 6.0,
        }


def fail_late(ranks: Ranks) -> None:
    util.distributed.SIGN_OF_LIFE = 0.5
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=4), dist.group.WORLD)

    def work() -> str:
        time.sleep(6)
        raise DataError(f"found by {ranks.rank}")

    with pytest.raises(DataError, match="found by 0"):
        on_main(work, ranks)


def test_the_others_wait_for_the_first_however_long_it_takes(tmp_path):
    spawn(fail_late, 2, tmp_path)
