"""The paper's argument in numbers: trains what experiments describe, on digits and on textures,
evaluates each run, and writes tables, pictures and what they show.

python launcher.py --config-name=challenges env.parallel=2     # docs/challenges.md
python launcher.py --config-name=laboratory env.parallel=2     # docs/laboratory.md

Started again it goes on where it was. Curves of all runs: output_dir/job_name/report.html.
"""

import math
import re
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig

from bench.step import flops_per_image
from eval.evaluate import table
from launch import report
from launch.command import run_worker
from launch.config import CONFIG_DIR, compose_config, job_directory
from launch.job import git, list_checkpoints
from launch.local import run_side_by_side
from launch.results import is_finished, sha256_of
from launch.sweep import compose_all
from launch.validate import check_config
from util.build import open_split
from util.files import read_json, read_records, write_whole

MOSAICS = 3  # in the pictures
WORKERS = ("eval.nn", "eval.few_shot", "eval.segmentation", "eval.collapse", "eval.visualize")
FEATURES = {
    "RankMe": "collapse/rankme",
    "cosine of images": "collapse/mean_cosine",
    "cosine of tokens": "collapse/token_similarity",
    "position probe": "collapse/position_probe",
}
# Of each recipe its config, and by title evaluation/metric; the first one is judged by.
RECIPES = {
    "digits": ("demo", {
        "nearest neighbour": "nn/top1",
        "k-NN": "knn/k10_top1",
        "10 images per class": "few_shot/top1/10-shot",
    } | FEATURES),
    "textures": ("textures", {
        "linear probe of patches": "patches_linear/pixel_accuracy",
        "k-NN of patches": "patches_knn/accuracy_20",
        "ARI of clusters": "clusters/ari_truth",
    } | FEATURES),
}  # fmt: skip
# What the paper says of an experiment is that its own recipe is better; of these it says nothing.
UNCLAIMED = {"target-stopgrad", "target-frozen"}

Rows = dict[str, list["Run"]]  # of a table: its runs by label, those of the recipe first


class Run(NamedTuple):
    recipe: str
    label: str  # what its folder's name has more than the recipe's
    cfg: DictConfig

    @property
    def folder(self) -> Path:
        return job_directory(self.cfg)

    @property
    def evaluated(self) -> Path:
        """The folder of its evaluations"""
        return self.folder.with_name(f"{self.folder.name}-evaluated")

    @property
    def trained(self) -> dict:
        """What its training has come to"""
        return read_json(self.folder / "results" / f"{self.cfg.job_name}.json")

    def results(self) -> dict:
        """Read the evaluations of its last checkpoint; empty where any of them is missing."""
        sha256 = sha256_of(list_checkpoints(self.folder / "checkpoints")[0])
        for found in map(read_json, self.evaluated.glob("results/evaluate-*.json")):
            evaluations, backbone = found.get("evaluations", {}), found.get("backbone", {})
            is_whole = evaluations_of(self.recipe).keys() <= evaluations.keys()
            if is_whole and backbone.get("sha256") == sha256:
                return evaluations
        return {}


def main(cfg: DictConfig) -> None:
    Path(cfg.page).parent.mkdir(parents=True, exist_ok=True)
    plans = {name: plan(cfg, name) for name in RECIPES if cfg[name] is not None}
    runs = different_runs(plans)
    finish(cfg, [run.cfg for run in runs if not is_finished(run.cfg)])
    finish(cfg, [evaluation(run) for run in runs if not run.results()])
    pictures = draw(cfg, plans["textures"]) if "textures" in plans else {}
    jobs = ",".join(map(str, [run.folder for run in runs] + [run.evaluated for run in runs]))
    keys = [f"output_dir={cfg.output_dir}", f"job_name={cfg.job_name}", f"jobs=[{jobs}]"]
    report.main(compose_config("report", keys))
    text = "\n\n".join(describe(cfg, plans, pictures))
    write_whole(Path(cfg.page), text.encode() + b"\n")
    print(f"{len(runs)} runs: {cfg.page}")


def finish(cfg: DictConfig, configs: list[DictConfig]) -> None:
    if configs and (exit_code := run_side_by_side(configs, cfg.env.parallel, WORKERS)):
        sys.exit(exit_code)


