"""The paper's argument in numbers: trains what experiments describe, on digits and on textures,
evaluates each run, and writes tables, pictures and what they show.

python launcher.py --config-name=challenges env.parallel=2     # docs/challenges.md
python launcher.py --config-name=laboratory env.parallel=2     # docs/laboratory.md

Started again it goes on where it was. Curves of all runs: output_dir/job_name/report.html.
"""

import math
import shutil
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from datetime import date
from itertools import takewhile
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
from launch.report import spread
from launch.results import is_finished, sha256_of
from launch.sweep import compose_all
from launch.validate import check_config
from util.files import read_json, read_records, write_whole
from util.loaders import open_split

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
    pictures = draw(cfg, plans.get("textures", {}))
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


def plan(cfg: DictConfig, name: str) -> dict[str, list[Run]]:
    """List the runs of each experiment on these images, those of the recipe first."""
    common = [f"output_dir={cfg.output_dir}", f"job_name={name}", "resume=True", *cfg[name]]
    command = Namespace(config_name=RECIPES[name][0], config_dir=CONFIG_DIR, multirun=True)
    found = {}
    for experiment in cfg.experiments:
        runs: dict[str, Run] = {}
        for chosen in ([], [f"experiment={experiment}"]):
            command.overrides = [*chosen, *common]
            for own in compose_all(command):
                label = own.job_name.removeprefix(name).removeprefix(f"-seed{own.seed}")
                label = label.removeprefix("-").removeprefix("experiment-")
                runs[own.job_name] = Run(name, label, own)
        if cfg.equal_gflop:
            rows = by_label([*runs.values()])
            cost = {label: flops_per_image(own[0].cfg) for label, own in rows.items()}
            for run in runs.values():
                run.cfg.epochs = round(run.cfg.epochs * cost[""] / cost[run.label])
        for run in runs.values():
            check_config(run.cfg)
        found[experiment] = [*runs.values()]
        print(f"{experiment} on {name}: {len(runs)} runs", flush=True)
    return found


def different_runs(plans: dict[str, dict[str, list[Run]]]) -> list[Run]:
    """List each run once: experiments share those of the recipe."""
    found = {run.folder: run for plan in plans.values() for runs in plan.values() for run in runs}
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


def draw(cfg: DictConfig, runs: dict[str, list[Run]]) -> dict[str, Path]:
    """Draw clusters of a few mosaics for the first seed of each row: the picture by experiment."""
    if not runs:
        return {}
    folder = Path(cfg.output_dir) / "mosaics"
    folder.mkdir(exist_ok=True)
    mosaics = open_split(next(iter(runs.values()))[0].cfg, "eval")
    for index in range(MOSAICS):
        mosaics.load(index).save(folder / f"{index}.png")
    drawn = {}
    for experiment, own in runs.items():
        firsts = ",".join(str(row[0].folder) for row in by_label(own).values())
        keys = [f"pretrained=[{firsts}]", f"images={folder}"]
        keys += [f"output_dir={cfg.output_dir}", f"job_name={experiment}", "dataset=textures"]
        keys += ["clusters=[4]", "max_iter=null", "point=null", "controls=[pixels]"]
        drawn[experiment] = compose_config("visualize", keys)
    finish(cfg, [*drawn.values()])
    return {name: job_directory(own) / "results/pictures/all.png" for name, own in drawn.items()}


# --- what they show -----------------------------------------------------------------------------


def describe(
    cfg: DictConfig, plans: dict[str, dict[str, list[Run]]], pictures: dict[str, Path]
) -> Iterator[str]:
    """Write the parts of the page."""
    yield f"# {cfg.title}\n\n```bash\n{cfg.command}\n```"
    runs = different_runs(plans)
    seconds = sum(trained(run)["seconds"] for run in runs)
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


def introduce(experiment: str) -> Iterator[str]:
    """Quote the comment that its config begins with: its paragraphs without the command, which is
    indented, and without what it says of changed results."""
    lines = (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    texts = [line.removeprefix("#").removeprefix(" ") for line in comment]
    for paragraph in "\n".join(text for text in texts if not text.startswith("@")).split("\n\n"):
        if not paragraph.startswith((" ", "Changes results")):
            yield paragraph.replace("\n", " ")


def describe_rows(name: str, experiment: str, runs: list[Run]) -> Iterator[str]:
    """Write a table with a row per setting, and what it shows."""
    rows = by_label(runs)
    measured = {label: numbers_of(own, "trained") for label, own in rows.items()}
    titles, judged = [*RECIPES[name][1]], next(iter(RECIPES[name][1]))
    lines = [[name, *titles, "loss", "chance", "verdict", "GFLOP"]]
    random = numbers_of(rows[""], "random init")
    lines.append(["random weights", *(spread(random[title], 0) for title in titles), *"––––"])
    seen = []
    for label, numbers in measured.items():
        verdicts = Counter(trained(run)["verdict"] for run in rows[label])
        lines.append(
            [
                f"`{label}`" if label else "recipe",
                *(spread(numbers[title], 0) for title in [*titles, "loss"]),
                f"{numbers['chance'][0]:.4g}" if "chance" in numbers else "–",
                ", ".join(f"{verdict} {count}" for verdict, count in verdicts.items()),
                f"{flops_per_image(rows[label][0].cfg) / 1e9:.3g}",
            ]
        )
        if label:
            is_claimed = experiment.startswith("challenge_") and label not in UNCLAIMED
            what = compare(measured[""][judged], numbers[judged], is_claimed)
            seen.append(f"- `{label}`, {judged}: {what}.")
    yield table(lines)
    yield "\n".join(seen)


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.label, []).append(run)
    return rows


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


def trained(run: Run) -> dict:
    """Read what its training has come to."""
    return read_json(run.folder / "results" / f"{run.cfg.job_name}.json")


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
