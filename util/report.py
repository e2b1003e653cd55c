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
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from omegaconf import DictConfig
from yaml import YAMLError

from util.checkpoint import CHANGE_NO_RESULT
from util.config import ConfigError, flatten, job_directory, read_yaml
from util.files import read_records, write_whole

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
FEW_POINTS = 20  # are marked
TEMPLATE = Path(__file__).with_suffix(".html")


class Job:
    """What the folder of a run holds."""

    def __init__(self, folder: Path):
        config = folder / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"{folder} holds no config.yaml")
        self.folder, self.name = folder, folder.resolve().name
        log, environment = folder / "log.txt", folder / "environment.json"
        self.records = read_records(log) if log.exists() else []
        try:
            self.config = flatten(read_yaml(config))
            self.environment = json.loads(environment.read_bytes()) if environment.exists() else {}
            files = sorted((folder / "results").glob("*.json"))
            self.results = [r for file in files for r in results_in(json.loads(file.read_bytes()))]
        except (ValueError, YAMLError) as error:
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
        kept = {
            key: value
            for key, value in self.config.items()
            if key not in ignored and not key.startswith("env.")
        }
        # Depends on the processes and the images, which the config does not tell.
        epochs = [
            record["step"] / record["epoch"] for record in self.records if record.get("epoch")
        ]
        return kept | ({"steps per epoch": round(epochs[-1])} if epochs else {})


def results_in(contents: dict) -> list[dict]:
    """Of one file: an evaluation, several of them, or what a pre-training has come to."""
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

    def notes(self) -> Iterable[str]:
        if len(self.jobs) == 1:
            return
        names = (name for part in CURVES.values() for name in part)
        logged = [name for name in names if any(job.curve(name) for job in self.jobs)]
        missing = [name for name in logged if not self.curve(name)[0]]
        if logged and missing == logged:
            valid = f"{self.label} to have logged a step that all have, or apart=[FOLDER]"
            raise ConfigError(f"jobs: expected {valid}")
        ends = [job.last_step for job in self.jobs]
        if len(set(ends)) > 1:
            steps = ", ".join(map(str, ends))
            yield f"{self.label}: these end at steps {steps}; the band has the steps of all."
        if missing:
            yield f"{self.label}: no step that all have of {', '.join(missing)}."
        seeds = [job.config.get("seed") for job in self.jobs]
        if len(set(seeds)) < len(seeds):
            yield f"{self.label}: seeds that are there twice ({', '.join(map(str, seeds))})."


def main(cfg: DictConfig) -> None:
    apart = find_jobs("apart", cfg.apart)
    together = find_jobs("jobs", cfg.jobs)
    jobs = list((together | apart).values())
    if not jobs:
        raise ConfigError("jobs=[]: expected folders of jobs, here or as apart=[FOLDER]")
    name_apart(jobs)
    give_results_to_their_runs(jobs)
    alike: dict[str, list[Job]] = defaultdict(list)
    for path, job in (together | apart).items():
        if job.records or job.results:
            key = [job.config.get("worker"), job.settings(), str(path) if path in apart else ""]
            alike[json.dumps(key, sort_keys=True, default=str)].append(job)
    rows = [Row(members, number) for number, members in enumerate(alike.values())]
    notes = [note for row in rows for note in row.notes()]
    page = Template(TEMPLATE.read_text()).substitute(describe(rows, jobs, notes))
    path = job_directory(cfg) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode(errors="replace"))
    print(*notes, f"{len(jobs)} jobs in {len(rows)} rows: {path}", sep="\n")


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


def name_apart(jobs: list[Job]) -> None:
    """Folders of the same name by their whole path."""
    counts = Counter(job.name for job in jobs)
    for job in jobs:
        job.name = job.name if counts[job.name] == 1 else str(job.folder)


def give_results_to_their_runs(jobs: list[Job]) -> None:
    trained = [job for job in jobs if job.records]
    for job in jobs:
        kept = []
        for result in job.results:
            source = Path(str(result.get("pretrained")).rpartition(":")[2]).resolve()
            owners = [run for run in trained if source.is_relative_to(run.folder.resolve())]
            (owners[0].results if owners and owners[0] is not job else kept).append(result)
        job.results = kept


