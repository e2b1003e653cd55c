"""make test-gpu: each test is a row of one page, also one that fails or ends its process.

The tests run in a second process (pytest-xdist with -n1). Where one crashes it, or pytest-timeout
ends it, a new process goes on with the next test. The page is written again after each row.
"""

import gc
import json
import os
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench import step
from util.distributed import Ranks, join_processes

NOT_RUN = "not run"


def pytest_addoption(parser):
    parser.addoption("--page", type=Path, default=Path("gpu-results.md"), help="what was measured")
    help = "tiny sizes, without a GPU: a test of the tests, which measures nothing"
    parser.addoption("--small", action="store_true", help=help)


def pytest_configure(config):
    is_worker = hasattr(config, "workerinput")
    if not config.option.small and not torch.cuda.is_available():
        pytest.exit("make test-gpu needs a GPU, and torch has found none", returncode=1)
    if not is_worker and not config.option.collectonly:
        config.pluginmanager.register(Page(config.option.page, config.option.small))


class Page:
    def __init__(self, path: Path, small: bool):
        self.path, self.small = path, small
        self.rows: dict[str, dict] = {}  # by test, in the order in which they run

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        for test in ids:
            self.rows.setdefault(test, {"failed": NOT_RUN})

    def pytest_runtest_logreport(self, report):
        before = self.rows.get(report.nodeid, {}).get("failed", NOT_RUN)
        if before != NOT_RUN or not (report.failed or report.when == "call"):
            return
        row = json.loads(dict(report.user_properties).get("row", "{}"))
        row["seconds"] = round(report.duration, 1)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)  # else its process has ended
            words = (crash.message if crash else str(report.longrepr)).split()
            row["failed"] = " ".join(words)[:200]
        self.rows[report.nodeid] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.text())

    def text(self) -> str:
        failed = sum("failed" in row for row in self.rows.values())
        text = "# Measured on a GPU\n\n```bash\nmake test-gpu\n```\n\n"
        text += "**A test: nothing here is measured.** " if self.small else ""
        text += f"{date.today()}. Failed or not run: {failed} of {len(self.rows)}.\n"
        tables: dict[str, list[dict]] = {}
        for test, row in self.rows.items():
            name, _, case = test.rpartition("::")[2].removeprefix("test_").partition("[")
            tables.setdefault(name, []).append({"what": case.removesuffix("]") or name} | row)
        for name, rows in tables.items():
            text += f"\n## {name.replace('_', ' ')}\n\n{table(rows)}"
        return text


def table(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[shown(row.get(name, "")) for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in [names, ["---"] * len(names), *cells])


def shown(value: object) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "/")


class Bench(NamedTuple):
    ranks: Ranks
    small: bool

    def size(self, full, small):
        return small if self.small else full

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def precision(self) -> str:
        return self.size("bf16", "fp32")


@pytest.fixture(scope="session")
def bench(pytestconfig) -> Bench:
    return set_up(pytestconfig.option.small)


def set_up(small: bool) -> Bench:
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
    if small:
        step.MATRIX_SIDES = {"cpu": (128,)}
        torch.compile = partial(torch.compile, backend="aot_eager")  # building C++ takes minutes
    return Bench(join_processes(), small)


def pytest_runtest_makereport(item):
    """The report is sent to the process that has the page."""
    row = json.dumps(item.funcargs.get("row", {}), default=str)
    item.user_properties[:] = [("row", row)]


@pytest.fixture(autouse=True)
def row() -> Iterator[dict]:
    """What a test adds to it is its row of the page."""
    yield {}
    torch._dynamo.reset()
    gc.collect()  # what is compiled and what it belongs to hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # after a fault the GPU answers this process no more
            os._exit(1)
