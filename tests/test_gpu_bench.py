"""What needs a GPU, run on a CPU; and what the driver makes of parts that fail. This module has the
parts that are planted."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import gpu
from tests.forked import ROOT

pytestmark = pytest.mark.slow
OTHER_SIZES = ("small", "large")
# In a process of its own: the server that forks parts is not that of the tests.
PROGRAM = """
import sys
from bench import gpu
from bench.gpu import Part
if __name__ == "__main__":
    gpu.PARTS = {parts}
    gpu.NEEDED |= {needed}
    sys.exit(gpu.main())
"""


def rows_of(part: str, device: str, small: bool) -> Iterator[dict]:
    yield {"what": "before", "number": 0.5}
    if part == "raises":
        raise ValueError("planted | here")
    if part == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if part == "hangs":
        time.sleep(600)
    if part == "imports":
        import tiny

        yield {"what": tiny.VALUE}


def run_gpu(folder: Path, parts: object, *options: str, needed: dict | None = None) -> tuple:
    """-> exit code, what it printed, rows by part, page"""
    program, out = folder / "program.py", folder / "out"
    program.write_text(PROGRAM.format(parts=parts, needed=needed or {}))
    command = [sys.executable, str(program), "--out", str(out), "--device", "cpu", "--small"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    if not (out / "gpu.json").exists():
        return run.returncode, run.stdout + run.stderr, {}, ""
    found = json.loads((out / "gpu.json").read_text())
    page = (out / "gpu-results.md").read_text()
    return run.returncode, run.stdout + run.stderr, found["parts"], page


def planted(**limits: float) -> list[gpu.Part]:
    return [gpu.Part(name, limit, "tests.test_gpu_bench") for name, limit in limits.items()]


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path):
    code, output, parts, page = run_gpu(tmp_path, planted(raises=60, crashes=60, hangs=2, good=60))
    assert code == 1, output
    assert [len(rows) for rows in parts.values()] == [2, 2, 2, 1]
    failed = [rows[-1].get("failed") for rows in parts.values()]
    assert failed[:2] == ["ValueError: planted | here", "crashed: SIGSEGV"]
    assert failed[2:] == ["not done after 2 s", None]
    assert "Failed or not run: 3." in page and "| ValueError: planted / here |" in page
    assert "planted | here" in (tmp_path / "out/logs/raises.log").read_text()


def test_where_no_time_is_left_nothing_is_started(tmp_path):
    code, output, parts, _ = run_gpu(tmp_path, planted(hangs=60, good=60), "--minutes=0.1")
    assert code == 1, output
    failed = [row["failed"] for rows in parts.values() for row in rows]
    assert failed == ["not run: no time left"] * 2


def test_wheels_are_installed_where_a_package_is_missing(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    about = "tiny-1.0.dist-info"
    with zipfile.ZipFile(wheels / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "VALUE = 'installed'\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    (wheels / "numpy-1.0-py3-none-any.whl").touch()  # there is one: left alone
    (wheels / "broken-1.0-py3-none-any.whl").touch()
    options, parts = ["--wheels", str(wheels)], planted(imports=60)
    code, output, rows, _ = run_gpu(tmp_path, parts, *options, needed={"tiny": "tiny"})
    assert code == 1, output
    assert rows["imports"][-1]["what"] == "installed", output
    broken, tiny = rows["packages"]
    assert tiny == {"what": "tiny-1.0-py3-none-any.whl"}
    assert "broken" in broken["what"] and "broken" in broken["failed"]

    code, output, _, _ = run_gpu(tmp_path, parts, *options, needed={"none": "no-such-package"})
    assert code == 2
    assert output == f"error: --wheels={wheels}: expected wheels of no-such-package\n"


@pytest.mark.timeout(900)
def test_every_part_passes_on_a_cpu(tmp_path):
    # The other two sizes are what vit_base is.
    parts = [part._replace(limit=600) for part in gpu.PARTS if part.name[4:] not in OTHER_SIZES]
    code, output, found, page = run_gpu(tmp_path, parts, "--minutes=14")
    assert code == 0, output
    assert list(found) == [part.name for part in parts] and "A test" in page
    assert all("what" in row for rows in found.values() for row in rows)
    assert found["waits"][0]["found"] == "needs CUDA"
    assert found["resume"][1]["bit for bit"] and found["search"][0]["as in float64"] == "10 of 10"
    errors = [row["final_weights"] for row in found["golden"]]  # of fp32, bf16, fp32, bf16
    assert max(errors[::2]) < 5e-5 and min(errors[1::2]) > 1e-4 and len(errors) == 4