# --- the page -----------------------------------------------------------------------------------


def describe(rows: list[Row], jobs: list[Job], notes: list[str]) -> dict[str, str]:
    """What the template has places for."""
    parts = [f"<p class=note>{escape(note)}</p>" for note in notes]
    by_worker = defaultdict(list)
    for row in rows:
        by_worker[str(row.jobs[0].config.get("worker"))].append(row)
    numbers: dict[str, dict] = {}
    for worker, alike in by_worker.items():  # the losses of different tasks are not compared
        parts += [f"<h2>{escape(worker)}</h2>", settings_table(alike)]
        for title, curves in CURVES.items():
            if names := [name for name in curves if any(row.curve(name)[0] for row in alike)]:
                parts += [f"<h3>{title}</h3>", end_table(alike, names), "<div class=figures>"]
                for name in names:
                    numbers[f"{worker} {name}"], drawn = figure(name, curves[name], alike)
                    parts.append(drawn)
                parts.append("</div>")
    parts += [*evaluations(rows), *pictures(jobs), "<h2>Runs</h2>", runs_table(jobs)]
    parts += ["<h2>Environments</h2>", environments(jobs)]
    return {
        "title": escape(", ".join(row.label for row in rows)),
        "body": "\n".join(parts),
        "numbers": json.dumps(numbers).replace("<", "\\u003c"),  # so that no text ends the element
    }


def table(header: Iterable[str], lines: Iterable[tuple[str, Iterable[str]]]) -> str:
    """lines: HTML of the first cell, texts of the others"""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{first}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for first, cells in lines
    )
    return f"<div class=wide><table><thead><tr>{head}</tr></thead>{body}</table></div>"


def label(row: Row) -> str:
    """With a piece of its line."""
    dashes = " ".join(map(str, row.dashes))
    stroke = f'stroke="{row.colour}" stroke-width="3" stroke-dasharray="{dashes}"'
    return f'<svg width="28" height="8"><path d="M0 4H28" {stroke}/></svg> {escape(row.label)}'


def spread(values: np.ndarray, of: int) -> str:
    """Mean and standard deviation, and of how many runs if not of all."""
    middle, text = values.mean(), f"{values.mean():.4g}"
    if len(values) > 1:
        deviation = values.std(ddof=1)
        text += f" ± {round(deviation, 12):.2g}"
        if 1e-6 * abs(middle) < deviation < math.inf:  # as many places as its two first digits need
            places = max(0, 1 - math.floor(math.log10(deviation)))
            text = f"{middle:.{places}f} ± {deviation:.{places}f}"
    return text + (f" ({len(values)} of {of} runs)" if len(values) < of else "")


def settings_table(rows: list[Row]) -> str:
    settings = [row.jobs[0].settings() for row in rows]
    keys = sorted({key for found in settings for key in found})
    differ = [key for key in keys if len({str(found.get(key, "–")) for found in settings}) > 1]
    seeds = [", ".join(str(job.config.get("seed")) for job in row.jobs) for row in rows]
    lines = [
        (label(row), [seed, *(str(found.get(key, "–")) for key in differ)])
        for row, seed, found in zip(rows, seeds, settings, strict=True)
    ]
    same = "" if differ else "<p>No setting that changes results differs, but the seeds.</p>"
    return "<h3>Settings that differ</h3>" + same + table(["", "seed", *differ], lines)


def end_table(rows: list[Row], names: list[str]) -> str:
    lines = []
    for row in rows:
        curves = [row.curve(name) for name in names]
        last = max((steps[-1] for steps, _ in curves if steps), default="–")
        ends = [spread(values[-1], len(row.jobs)) if steps else "–" for steps, values in curves]
        lines.append((label(row), [str(last), *ends, *([verdicts(row)] * ("rankme" in names))]))
    return table(["", "step", *names, *(["verdict"] * ("rankme" in names))], lines)


def verdicts(row: Row) -> str:
    counts = Counter(str(job.verdict().get("verdict", "–")) for job in row.jobs)
    return ", ".join(f"{name} ({n})" if len(counts) > 1 else name for name, n in counts.items())


