"""One page that needs no other file, of what jobs have left behind, laid over each other:

python launcher.py --config-name=report 'jobs=[checkpoints/demo,reference/*]'

Runs that differ by their seed alone are one row of each table and one band of each curve: mean and
standard deviation over the runs, at the steps that all of them have. An evaluation belongs to the
run whose checkpoint it has read, where that is among the jobs.
"""

import base64
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment
from omegaconf import DictConfig

from launch.config import ConfigError, job_directory
from launch.report_rows import CURVES, Job, Row, find_jobs, find_rows
from launch.validate import is_number
from util.files import write_whole

TEMPLATE = Path(__file__).with_suffix(".html")
FEW_POINTS = 20  # are marked


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
