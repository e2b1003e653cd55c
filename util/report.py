"""One page that needs no other file, of what jobs have left behind, laid over each other:

python launcher.py --config-name=report 'jobs=[checkpoints/demo,reference/*]'

Runs that differ by their seed alone are one row of each table and one band of each curve: mean and
standard deviation over the runs, at the steps that all of them have. An evaluation belongs to the
run whose checkpoint it has read, where that is among the jobs.
"""

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from omegaconf import DictConfig

from util.config import ConfigError, job_directory
from util.files import write_whole
from util.report_rows import CURVES, Job, Row, find_jobs, find_rows
from util.validate import is_number

TEMPLATE = Path(__file__).with_suffix(".html")
FEW_POINTS = 20  # are marked


def main(cfg: DictConfig) -> None:
    apart = find_jobs("apart", cfg.apart)
    found = find_jobs("jobs", cfg.jobs) | apart
    if not found:
        raise ConfigError("jobs=[]: expected folders of jobs, here or as apart=[FOLDER]")
    rows, jobs = find_rows(found, apart), [*found.values()]
    notes = [note for row in rows for note in row.notes()]
    page = Template(TEMPLATE.read_text()).substitute(describe(rows, jobs, notes))
    path = job_directory(cfg) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page.encode(errors="replace"))
    print(*notes, f"{len(jobs)} jobs in {len(rows)} rows: {path}", sep="\n")


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

    numbers, drawing, legend = {}, Figure((4.3, 2.7)), []
    axes = drawing.add_axes((0.17, 0.17, 0.81, 0.8))
    for row in rows:
        steps, values = row.curve(name)
        if not steps:
            continue
        legend.append(f"<li>{label(row)}</li>")
        middle = values.mean(axis=1)
        numbers[row.label] = {"steps": steps, "mean": readable(middle)}
        marker = "o" if len(steps) <= FEW_POINTS else ""
        (line,) = axes.plot(steps, middle, color=row.colour, marker=marker, markersize=3)
        # Dashed ones above, so that those below are seen.
        line.set(linewidth=1.6, linestyle=(0, row.dashes or None), zorder=3 if row.dashes else 2)
        if len(row.jobs) > 1:
            deviation = values.std(axis=1, ddof=1)
            numbers[row.label]["std"] = readable(deviation)
            band = (middle - deviation, middle + deviation)
            axes.fill_between(steps, *band, color=row.colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("step")
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(labelsize=9)
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
        for job in row.jobs:
            before: Counter = Counter()  # of the same kind: another layer, another checkpoint
            for result in job.results:
                name = str(result.get("evaluation"))
                name += ", random init" * bool(result.get("random_init"))
                key = (name, str(result.get("dataset", "")), str(result.get("protocol", "")))
                found[*key, before[key]][number].append(result)
                before[key] += 1
    if found:
        yield "<h2>Evaluations</h2>"
    for (name, dataset, protocol, nth), by_row in sorted(found.items()):
        lines, metrics = [], {m: 0 for rs in by_row.values() for r in rs for m in r["results"]}
        for number, results in by_row.items():
            values = [
                [r["results"][m] for r in results if is_number(r["results"].get(m))]
                for m in metrics
            ]
            of = len(rows[number].jobs)
            cells = [spread(np.array(found), of) if found else "–" for found in values]
            files = {Path(str(r.get("pretrained") or "–")).name for r in results}
            lines.append((label(rows[number]), [*cells, ", ".join(sorted(files))]))
        about = " ".join(filter(None, [protocol, dataset and f"({dataset})"]))
        yield f"<h3>{escape(name)}{f' ({nth + 1})' * (nth > 0)}</h3><p>{escape(about)}</p>"
        yield table(["", *metrics, "checkpoint"], lines)


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
        cells = [
            str(job.last_step or "–"),
            since,
            verdict.get("reason", "–"),
            str(job.folder),
            command,
        ]
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
