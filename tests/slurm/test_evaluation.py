"""An evaluation as a Slurm job."""

import hashlib
import subprocess

import pytest

from tests.evaluations import launch, results
from tests.slurm.cluster import job_info
from tests.slurm.jobs import HELD, ON_SLURM, error_text, ids, log_text, submit, wait_for_end
from util.checkpoint import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]


def test_two_tasks_after_the_training_give_the_number_of_one_process_here(tmp_path):
    """Both are submitted before there is a checkpoint: it is looked for on the node."""
    training = submit(f"output_dir={tmp_path}", "epochs=1", "warmup_epochs=0", HELD)
    two = [*ON_SLURM, "env.tasks_per_node=2"]
    after = f"+env.slurm_extra.dependency=afterok:{training}"
    code, output = launch("nn", tmp_path / "demo", tmp_path, *two, after)
    assert code == 0, output
    (evaluation,) = ids(output)
    assert not (tmp_path / "demo" / "checkpoints").exists()
    assert job_info(evaluation)["Dependency"].startswith(f"afterok:{training}")
    subprocess.run(["scontrol", "release", training], check=True)
    assert wait_for_end(evaluation, 150) == "COMPLETED", error_text(tmp_path / "nn")
    assert job_info(training)["JobState"] == "COMPLETED"
    assert job_info(training)["EndTime"] <= job_info(evaluation)["StartTime"]
    found = results(tmp_path, "nn")
    last = list_checkpoints(tmp_path / "demo" / "checkpoints")[0]
    assert found["backbone"]["sha256"] == hashlib.sha256(last.read_bytes()).hexdigest()
    assert f"nn: top1 {found['results']['top1']:.4g}" in log_text(tmp_path / "nn", evaluation)
    code, output = launch("nn", tmp_path / "demo", tmp_path / "here")
    assert code == 0, output
    expected = results(tmp_path / "here", "nn")
    assert found["results"] == expected["results"]
    assert (found["processes"], expected["processes"]) == (2, 1)
    # It may run again: nothing is trained that could be finished.
    code, output = launch("nn", tmp_path / "demo", tmp_path, *two, HELD)
    assert code == 0 and len(ids(output)) == 1, output
