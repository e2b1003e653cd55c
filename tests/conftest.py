"""One thread per test process: small tensors gain nothing from more, and threads that share cores
with other processes make each other wait."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.pop("PYTHONUNBUFFERED", None)  # which users do not set
# Without it each process would compile all modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Read when torch is imported, and by what sets its threads itself (join_processes).
os.environ["OMP_NUM_THREADS"] = "1"


# Imported in fixtures: the process that only hands out tests to others needs no torch.
@pytest.fixture(scope="session", autouse=True)
def freed_memory_is_kept() -> None:
    from util.precision import keep_freed_memory

    keep_freed_memory()


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Those of a test that fails would train on next to all that follow."""
    from tests import runs

    yield
    while runs.STARTED:
        process = runs.STARTED.pop()
        if process.poll() is None:
            runs.kill(process)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def pytest_collection_modifyitems(items):
    """Files with many slow tests first, so that no process works on alone at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