def figure(name: str, title: str, rows: list[Row]) -> tuple[dict, str]:
    """-> the numbers of the curves, HTML"""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    numbers, drawing, legend = {}, Figure((4.3, 2.7), layout="constrained"), []
    axes = drawing.subplots()
    for row in rows:
        steps, values = row.curve(name)
        if not steps:
            continue
        legend.append(f"<li>{label(row)}</li>")
        middle = values.mean(axis=1)
        numbers[row.label] = {"steps": steps, "mean": readable(middle)}
        marker = "o" if len(steps) <= FEW_POINTS else ""
        style = {"color": row.colour, "linestyle": (0, row.dashes) if row.dashes else "-"}
        axes.plot(steps, middle, marker=marker, markersize=3, linewidth=1.6, **style)
        if len(row.jobs) > 1:
            deviation = values.std(axis=1, ddof=1)
            numbers[row.label]["std"] = readable(deviation)
            band = (middle - deviation, middle + deviation)
            axes.fill_between(steps, *band, color=row.colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": name}):  # the same page from the same jobs
        drawing.savefig(file, format="svg", metadata={"Date": None})
    image = embedded(file.getvalue(), "svg+xml", title)
    caption = f"<figcaption>{escape(title)} <code>{name}</code></figcaption>"
    return numbers, f"<figure>{caption}{image}<ul>{''.join(legend)}</ul></figure>"


def readable(values: np.ndarray) -> list[float | None]:
    """By any reader of JSON, which has no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def embedded(contents: bytes, kind: str, text: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(contents).decode()}"
    return f'<img alt="{escape(text)}" src="{source}">'


def evaluations(rows: list[Row]) -> Iterable[str]:
    """A table for each protocol: numbers of different ones are not compared."""
    found: dict[tuple, dict[int, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows):
        for result in (result for job in row.jobs for result in job.results):
            name = f"{result.get('evaluation')}{', random init' * bool(result.get('random_init'))}"
            key = (name, str(result.get("dataset", "")), str(result.get("protocol", "")))
            found[key][number].append(result["results"])
    if found:
        yield "<h2>Evaluations</h2>"
    for (name, dataset, protocol), by_row in sorted(found.items()):
        metrics = list(dict.fromkeys(m for results in by_row.values() for r in results for m in r))
        lines = []
        for number, results in by_row.items():
            of = len(rows[number].jobs)
            values = [[r[m] for r in results if r.get(m) is not None] for m in metrics]
            cells = [spread(np.array(v, dtype=float), of) if v else "–" for v in values]
            lines.append((label(rows[number]), cells))
        about = " ".join(filter(None, [protocol, dataset and f"({dataset})"]))
        yield f"<h3>{escape(name)}</h3><p>{escape(about)}</p>" + table(["", *metrics], lines)


def pictures(jobs: list[Job]) -> Iterable[str]:
    if any(job.pictures for job in jobs):
        yield "<h2>Pictures</h2>"
    for job in jobs:
        for path in job.pictures:
            text = f"{job.name}: {path.stem}"
            image = embedded(path.read_bytes(), "png", text)
            yield f"<figure><figcaption>{escape(text)}</figcaption>{image}</figure>"


def runs_table(jobs: list[Job]) -> str:
    lines = []
    for job in jobs:
        verdict = job.verdict()
        since = f"{verdict['verdict']} since step {verdict['since']}" if verdict else "–"
        command = " ".join(job.environment.get("command", []))
        cells = [str(job.last_step), since, verdict.get("reason", "–"), str(job.folder), command]
        lines.append((escape(job.name), cells))
    return table(["", "last step", "features", "reason", "folder", "command"], lines)


def environments(jobs: list[Job]) -> str:
    """Runs with the same one share a line."""
    alike: dict[tuple, list[str]] = defaultdict(list)
    for job in jobs:
        seen = job.environment
        commit = str(seen.get("git_commit") or "–")[:12]
        changed = ", ".join(seen.get("git_uncommitted", [])) or "–"
        packages = ", ".join(f"{k} {v}" for k, v in seen.get("packages", {}).items())
        alike[commit, changed, str(seen.get("python", "–")), packages].append(job.name)
    lines = [(escape(", ".join(names)), cells) for cells, names in alike.items()]
    return table(["", "commit", "uncommitted", "python", "packages"], lines)
