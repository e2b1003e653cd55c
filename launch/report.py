"""One page that needs no other file, of what jobs have left behind, laid over each other:

python launcher.py --config-name=report 'jobs=[checkpoints/demo,reference/*]'

Runs that differ by their seed alone are one row of each table and one band of each curve: mean and
standard deviation over the runs, at the steps that all of them have. An evaluation belongs to the
run whose checkpoint it has read, where that is among the jobs.
"""

import base64
import glob
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment
from omegaconf import DictConfig
from yaml import YAMLError

from launch.config import ConfigError, flatten, job_directory, read_yaml
from launch.results import CHANGE_NO_RESULT
from launch.validate import is_number
from util.files import read_records, write_whole

TEMPLATE = Path(__file__).with_suffix(".html")
FEW_POINTS = 20  # are marked
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


# ---- What the folders of jobs hold, and which of them are one row. -------------------------------


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


# ---- The page. -----------------------------------------------------------------------------------


def main(cfg: DictConfig) -> None:
    apart = find_jobs("apart", cfg.apart)
    found = find_jobs("jobs", cfg.jobs) | apart
    if not found:
        raise ConfigError("jobs=[]: expected folders of jobs, here or as apart=[FOLDER]")
    rows, jobs = find_rows(found, apart), [*found.values()]
    notes = [note for row in rows for note in row.notes()]
    options: dict = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.do"]}
    environment = Environment(autoescape=True, **options)
    environment.filters["base64"] = lambda contents: base64.b64encode(contents).decode()
    page = environment.from_string(TEMPLATE.read_text()).render(
        rows=rows,
        spread=spread,
        jobs=jobs,
        notes=notes,
        workers=compare_workers(rows),
        evaluations=list(evaluations(rows)),
        environments=environments(jobs),
    )
    path = job_directory(cfg) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode(errors="replace"))
    print(*notes, f"{len(jobs)} jobs in {len(rows)} rows: {path}", sep="\n")


def compare_workers(rows: list[Row]) -> dict[str, tuple[list[Row], list[str], list]]:
    """By worker, because the losses of different tasks are not compared: its rows, the settings
    that differ, and the curves of each kind."""
    by_worker = defaultdict(list)
    for row in rows:
        by_worker[str(row.jobs[0].config.get("worker"))].append(row)
    found = {}
    for worker, alike in by_worker.items():
        parts, settings = [], [row.jobs[0].settings() for row in alike]
        keys = sorted({key for own in settings for key in own})
        differ = [key for key in keys if len({str(own.get(key, "–")) for own in settings}) > 1]
        for title, curves in CURVES.items():
            names = [name for name in curves if any(row.curve(name)[0] for row in alike)]
            figures = {name: (curves[name], *figure(name, alike)) for name in names}
            parts += [(title, figures)] if names else []
        found[worker] = alike, differ, parts
    return found


def spread(values: Sequence[float] | np.ndarray, of: int) -> str:
    """Mean and standard deviation, and of how many runs if not of all."""
    if len(values) == 0:
        return "–"
    middle, text = np.mean(values), f"{np.mean(values):.4g}"
    if len(values) > 1:
        deviation = np.std(values, ddof=1)
        text += f" ± {round(deviation, 12):.2g}"
        if 1e-6 * abs(middle) < deviation < math.inf:  # as many places as its two first digits need
            places = max(0, 1 - math.floor(math.log10(deviation)))
            text = f"{middle:.{places}f} ± {deviation:.{places}f}"
    return text + (f" ({len(values)} of {of} runs)" if len(values) < of else "")


def figure(name: str, rows: list[Row]) -> tuple[list[Row], dict[str, dict], bytes]:
    """-> the rows that have this curve, its numbers by their labels, SVG"""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    numbers, drawing, file = {}, Figure((4.3, 2.7)), io.BytesIO()
    axes = drawing.add_axes((0.17, 0.17, 0.81, 0.8), xlabel="step")
    rows = [row for row in rows if row.curve(name)[0]]
    for row in rows:
        steps, values = row.curve(name)
        middle = values.mean(axis=1)
        numbers[row.label] = {"steps": steps, "mean": readable(middle)}
        # Dashed ones above, so that those below are seen.
        style: dict = {"linestyle": (0, row.dashes or None), "zorder": 3 if row.dashes else 2}
        style |= {"marker": "o" if len(steps) <= FEW_POINTS else "", "markersize": 3}
        axes.plot(steps, middle, color=row.colour, linewidth=1.6, **style)
        if len(row.jobs) > 1:
            deviation = values.std(axis=1, ddof=1)
            numbers[row.label]["std"] = readable(deviation)
            band = (middle - deviation, middle + deviation)
            axes.fill_between(steps, *band, color=row.colour, alpha=0.2, linewidth=0)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.hashsalt": name}):  # the same page from the same jobs
        drawing.savefig(file, format="svg", metadata={"Date": None})
    return rows, numbers, file.getvalue()


def readable(values: np.ndarray) -> list[float | None]:
    """By any reader of JSON, which has no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def evaluations(rows: list[Row]) -> Iterator[tuple[str, str, Iterable[str], list]]:
    """One for each protocol, because numbers of different ones are not compared: a title, what it
    is about, the metrics, and of each row the numbers and the checkpoints."""
    found: dict[tuple, dict[Row, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for job in row.jobs:
            before: Counter = Counter()  # of the same kind: another layer, another checkpoint
            for result in job.results:
                name = str(result.get("evaluation"))
                name += ", random init" * bool(result.get("random_init"))
                key = (name, str(result.get("dataset", "")), str(result.get("protocol", "")))
                found[*key, before[key]][row].append(result)
                before[key] += 1
    for (name, dataset, protocol, nth), by_row in sorted(found.items()):
        lines, metrics = [], {m: 0 for rs in by_row.values() for r in rs for m in r["results"]}
        for row, results in by_row.items():
            columns = ([r["results"].get(m) for r in results] for m in metrics)
            numbers = ([value for value in column if is_number(value)] for column in columns)
            files = {Path(str(r.get("pretrained") or "–")).name for r in results}
            cells = [spread(own, len(row.jobs)) for own in numbers]
            lines.append((row, [*cells, ", ".join(sorted(files))]))
        about = f"{protocol} ({dataset})" if dataset else protocol
        yield f"{name} ({nth + 1})" if nth else name, about, metrics, lines


def environments(jobs: list[Job]) -> dict[tuple, list[str]]:
    """The runs of each: commit, what was changed, Python, packages."""
    alike: dict[tuple, list[str]] = defaultdict(list)
    for job in jobs:
        seen = job.environment
        commit = str(seen.get("git_commit") or "–")[:12]
        changed = ", ".join(seen.get("git_uncommitted", [])) or "–"
        packages = ", ".join(f"{k} {v}" for k, v in seen.get("packages", {}).items())
        alike[commit, changed, str(seen.get("python", "–")), packages].append(job.name)
    return alike
