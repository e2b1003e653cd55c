"""An evaluation as a Slurm job."""

import pytest

from tests.backbones import digits_checkpoint
from tests.evaluations import launch, results
from tests.slurm.jobs import ON_SLURM, wait_for_end

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("require_cluster")]


def test_two_tasks_on_slurm_give_the_number_of_one_process_here(tmp_path):
    digits_checkpoint(tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    code, output = launch("nn", tmp_path / "digits.pth", here)
    assert code == 0, output
    code, output = launch("nn", tmp_path / "digits.pth", there, *ON_SLURM, "env.tasks_per_node=2")
    assert code == 0, output
    job_id = output.split("submitted as job ")[1].split()[0]
    logs = there / "nn" / "logs"
    assert wait_for_end(job_id, 60) == "COMPLETED", next(logs.glob("*.out")).read_text()
    ours, expected = results(there, "nn"), results(here, "nn")
    assert ours["results"] == expected["results"]
    assert ours["processes"] == 2
    # It may run again: nothing is trained that could be finished.
    code, output = launch("nn", tmp_path / "digits.pth", there, *ON_SLURM)
    assert code == 0, output
    job_id = output.split("submitted as job ")[1].split()[0]
    assert wait_for_end(job_id, 60) == "COMPLETED"
