"""tests/gpu/ without a GPU: what its page says of parts that pass, fail and end their process."""

import sys
from types import SimpleNamespace

import pytest

from tests.gpu import conftest
from tests.runs import ROOT, finish, start_process

PROGRAM = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
PLANTED = """
def test_wrong(row):
    row["measured"] = 0.5
    assert row["measured"] == 1, "planted | here"
"""


@pytest.mark.slow
def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path):
    program, page = tmp_path / "program.py", tmp_path / "page.md"
    program.write_text(PROGRAM)
    (tmp_path / "test_planted.py").write_text("from tests.gpu.conftest import row\n" + PLANTED)
    parts = "wrong or search or golden and plain"
    options = ["-c", str(ROOT / "pyproject.toml"), "-n0", "--small", f"--page={page}", "-k", parts]
    tests = [str(tmp_path / "test_planted.py"), "tests/gpu"]
    code, output = finish(start_process([sys.executable, str(program), *options, *tests]))
    assert code == 1 and "1 failed, 3 passed" in output, output
    text = page.read_text()
    assert "**A test: nothing here is measured.**" in text and "Failed or not run: 1 of 4." in text
    assert "AssertionError: planted / here" in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    found = {row[0]: row[1:] for row in rows}
    assert found["search"][3] == "10 of 10"
    assert found["regression_plain-bf16"][:2] == ["0.03", "0.1"]  # the limits


def test_a_process_that_ends_and_a_test_that_is_not_run_are_rows(tmp_path):
    page = conftest.Page(tmp_path / "page.md", small=False)
    page.pytest_xdist_node_collection_finished(None, ["gpu.py::test_a", "gpu.py::test_b[1-x]"])
    crash = {"when": "???", "longrepr": "worker 'gw0' crashed while running 'gpu.py::test_a'"}
    report = {"nodeid": "gpu.py::test_a", "failed": True, "user_properties": [], "duration": 0}
    page.pytest_runtest_logreport(SimpleNamespace(**report, **crash))
    text = page.path.read_text()
    assert "Failed or not run: 2 of 2." in text and "nothing here is measured" not in text
    assert "| a | 0 | worker 'gw0' crashed" in text and "| 1-x | not run |" in text


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = SimpleNamespace(option=SimpleNamespace(small=False))
    with pytest.raises(pytest.exit.Exception, match="make test-gpu needs a GPU"):
        conftest.pytest_configure(config)