# --- what runs ----------------------------------------------------------------------------------


def plan(cfg: DictConfig, name: str) -> dict[str, Rows]:
    """List the runs of each experiment on these images."""
    common = [f"output_dir={cfg.output_dir}", f"job_name={name}", "resume=True", *cfg[name]]
    command = Namespace(config_name=RECIPES[name][0], config_dir=CONFIG_DIR, multirun=True)
    found = {}
    for experiment in cfg.experiments:
        configs: dict[str, DictConfig] = {}
        for chosen in ([], [f"experiment={experiment}"]):
            command.overrides = [*chosen, *common]
            configs |= {own.job_name: own for own in compose_all(command)}
        rows: Rows = {}
        for own in configs.values():
            label = own.job_name.removeprefix(name).removeprefix(f"-seed{own.seed}")
            label = label.removeprefix("-").removeprefix("experiment-")
            if cfg.equal_gflop and label:
                cost = flops_per_image(rows[""][0].cfg)
                own.epochs = round(own.epochs * cost / flops_per_image(own))
            check_config(own)
            rows.setdefault(label, []).append(Run(name, label, own))
        found[experiment] = rows
        print(f"{experiment} on {name}: {len(configs)} runs", flush=True)
    return found


def different_runs(plans: dict[str, dict[str, Rows]]) -> list[Run]:
    """List each run once: experiments share those of the recipe."""
    tables = [rows for plan in plans.values() for rows in plan.values()]
    found = {run.folder: run for rows in tables for runs in rows.values() for run in runs}
    return [*found.values()]


def evaluations_of(recipe: str) -> dict[str, None]:
    """Name the evaluations of a recipe, in the order of its columns."""
    return dict.fromkeys(path.split("/")[0] for path in RECIPES[recipe][1].values())


def evaluation(run: Run) -> DictConfig:
    keys = [
        f"pretrained={run.folder}",
        f"output_dir={run.evaluated.parent}",
        f"job_name={run.evaluated.name}",
        f"evals=[{','.join(evaluations_of(run.recipe))}]",
        f"seed={run.cfg.seed}",  # of the random weights, too
        f"beside_random_init={not run.label}",
    ]
    cfg = compose_config("evaluate", keys)
    cfg.dataset = run.cfg.dataset
    return cfg


def draw(cfg: DictConfig, plan: dict[str, Rows]) -> dict[str, Path]:
    """Draw clusters of a few mosaics for the first seed of each row: the picture by experiment."""
    folder = Path(cfg.output_dir) / "mosaics"
    folder.mkdir(exist_ok=True)
    mosaics = open_split(next(iter(plan.values()))[""][0].cfg, "eval")
    for index in range(MOSAICS):
        mosaics.load(index).save(folder / f"{index}.png")
    drawn = {}
    for experiment, rows in plan.items():
        firsts = ",".join(str(runs[0].folder) for runs in rows.values())
        keys = [f"pretrained=[{firsts}]", f"images={folder}"]
        keys += [f"output_dir={cfg.output_dir}", f"job_name={experiment}", "dataset=textures"]
        keys += ["clusters=[4]", "max_iter=null", "point=null", "controls=[pixels]"]
        drawn[experiment] = compose_config("visualize", keys)
    finish(cfg, [*drawn.values()])
    return {name: job_directory(own) / "results/pictures/all.png" for name, own in drawn.items()}


# --- what they show -----------------------------------------------------------------------------


