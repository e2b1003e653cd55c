"""The published numbers, and the command that checks them: what it accepts and what it refuses."""

import json
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_pretrain import Training
from tests.golden.replay import LIMITS, GoldenPair, compare, compare_training

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
PAIRS = ("paper_recipe", "regression_plain")


@pytest.fixture
def check(monkeypatch, capsys):
    """`python -m tests.golden` in this process: another one would spend seconds importing torch."""

    def run(folder: Path) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["tests.golden", str(folder)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_module("tests.golden", run_name="__main__")
        return stop.value.code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def copy_of(tmp_path):
    def copy(name: str) -> Path:
        for suffix in (".json", ".npz"):
            shutil.copy(GOLDEN / (name + suffix), tmp_path)
        return tmp_path / f"{name}.npz"

    return copy


def scale_arrays(path: Path, prefix: str, factor: float) -> None:
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    for key in arrays:
        if key.startswith(prefix):
            arrays[key] = arrays[key] * np.asarray(factor, dtype=arrays[key].dtype)
    np.savez(path, **arrays)


@pytest.mark.parametrize("name", PAIRS)
def test_published_numbers_are_reproduced(name):
    errors, decay_agrees = compare(GOLDEN / f"{name}.npz")
    assert decay_agrees
    # Frozen position tables only: those of the other pair are learned.
    expected = set(LIMITS) if name == "paper_recipe" else set(LIMITS) - {"position_tables"}
    assert set(errors) == expected
    for quantity, error in errors.items():
        assert error <= LIMITS[quantity], quantity


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_compiled_training_reproduces_the_published_numbers(name, monkeypatch):
    """Up to the C++ that would be written, which takes minutes to build."""
    compile_it = partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)
    monkeypatch.setattr("torch.compile", compile_it)
    build, compiled = GoldenPair.build_training, []

    def build_compiled(pair: GoldenPair) -> Training:
        training = build(pair)
        training.compile()
        compiled.append(training)
        return training

    monkeypatch.setattr(GoldenPair, "build_training", build_compiled)
    errors = compare_training(GoldenPair(GOLDEN / f"{name}.npz"))
    assert len(compiled) == 1
    for quantity, error in errors.items():
        assert error <= LIMITS[quantity], quantity


def test_command_prints_one_line_per_pair(check):
    status, lines = check(GOLDEN)
    assert status == 0
    assert [line.split(":")[0] for line in lines] == sorted(PAIRS)
    assert all(line.endswith(": ok") for line in lines)


def test_command_names_the_pair_with_a_perturbed_array(copy_of, check):
    copy_of("regression_plain")
    path = copy_of("paper_recipe")
    scale_arrays(path, "forward/x_pred", 1.001)
    status, (perturbed, untouched) = check(path.parent)
    assert status == 1
    assert perturbed.endswith("FAILED (decoder)")
    assert untouched.endswith(": ok")


@pytest.mark.slow
def test_command_in_a_process_of_its_own(copy_of):
    path = copy_of("regression_plain")
    scale_arrays(path, "forward/x_pred", 1.001)
    arguments = [sys.executable, "-m", "tests.golden", str(path.parent)]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    "prefix, quantity",
    [
        ("forward/patches", "patches"),
        ("forward/x_vis", "encoder"),
        ("forward/x_trg_all", "target"),
        ("forward/x_pred", "decoder"),
        ("forward/loss", "loss"),
        ("forward/avg_sim_vis", "similarities"),
        ("grad/", "gradients"),
        ("features/full_output", "features"),
        ("features/tokens_before_norm", "features"),
        ("train/log", "log"),
        ("final/", "final_weights"),
    ],
)
def test_each_quantity_is_compared(copy_of, check, prefix, quantity):
    path = copy_of("regression_plain")
    # A few times beyond the limit: a comparison that is much coarser would let it through.
    scale_arrays(path, prefix, 1 + 5 * LIMITS[quantity])
    status, lines = check(path.parent)
    assert status == 1
    assert [line.split(": ")[-1] for line in lines] == [f"FAILED ({quantity})"]


def test_within_the_limit_is_accepted(copy_of, check):
    path = copy_of("regression_plain")
    scale_arrays(path, "forward/x_pred", 1 + 0.5 * LIMITS["decoder"])
    status, _ = check(path.parent)
    assert status == 0


def test_position_tables_are_compared_where_they_are_frozen(copy_of, check):
    path = copy_of("paper_recipe")
    scale_arrays(path, "state/decoder.pos_embed", 1.0001)
    status, lines = check(path.parent)
    assert status == 1 and "position_tables" in lines[0].split("FAILED")[1]


def test_a_nan_is_beyond_every_limit(copy_of, check):
    path = copy_of("regression_plain")
    scale_arrays(path, "forward/x_vis", np.nan)
    status, lines = check(path.parent)
    assert status == 1 and lines[0].endswith("FAILED (encoder)")


def move(description: dict, name: str, source: str, destination: str) -> None:
    description[source].remove(name)
    description[destination].append(name)


@pytest.mark.parametrize(
    "alter",
    [
        lambda d: move(d, "encoder.embed.proj.weight", "no_decay", "decay"),
        lambda d: move(d, "encoder.cls_token", "decay", "no_decay"),
        lambda d: d["decay"].remove("encoder.cls_token"),
        lambda d: d["no_decay"].append("encoder.missing.bias"),
    ],
    ids=["decay too many", "decay too few", "one left out", "one unknown"],
)
def test_altered_decay_sets_are_refused(copy_of, check, alter):
    path = copy_of("regression_plain")
    description = json.loads(path.with_suffix(".json").read_text())
    alter(description)
    path.with_suffix(".json").write_text(json.dumps(description))
    status, lines = check(path.parent)
    assert status == 1
    assert "decay_sets=DIFFER" in lines[0] and lines[0].endswith("FAILED (decay sets)")


def test_a_folder_without_pairs_is_not_a_success(tmp_path, check):
    shutil.copy(GOLDEN / "paper_recipe.json", tmp_path)
    assert check(tmp_path) == (1, [])


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path, check):
    assert check(tmp_path / "missing") == (2, [])
