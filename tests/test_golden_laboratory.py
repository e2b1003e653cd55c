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


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("pixel_mae", "patches"),
        ("pixel_mae", "loss/norm"),
        ("pixel_mae", "grad/raw"),
        ("projection_target", "targets"),
        ("projection_target", "init_stats"),
        ("topk_average", "targets/d2v1_recipe"),
        ("topk_average", "loss/d2v2_recipe"),
        ("topk_average", "grad/d2v1_batch"),
        ("patch_discrimination", "loss/galileo_all/varied/unit1/tau0.1"),
        ("patch_discrimination", "grad/olmoearth_masked/equal/unit0/tau0.2"),
        pytest.param("sigreg", "univariate/statistic", marks=pytest.mark.slow),
        pytest.param("sigreg", "sliced/t3/step0/grad", marks=pytest.mark.slow),
        pytest.param("sigreg", "minimal/loss", marks=pytest.mark.slow),
        pytest.param("sigreg", "ranks/grad1", marks=pytest.mark.slow),
        pytest.param("block_masks", "inverse/176/visible_map", marks=pytest.mark.slow),
        pytest.param("block_masks", "block_roll/69/visible_neighbours", marks=pytest.mark.slow),
    ],
)
def test_a_number_that_is_off_fails(copy_of, check, name, array):
    """Under another name, by which more of the same are known."""
    path = copy_of(name, f"{name}_held")
    factor = {"init_stats": [1.05, 1, 1, 1, 1, 1], "visible_map": 1.3, "visible_neighbours": 1.02}
    scale_arrays(path, array, factor.get(array.split("/")[-1], 1 + 5e-5))
    status, (line, last) = check(path.parent)
    assert status == 1 and line.endswith(f"FAILED ({array})"), line
    assert last.endswith(" in 1 files") and not last.startswith("compared 0 ")


@pytest.mark.slow
def test_a_histogram_that_is_off_fails(copy_of, check):
    path = copy_of("block_masks")
    with np.load(path) as archive:
        arrays = dict(archive.items())
    arrays["block/69/extent"][:, 2] = arrays["block/69/extent"][::-1, 2]
    np.savez(path, **arrays)
    status, (line, _) = check(path.parent)
    assert status == 1 and line.endswith("FAILED (block/69/extent)"), line


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
        pytest.param(".*[0s]", "FAILED (ranks/loss0, ranks/grad0)", marks=pytest.mark.slow),
        pytest.param("x.|loss.|.*[0s]", "FAILED (KeyError: 'ranks/grad1')", marks=pytest.mark.slow),
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