def describe(
    cfg: DictConfig, plans: dict[str, dict[str, Rows]], pictures: dict[str, Path]
) -> Iterator[str]:
    """Write the parts of the page."""
    yield f"# {cfg.title}\n\n```bash\n{cfg.command}\n```"
    runs = different_runs(plans)
    seconds = sum(run.trained["seconds"] for run in runs)
    settings = "; ".join(f"{name}: {' '.join(cfg[name])}" for name in plans)
    yield (
        f"{date.today()}, commit {git('rev-parse', '--short', 'HEAD')}: {len(runs)} runs, "
        f"{seconds / 60:.0f} minutes of training, {cfg.env.parallel} at a time ({settings}). Mean "
        f"± standard deviation over seeds. Cosines and position probe are those of "
        f"[collapse](evaluation.md), GFLOP those of an image in training."
    )
    if cfg.note:
        yield cfg.note
    for experiment in cfg.experiments:
        yield f"## {experiment}"
        yield from introduce(experiment)
        for name, own in plans.items():
            yield from describe_rows(name, experiment, own[experiment])
        if experiment in pictures:
            figure = Path(cfg.page).parents[1] / "figs" / f"{experiment}.png"
            figure.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(pictures[experiment], figure)
            yield f"![Clusters and principal components]({Path('..') / 'figs' / figure.name})"


def introduce(experiment: str) -> list[str]:
    """Quote the comment that its config begins with: its paragraphs without the command, which is
    indented, and without what it says of changed results."""
    head, *_ = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text().split("\n\n")
    paragraphs = re.sub(r"^# ?(@.*\n)?", "", head, flags=re.MULTILINE).split("\n\n")
    kept = [text for text in paragraphs if not text.startswith((" ", "Changes results"))]
    return [text.replace("\n", " ") for text in kept]


def describe_rows(name: str, experiment: str, rows: Rows) -> Iterator[str]:
    """Write a table with a row per setting, and what it shows."""
    titles, seen = [*RECIPES[name][1]], []

    def line(title: str, numbers: dict[str, np.ndarray], *others: str) -> list[str]:
        return [title, *(report.spread(numbers[column], 0) for column in titles), *others]

    lines = [[name, *titles, "loss", "chance", "verdict", "GFLOP"]]
    lines.append(line("random weights", numbers_of(rows[""], "random init"), *"––––"))
    base = numbers_of(rows[""], "trained")[titles[0]]
    for label, runs in rows.items():
        numbers = numbers_of(runs, "trained")
        loss = report.spread(numbers["loss"], 0)
        chance = f"{numbers['chance'][0]:.4g}" if "chance" in numbers else "–"
        counted = Counter(run.trained["verdict"] for run in runs)
        verdicts = ", ".join(f"{verdict} {count}" for verdict, count in counted.items())
        gflop = f"{flops_per_image(runs[0].cfg) / 1e9:.3g}"
        title = f"`{label}`" if label else "recipe"
        lines.append(line(title, numbers, loss, chance, verdicts, gflop))
        if label:
            is_claimed = experiment.startswith("challenge_") and label not in UNCLAIMED
            what = compare(base, numbers[titles[0]], is_claimed)
            seen.append(f"- `{label}`, {titles[0]}: {what}.")
    yield table(lines)
    yield "\n".join(seen)


def numbers_of(runs: list[Run], weights: str) -> dict[str, np.ndarray]:
    """Read the numbers of each column, one per run."""
    evaluated = [run.results() for run in runs]
    numbers = {}
    for title, path in RECIPES[runs[0].recipe][1].items():
        name, metric = path.split("/", 1)
        numbers[title] = [found[name][weights]["results"][metric] for found in evaluated]
    for run in runs:
        logged = read_records(run.folder / "log.txt")
        last = next(record for record in reversed(logged) if "loss" in record)
        for title in last.keys() & {"loss", "chance"}:
            numbers.setdefault(title, []).append(last[title])
    return {title: np.array(found) for title, found in numbers.items()}


def compare(base: np.ndarray, values: np.ndarray, is_claimed: bool) -> str:
    """Say what a row shows. base, values: one number per seed, of the recipe and of the row;
    is_claimed: the paper says that the recipe is better."""
    lower = base.mean() - values.mean()
    text = f"{abs(lower):.1f} {'lower' if lower > 0 else 'higher'} than the recipe"
    if min(len(base), len(values)) < 2:
        return f"{text}, of one seed: not shown"
    limit = 2 * math.hypot(base.std(ddof=1), values.std(ddof=1))
    if abs(lower) < limit:
        return f"{text}, less than two standard deviations ({limit:.1f}): not shown"
    agreement = "as the paper says" if lower > 0 else "not as the paper says"
    return f"{text}: {agreement}" if is_claimed else text


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="challenges")
