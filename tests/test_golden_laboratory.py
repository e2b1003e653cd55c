"""The numbers of other methods' original code, and the command that checks them."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden_laboratory.replay import KINDS
from tests.test_golden import scale_arrays

GOLDEN = Path(__file__).parent / "golden" / "laboratory"


@pytest.fixture
def check(monkeypatch, capsys):
    """`python -m tests.golden_laboratory` in this process. -> exit status, lines"""

    def run(folder: Path) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["tests.golden_laboratory", str(folder)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("tests.golden_laboratory", run_name="__main__")
        return stop.value.code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def copy_of(tmp_path):
    def copy(name: str, new_name: str = "") -> Path:
        for suffix in (".json", ".npz"):
            shutil.copy(GOLDEN / (name + suffix), tmp_path / ((new_name or name) + suffix))
        return tmp_path / f"{new_name or name}.npz"

    return copy


@pytest.mark.slow
def test_the_numbers_of_the_original_code_are_reproduced(check):
    status, (*lines, last) = check(GOLDEN)
    assert status == 0
    assert [line.split(":")[0] for line in lines] == sorted(KINDS)
    assert all(line.endswith(": ok") for line in lines)
    assert last == "compared 179 arrays in 6 files"


OFF = 1 + 5e-5
PLANTED = {
    "pixel_mae": {"patches": OFF, "loss/norm": OFF, "grad/raw": OFF},
    "projection_target": {"targets": OFF, "init_stats": [1.05, 1, 1, 1, 1, 1]},
    "topk_average": dict.fromkeys(
        ["targets/d2v1_recipe", "loss/d2v2_recipe", "grad/d2v1_batch"], OFF
    ),
    "patch_discrimination": dict.fromkeys(
        ["loss/galileo_all/varied/unit1/tau0.1", "grad/olmoearth_masked/equal/unit0/tau0.2"], OFF
    ),
    "sigreg": dict.fromkeys(
        ["univariate/statistic", "sliced/t3/step0/grad", "minimal/loss", "ranks/grad1"], OFF
    ),
}
PLANTED_SLOW = {
    "block_masks": {
        "inverse/176/visible_map": 1.3,
        "block_roll/69/visible_neighbours": 1.02,
        "block/69/extent": [[1, 1, 3]] + 6 * [[1, 1, 1]],  # how often the first box
    },
}


@pytest.mark.parametrize(
    "planted", [PLANTED, pytest.param(PLANTED_SLOW, marks=pytest.mark.slow)], ids=["fast", "slow"]
)
def test_each_number_that_is_off_is_named(copy_of, check, planted):
    """Under other names, by which more of the same are known."""
    for name, factors in planted.items():
        path = copy_of(name, f"{name}_held")
        scale_arrays(path, factors)
    status, (*lines, last) = check(path.parent)
    assert status == 1 and last.endswith(f" in {len(planted)} files")
    found = {line.partition("_held:")[0]: line[:-1].partition("FAILED (")[2] for line in lines}
    named = {name: set(problems.split(", ")) for name, problems in found.items()}
    assert named == {name: set(factors) for name, factors in planted.items()}


def test_an_array_that_is_not_compared_fails(copy_of, check):
    path = copy_of("pixel_mae")
    with np.load(path) as archive:
        np.savez(path, **archive, more=np.zeros(1))
    status, (line, _) = check(path.parent)
    assert status == 1 and line.endswith("FAILED (more is not compared)")


def test_kinds_that_are_not_built_are_named_and_others_fail(copy_of, check):
    for name in ("capi_x", "ijepa_x_held", "deep_targets_x"):
        copy_of("pixel_mae", name)
    copy_of("pixel_mae", "pixel_mae_held")
    folder = copy_of("pixel_mae").parent
    status, lines = check(folder)
    assert status == 0 and lines[-1] == "compared 10 arrays in 2 files"
    names = ["capi_x", "deep_targets_x", "ijepa_x_held"]
    assert lines[:3] == [f"{name}: not built, not compared" for name in names]
    (folder / "pixels.json").write_text(json.dumps({}))
    for unknown in ("pixels", "pixel_mae_again"):
        path = copy_of("pixel_mae", unknown)
        status, lines = check(folder)
        assert status == 1 and f"{unknown}: FAILED (expected a pair, of " in "\n".join(lines)
        path.unlink()  # the half that is left is no pair
        assert check(folder)[0] == 1
        path.with_suffix(".json").unlink()
    assert check(folder)[0] == 0


def test_an_array_that_is_missing_or_of_another_shape_fails(copy_of, check):
    path = copy_of("pixel_mae")
    with np.load(path) as archive:
        arrays = dict(archive.items())
    np.savez(path, **{key: value for key, value in arrays.items() if key != "images"})
    status, (line, _) = check(path.parent)
    assert status == 1 and line.endswith("0 arrays: FAILED (KeyError: 'images')")
    np.savez(path, **arrays | {"patches": arrays["patches"][:1]})
    status, (line, _) = check(path.parent)
    assert status == 1 and "FAILED (AssertionError: patches: torch.Size([2," in line


def keep_arrays(path: Path, pattern: str) -> int:
    """-> how many are left of those whose names match"""
    with np.load(path) as archive:
        kept = {key: archive[key] for key in archive.files if re.fullmatch(pattern, key)}
    np.savez(path, **kept)
    return len(kept)


def test_sigreg_without_several_processes_is_compared_without_them(copy_of, check):
    path = copy_of("sigreg", "sigreg_held")
    assert keep_arrays(path, r"(?!ranks/).*") == 23
    status, (line, last) = check(path.parent)
    assert status == 0 and line.endswith(": ok") and last == "compared 15 arrays in 1 files"


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        ("directions", "FAILED (ranks/directions is not compared)"),
        ("loss.", "FAILED (ranks/loss0 is not compared, ranks/loss1 is not compared)"),
        (".*[1s]", "FAILED (KeyError: 'ranks/x0')"),
        (r"\w+\d", "FAILED (KeyError: 'ranks/directions')"),
        (".*[0s]", "FAILED (ranks/loss0, ranks/grad0)"),
        ("x.|loss.|.*[0s]", "FAILED (KeyError: 'ranks/grad1')"),
    ],
)
def test_a_part_of_the_arrays_of_several_processes_fails(copy_of, check, kept, problem):
    path = copy_of("sigreg")
    keep_arrays(path, rf"(?!ranks/).*|ranks/({kept})")
    status, (line, _) = check(path.parent)
    assert status == 1 and line.endswith(problem), line


def test_nothing_to_compare_is_not_a_success(tmp_path, check):
    assert check(tmp_path) == (1, ["compared 0 arrays in 0 files"])
    assert check(tmp_path / "missing")[0] == 2
