"""python launcher.py --config-name=status output_dir=./checkpoints: one line per job there."""

import shutil
from pathlib import Path

from omegaconf import DictConfig

from util.config import ConfigError
from util.files import read_records
from util.job import list_checkpoints
from util.slurm_queue import job_state, read_note, why_waiting

COLUMNS = (
    *("job", "slurm", "state", "epoch", "loss", "images/s", "features"),
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
    last = last_record(job / "log.txt", "loss")
    watched = last_record(job / "log.txt", "verdict")
    checkpoints = list_checkpoints(job / "checkpoints")
    return (
        job.name,
        job_id,
        state,
        f"{last['epoch']:.2f}" if last else "-",
        f"{last['loss']:.4f}" if last else "-",
        f"{last['images_per_second']:.0f}" if last else "-",
        watched["verdict"] if watched else "-",
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


def last_record(log: Path, name: str) -> dict | None:
    """The last that has this number."""
    records = read_records(log) if log.exists() else []
    return next((record for record in reversed(records) if name in record), None)
