"""The rules of docs/design.md that can be read off the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = subprocess.check_output(["git", "ls-files", "*.py"], cwd=ROOT, text=True).split()
BELOW_ALL = ("util.streams", "util.files", "util.signals")
MAY_IMPORT = {
    "models": {"models"},
    "data": {"data"},
    "launch": {"launch", "data"},
    "util": {"util", "launch", "data", "models"},
    "engine_pretrain": {"util", "models"},
    "eval": {"eval", "util", "launch", "data", "models"},
    "main_lmim": {"engine_pretrain", "eval", "util", "launch", "data", "models"},
    "launcher": {"launch"},
    "bench": {"bench", "main_lmim", "engine_pretrain", "eval", "util", "launch", "data", "models"},
    "figs": set(),
}


def imported(path: str) -> set[str]:
    """Modules of this project, also those that are imported inside functions."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] in {*MAY_IMPORT, "tests"}}


def test_no_import_runs_upward():
    upward = {
        f"{path} imports {name}"
        for path in FILES
        if (package := path.split("/")[0].removesuffix(".py")) in MAY_IMPORT
        for name in imported(path)
        if name.split(".")[0] not in MAY_IMPORT[package] and not name.startswith(BELOW_ALL)
    }
    assert upward == set()


@pytest.mark.parametrize("name", BELOW_ALL)
def test_what_all_may_import_imports_nothing_of_the_project(name):
    assert imported(f"{name.replace('.', '/')}.py") == set()


def test_the_launcher_needs_no_torch():
    modules = [path.removesuffix(".py").replace("/", ".") for path in FILES if "launch" in path]
    without = [name for name in modules if name.startswith("launch") and name != "launch.local"]
    assert {"launcher", "launch.slurm", "launch.results"} < set(without)
    code = f"import sys, {', '.join(without)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
