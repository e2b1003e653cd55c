"""Several evaluations, one table."""

import json

import pytest

from eval.evaluate import compose
from tests.backbones import digits_checkpoint, run_command
from util.config import compose_config


@pytest.mark.slow
def test_one_table_of_several_evaluations(tmp_path, capfd):
    common = [f"output_dir={tmp_path}", f"pretrained={digits_checkpoint(tmp_path)}"]
    overrides = ["evals=[nn,knn,collapse]", "beside_random_init=True", "batch_size=512"]
    settings = "settings=['knn.neighbours=[5,10]','collapse.probe_images=8']"
    assert run_command("evaluate", *common, *overrides, settings) == 0
    output = capfd.readouterr().out
    results = json.loads((tmp_path / "evaluate" / "results" / "evaluate.json").read_text())
    found = results["evaluations"]
    assert list(found) == ["nn", "knn", "collapse"]
    assert all(list(variants) == ["trained", "random init"] for variants in found.values())
    assert list(found["knn"]["trained"]["results"])[::2] == ["k5_top1", "k10_top1"]
    table = (tmp_path / "evaluate" / "results" / "evaluate.md").read_text()
    assert table.strip() in output and "published" not in table
    row = next(line for line in table.splitlines() if line.startswith("| nn | top1"))
    values = [found["nn"][label]["results"]["top1"] for label in ("trained", "random init")]
    assert row == "| nn | top1 | " + " | ".join(f"{value:.4g}" for value in values) + " |"
    # Each number is that of the evaluation alone.
    assert run_command("nn", *common, "batch_size=512") == 0
    alone = json.loads((tmp_path / "nn" / "results" / "nn.json").read_text())
    assert alone["results"] == found["nn"]["trained"]["results"]
    # Features were computed once per backbone, norm and split: nn and collapse share theirs.
    assert len(list((tmp_path / "feature-cache").iterdir())) == 2 * 3


def test_a_wrong_setting_ends_it_before_anything_runs(tmp_path, capfd):
    common = [f"output_dir={tmp_path}", f"pretrained={digits_checkpoint(tmp_path)}", "evals=[nn]"]
    for settings, expected in [
        ("settings=['knn.neighbours=3']", "expected NAME.key=value, NAME one of nn"),
        ("settings=['nn.neighbors=3']", "neighbors: unknown key; did you mean neighbours"),
        ("settings=['nn.temperature=0']", "temperature=0: expected a number above 0"),
        ("evals=[nm]", "evals=['nm']: expected a list of different ones of nn, knn"),
    ]:
        assert run_command("evaluate", *common, settings) == 2
        output = capfd.readouterr()
        assert expected in output.err and "top1" not in output.out


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_requeued_job_keeps_what_its_trainings_have_saved(tmp_path, monkeypatch, restarts):
    cfg = compose_config("evaluate", ["dataset=digits", f"output_dir={tmp_path}"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    own = compose(cfg, "finetune", random_init=False)
    assert (own.resume, own.overwrite) == (restarts == "1", restarts == "0")


def test_final_norm_belongs_to_each_evaluation(tmp_path, capfd):
    checkpoint = digits_checkpoint(tmp_path)
    overrides = [f"pretrained={checkpoint}", f"output_dir={tmp_path}", "final_norm=False"]
    assert run_command("evaluate", *overrides) == 2
    assert "settings=['NAME.final_norm=False']" in capfd.readouterr().err
