"""The published numbers, and the command that checks them: what it accepts and what it refuses."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.golden.replay import LIMITS, GoldenPair, decay_sets_agree

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


def scale_arrays(path: Path, factors: dict[str, float | list[float]]) -> None:
    """factors: by what the names of the arrays begin with."""
    with np.load(path) as archive:
        arrays = dict(archive.items())
    for prefix, factor in factors.items():
        for key in arrays:
            if key.startswith(prefix):
                arrays[key] = arrays[key] * np.asarray(factor, dtype=arrays[key].dtype)
    np.savez(path, **arrays)


def test_published_numbers_are_reproduced(check):
    status, lines = check(GOLDEN)
    assert status == 0
    assert [line.split(":")[0] for line in lines] == sorted(PAIRS)
    for line in lines:
        assert line.endswith(" decay_sets=agree: ok")
        compared = {number.partition("=")[0] for number in line.split()[1:-2]}
        # Frozen position tables only: those of the other pair are learned.
        assert compared == set(LIMITS) - (set() if "paper" in line else {"position_tables"})


QUANTITIES = {
    "forward/patches": "patches",
    "forward/x_vis": "encoder",
    "forward/x_trg_all": "target",
    "forward/x_pred": "decoder",
    "forward/loss": "loss",
    "forward/avg_sim_vis": "similarities",
    "grad/": "gradients",
    "state/decoder.pos_embed": "position_tables",
    "features/full_output": "features",
    "train/log": "log",
    "final/": "final_weights",
}


def off_by(share: float, names: list[str]) -> dict[str, float | list[float]]:
    """Of the limit of each quantity."""
    return {name: 1 + share * LIMITS[QUANTITIES[name]] for name in names}


def test_each_quantity_is_compared(copy_of, check):
    """A few times beyond the limit: a comparison that is much coarser would let it through."""
    learned = {name: what for name, what in QUANTITIES.items() if what != "position_tables"}
    path = copy_of("regression_plain")
    scale_arrays(path, off_by(5, list(learned)))
    status, (line,) = check(path.parent)
    assert status == 1 and line.endswith(f"FAILED ({', '.join(learned.values())})")


def test_within_the_limit_is_accepted(copy_of, check):
    path = copy_of("regression_plain")
    scale_arrays(path, off_by(0.5, ["forward/x_pred", "grad/", "train/log", "final/"]))
    assert check(path.parent)[0] == 0


def test_the_pair_with_a_perturbed_array_is_named(copy_of, check):
    """A NaN is beyond every limit; of the features both outputs count; where position tables are
    frozen, they are compared."""
    changes = {"forward/x_vis": np.nan, "features/tokens_before_norm": 1.0001}
    scale_arrays(copy_of("regression_plain"), changes)
    path = copy_of("paper_recipe")
    scale_arrays(path, {"state/decoder.pos_embed": 1.0001})
    status, (frozen, learned) = check(path.parent)
    assert status == 1
    assert frozen.startswith("paper_recipe") and "position_tables" in frozen.split("FAILED")[1]
    assert learned.endswith("FAILED (encoder, features)")


def test_altered_decay_sets_are_refused(copy_of, check):
    path = copy_of("regression_plain")
    description = json.loads(path.with_suffix(".json").read_text())
    description["decay"].remove("encoder.cls_token")
    path.with_suffix(".json").write_text(json.dumps(description))
    status, (line,) = check(path.parent)
    assert status == 1
    assert "decay_sets=DIFFER" in line and line.endswith("FAILED (decay sets)")


def test_both_decay_sets_are_the_published_ones():
    pair = GoldenPair(GOLDEN / "regression_plain.npz")
    decay, no_decay = pair.decay, pair.no_decay
    assert decay_sets_agree(pair)
    embedding, token = {"encoder.embed.proj.weight"}, {"encoder.cls_token"}
    for pair.decay, pair.no_decay in (
        (decay | embedding, no_decay - embedding),
        (decay - token, no_decay | token),
        (decay, no_decay | {"encoder.missing.bias"}),
    ):
        assert not decay_sets_agree(pair)


def test_a_folder_without_pairs_is_not_a_success(tmp_path, check):
    shutil.copy(GOLDEN / "paper_recipe.json", tmp_path)
    assert check(tmp_path) == (1, [])


def test_a_folder_that_does_not_exist_is_a_usage_error(tmp_path, check):
    assert check(tmp_path / "missing") == (2, [])
