"""python launcher.py --config-name=status output_dir=./checkpoints: one line per job there."""

import json
import shutil
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from util.config import ConfigError
from util.files import read_records
from util.job import last_checkpoint, list_checkpoints
from util.lock import JobBusy, lives, owners_in, this_process
from util.slurm_queue import job_state, read_note, why_waiting

COLUMNS = (
    *("job", "slurm", "state", "epoch", "loss", "images/s", "nn", "features", "evaluations"),
    *("last checkpoint", "restarts"),
)


def main(cfg: DictConfig) -> None:
    jobs = sorted(path.parent for path in Path(cfg.output_dir).glob("*/logs"))
    if not jobs:
        raise ConfigError(f"output_dir={cfg.output_dir}: expected a folder that jobs wrote to")
    rows = [COLUMNS, *map(describe_job, jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def describe_job(job: Path) -> tuple[str, ...]:
    job_id, state, restarts = in_slurm(job)
    records = read_records(job / "log.txt") if (job / "log.txt").exists() else []
    checkpoints = list_checkpoints(job / "checkpoints")
    return (
        job.name,
        job_id,
        state if job_id != "-" else state_here(job),
        last_number(records, "loss", "epoch", ".2f"),
        last_number(records, "loss", "loss", ".4f"),
        last_number(records, "loss", "images_per_second", ".0f"),
        last_number(records, "nn_accuracy", "nn_accuracy", ".2f"),
        last_number(records, "verdict", "verdict", ""),
        ",".join(evaluations(job)) or "-",
        checkpoints[0].name if checkpoints else "-",
        restarts,
    )


def in_slurm(job: Path) -> tuple[str, str, str]:
    """Job id, state, restarts; dashes for what did not run there."""
    note = read_note(job)
    if not note or shutil.which("scontrol") is None:
        return "-", "-", "-"
    record = job_state(note["job_id"])
    reason = why_waiting(record)
    state = record["JobState"] + (f" ({reason})" if reason else "")
    return note["job_id"], state, record.get("Restarts", "-")


def state_here(job: Path) -> str:
    """Of what runs without Slurm, by who has its folder and by its last checkpoint."""
    try:
        owners = [owner for _, owner in owners_in(job / "logs")]
    except JobBusy:
        return "?"
    me = this_process()
    for owner in owners:
        if lives(owner, me):
            return "running" if owner.host == me.host else f"running on {owner.host}"
    if is_finished(job):
        return "finished"
    return "dead" if owners else "stopped"


def is_finished(job: Path) -> bool:
    try:
        cfg = OmegaConf.load(job / "config.yaml")
    except (OSError, ValueError):
        return False
    if "epochs" not in cfg:
        return bool(evaluations(job))
    return last_checkpoint(job, cfg.epochs) is not None


def evaluations(job: Path) -> list[str]:
    """Those whose results are in the folder."""
    found = []
    for path in sorted((job / "results").glob("*.json")):
        try:
            found.append(json.loads(path.read_text())["evaluation"])
        except (OSError, ValueError, LookupError, TypeError):
            continue  # of pre-training, or no result
    return found


def last_number(records: list[dict], name: str, shown: str, form: str) -> str:
    """Of the last record that has `name`, what is `shown`."""
    record = next((record for record in reversed(records) if name in record), {})
    return format(record[shown], form) if shown in record else "-"
