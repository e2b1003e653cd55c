"""python launcher.py --config-name=status output_dir=./checkpoints: one line per job there."""

import shutil
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from launch.config import ConfigError
from launch.job import list_checkpoints
from launch.lock import JobBusy, lives, owners_in, this_process
from launch.queue import job_state, noted_job, why_waiting
from launch.results import has_ended, read_outline
from util.files import read_json, read_records

# With widths that most cells fit, since a row is printed as soon as it is known.
COLUMNS = {
    "job": 0,
    "slurm": 8,
    "state": 10,
    "epoch": 6,
    "loss": 7,
    "images/s": 8,
    "nn": 5,
    "features": 10,
    "evaluations": 11,
    "last checkpoint": 28,
    "restarts": 0,
}
UNKNOWN = {"JobState": "unknown"}


def main(cfg: DictConfig) -> None:
    jobs = sorted(path.parent for path in Path(cfg.output_dir).glob("*/logs"))
    if not jobs:
        raise ConfigError(f"output_dir={cfg.output_dir}: expected a folder that jobs wrote to")
    widths = [*COLUMNS.values()]
    widths[0] = max(map(len, ["job", *(job.name for job in jobs)]))
    has_slurm = answers = shutil.which("scontrol") is not None
    show(list(COLUMNS), widths)
    for job in jobs:
        job_id, record = noted_job(job) if has_slurm else "", UNKNOWN
        if job_id and answers:
            record = job_state(job_id)
            answers = record["JobState"] != "unknown"  # or each question would take half a minute
        show(describe_job(job, job_id, record), widths)
    if has_slurm and not answers:
        print("Slurm does not answer: what is shown is what the folders say", file=sys.stderr)


def show(cells: list[str], widths: list[int]) -> None:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    print("  ".join(padded).rstrip(), flush=True)


def describe_job(job: Path, job_id: str, record: dict[str, str]) -> list[str]:
    """record: Slurm's, of the job with this id."""
    records = read_records(job / "log.txt") if (job / "log.txt").exists() else []
    checkpoints = list_checkpoints(job)
    return [
        job.name,
        job_id or "-",
        state_of(job, job_id, record),
        last_number(records, "loss", "epoch", ".2f"),
        last_number(records, "loss", "loss", ".4f"),
        last_number(records, "loss", "images_per_second", ".0f"),
        last_number(records, "nn_accuracy", "nn_accuracy", ".2f"),
        last_number(records, "verdict", "verdict", ""),
        ",".join(evaluations(job)) or "-",
        checkpoints[0].name if checkpoints else "-",
        record.get("Restarts", "-"),
    ]


def state_of(job: Path, job_id: str, record: dict[str, str]) -> str:
    """What Slurm says, as long as it knows."""
    state, reason = record["JobState"], why_waiting(record)
    if not job_id or state == "forgotten":
        return state_here(job)
    if state == "unknown" and has_come_to_its_end(job):
        return "finished"
    return state + (f" ({reason})" if reason else "")


def state_here(job: Path) -> str:
    """By who has the folder, and by its last checkpoint."""
    try:
        owners = [owner for _, owner in owners_in(job / "logs")]
    except JobBusy:
        return "?"
    me = this_process()
    for owner in owners:
        if lives(owner, me):
            return "running" if owner.host == me.host else f"running on {owner.host}"
    if has_come_to_its_end(job):
        return "finished"
    return "dead" if owners else "stopped"


def has_come_to_its_end(job: Path) -> bool:
    """With a result; what is trained, after the steps that it had planned."""
    try:
        cfg = OmegaConf.load(job / "config.yaml")
        trained = [read_outline(path) for path in list_checkpoints(job)[:1]]
        is_done = has_ended(cfg, *trained) if trained else "epochs" not in cfg and "worker" in cfg
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException):
        return False
    return is_done and any((job / "results").glob("*.json"))


def evaluations(job: Path) -> list[str]:
    """Those whose results are in the folder, each once."""
    results = map(read_json, sorted((job / "results").glob("*.json")))
    names = (result.get("evaluation") for result in results)  # None: of pre-training
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def last_number(records: list[dict], name: str, shown: str, form: str) -> str:
    """Of the last record that has `name`, what is `shown`."""
    record = next((record for record in reversed(records) if name in record), {})
    return format(record[shown], form) if shown in record else "-"
