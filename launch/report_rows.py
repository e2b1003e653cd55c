"""What the folders of jobs hold, and which of them are one row of a report (launch/report.py)."""

import glob
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from yaml import YAMLError

from launch.config import ConfigError, flatten, read_yaml
from launch.resuming import CHANGE_NO_RESULT
from util.files import read_records

CURVES = {
    "Training": {
        "loss": "loss",
        "sim_pred": "similarity of predictions inside an image",
        "sim_vis": "similarity of visible tokens inside an image",
        "sim_trg": "similarity of targets inside an image",
        "lr": "learning rate",
        "images_per_second": "images per second",
        "data_wait": "part of the time that waits for data",
    },
    "Features": {
        "nn_accuracy": "nearest neighbour, percent",
        "rankme": "directions that the features use",
        "mean_cosine": "cosine of two images",
        "same_place": "cosine of two images at the same place",
        "position_probe": "tokens that tell their place, percent",
    },
}
# Of Okabe and Ito, told apart by colour-blind eyes; with the dashes also in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ((), (6, 2), (2, 2), (8, 2, 2, 2))


class Job:
    """What the folder of a run holds."""

    def __init__(self, folder: Path):
        config = folder / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"{folder} holds no config.yaml")
        self.folder, self.name = folder, folder.resolve().name
        log, environment = folder / "log.txt", folder / "environment.json"
        try:
            self.config = flatten(read_yaml(config))
            self.records = read_records(log) if log.exists() else []
            self.environment = json.loads(environment.read_bytes()) if environment.exists() else {}
            files = sorted((folder / "results").glob("*.json"))
            self.results = [r for file in files for r in results_in(json.loads(file.read_bytes()))]
        except (OSError, ValueError, YAMLError) as error:
            raise ConfigError(f"{folder} has a damaged file ({error})") from error
        self.pictures = sorted((folder / "results" / "pictures").glob("*.png"))
        if not (self.records or self.results or self.pictures):
            raise ConfigError(f"{folder} has neither logged a step nor left results")

    def curve(self, name: str) -> dict[int, float]:
        return {record["step"]: record[name] for record in self.records if name in record}

    @property
    def last_step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    def verdict(self) -> dict:
        """The last line of log.txt that has one."""
        return next((record for record in self.records[::-1] if "verdict" in record), {})

    def settings(self) -> dict[str, object]:
        """What changes results, besides the seed."""
        ignored = CHANGE_NO_RESULT - {"pretrained", "pretrained_weights"} | {"seed"}
        keys = [key for key in self.config if key not in ignored and not key.startswith("env.")]
        kept = {key: self.config[key] for key in keys}
        # Depends on the processes and the images, which the config does not tell.
        epochs = [line["step"] / line["epoch"] for line in self.records if line.get("epoch")]
        return kept | ({"steps per epoch": round(epochs[-1])} if epochs else {})


def results_in(contents: dict) -> list[dict]:
    """Return the results in a file: an evaluation, several, or what pre-training has come to."""
    if "evaluations" in contents:
        return [r for variants in contents["evaluations"].values() for r in variants.values()]
    if "before" in contents:
        numbers = {name: contents.get(name) for name in ("before", "after", "seconds")}
        return [contents | {"evaluation": "pre-training", "results": numbers}]
    return [contents] if "results" in contents else []


class Row:
    """One run, or several that differ by their seed alone."""

    def __init__(self, jobs: list[Job], number: int):
        self.jobs = jobs
        self.colour, self.dashes = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        first, last = jobs[0].name, jobs[-1].name
        self.label = first if len(jobs) == 1 else f"{first} … {last} ({len(jobs)} runs)"

    def curve(self, name: str) -> tuple[list[int], np.ndarray]:
        """The steps that all have, and the numbers there. -> float64 [steps, runs]"""
        curves = [job.curve(name) for job in self.jobs]
        steps = sorted(set.intersection(*map(set, curves)))
        return steps, np.array([[curve[step] for curve in curves] for step in steps])

    def last_step(self, names: Iterable[str]) -> int | str:
        """Return the last step that one of these curves has."""
        return max((self.curve(name)[0][-1] for name in names if self.curve(name)[0]), default="–")

    def verdicts(self) -> str:
        counts = Counter(str(job.verdict().get("verdict", "–")) for job in self.jobs)
        several = len(counts) > 1
        return ", ".join(f"{name} ({n})" if several else name for name, n in counts.items())

    def notes(self) -> Iterable[str]:
        if len(self.jobs) == 1:
            return
        names = (name for part in CURVES.values() for name in part)
        logged = [name for name in names if any(job.curve(name) for job in self.jobs)]
        missing = [name for name in logged if not self.curve(name)[0]]
        if logged and missing == logged:
            valid = "runs that have logged the same steps, or apart=[FOLDER]"
            raise ConfigError(f"jobs={self.label}: expected {valid}")
        ends = [job.last_step for job in self.jobs]
        if len(set(ends)) > 1:
            steps = ", ".join(map(str, ends))
            yield f"{self.label}: these end at steps {steps}; the band has the steps of all."
        if missing:
            yield f"{self.label}: no step that all have of {', '.join(missing)}."
        seeds = [job.config.get("seed") for job in self.jobs]
        if len(set(seeds)) < len(seeds):
            yield f"{self.label}: seeds that are there twice ({', '.join(map(str, seeds))})."


def find_rows(jobs: dict[Path, Job], apart: dict[Path, Job]) -> list[Row]:
    """Those of jobs that are not apart may share one."""
    counts = Counter(job.name for job in jobs.values())
    for job in jobs.values():  # folders of the same name by their whole path
        job.name = job.name if counts[job.name] == 1 else str(job.folder)
    give_results_to_their_runs([*jobs.values()])
    alike: dict[str, list[Job]] = defaultdict(list)
    for path, job in jobs.items():
        if job.records or job.results:
            key = [job.config.get("worker"), job.settings(), str(path) if path in apart else ""]
            alike[json.dumps(key, sort_keys=True, default=str)].append(job)
    return [Row(members, number) for number, members in enumerate(alike.values())]


def find_jobs(key: str, entries: Iterable[str]) -> dict[Path, Job]:
    """By resolved path. A glob may also match what is no job."""
    found = {}
    for entry in entries:
        text = os.path.expanduser(entry)
        is_glob = glob.has_magic(text) and not os.path.exists(text)
        paths = [path for path in map(Path, sorted(glob.glob(text))) if path.is_dir()]
        matched = []
        for path in paths if is_glob else [Path(text)]:
            try:
                matched.append(Job(path))
            except ConfigError as error:
                if not is_glob:
                    raise ConfigError(f"{key}={entry}: expected a job's folder: {error}") from error
                print(f"left out: {error}")
        if not matched:
            raise ConfigError(f"{key}={entry}: expected folders of jobs, but it matches none")
        found |= {job.folder.resolve(): job for job in matched}
    return found


def give_results_to_their_runs(jobs: list[Job]) -> None:
    trained = [job for job in jobs if job.records]
    for job in jobs:
        kept = []
        for result in job.results:
            source = Path(str(result.get("pretrained")).rpartition(":")[2]).resolve()
            owners = [run for run in trained if source.is_relative_to(run.folder.resolve())]
            (owners[0].results if owners and owners[0] is not job else kept).append(result)
        job.results = kept
