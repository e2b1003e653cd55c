"""Several evaluations of one backbone, and one table of their results.

python launcher.py --config-name=evaluate pretrained=checkpoints/lmim-vit_base \\
    'evals=[nn,linear_probe,few_shot,collapse]' data_path=/path/to/imagenet

Each of them runs with its own config; `settings` changes keys of these. The results of each are in
output_dir/job_name/NAME/results, the table in output_dir/job_name/results/evaluate-*.{md,json}.
"""

import importlib
from itertools import product
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from eval.common import EvalRun, run_joined, worker
from launch.command import run_worker
from launch.config import ConfigError, compose_config
from launch.job import is_restart
from launch.results import resumes
from launch.validate import ABSENT, check_config
from util.files import write_json, write_whole

# One name can be two protocols of one worker.
PROTOCOLS = {
    "nn": ("nn", ["protocol=paper"]),
    "knn": ("nn", ["protocol=knn", "final_norm=True"]),
    "patches_knn": ("segmentation", ["method=knn"]),
    "patches_linear": ("segmentation", ["method=linear"]),
    "clusters": ("segmentation", ["segments=[truth]"]),
}
# All other keys that this config has in common with an evaluation's are taken over from here.
OWN = {"worker", "final_norm"}
OWN_OF_TRAININGS = {"batch_size", "precision"}

# On ImageNet-1K; not measured here. Leave-one-out nearest neighbours have their own column: they
# are not comparable to a k-NN with a bank of training images.
PUBLISHED = """
| published, ViT-B/16 | nn (leave-one-out) | knn (training bank) | linear_probe | finetune |
| --- | ---: | ---: | ---: | ---: |
| Latent MIM, 800 epochs | 50.1 | - | 72.0 | 83.0 |
| MAE, 1600 epochs | - | - | 68.0 | 83.6 |
| I-JEPA, 600 epochs | - | - | 72.9 | - |
| DINO | - | 76.1 | 78.2 | 82.8 |
| iBOT | - | 77.3 | 79.8 | 84.1 |"""


def evaluate(run: EvalRun) -> None:
    cfg = run.cfg
    run.backbone.cpu()  # it is only described: each evaluation loads its own
    if not cfg.final_norm:
        raise ConfigError("final_norm=False: expected settings=['NAME.final_norm=False']")
    for setting in cfg.settings:
        if setting.partition(".")[0] not in cfg.evals:
            names = ", ".join(cfg.evals)
            raise ConfigError(f"settings={setting}: expected NAME.key=value, NAME one of {names}")
    variants = {"trained": False, "random init": True}
    if not cfg.beside_random_init:
        variants = {"random init" if cfg.random_init else "trained": cfg.random_init}
    # Composed before the first one runs, so that a wrong key in `settings` ends it at once.
    runs = product(cfg.evals, variants)
    plan = {(name, label): compose(cfg, name, variants[label]) for name, label in runs}
    found: dict[str, dict[str, dict]] = {name: {} for name in cfg.evals}
    for (name, label), own in plan.items():
        module = importlib.import_module(own.worker)
        found[name][label] = run_joined(own, run.ranks, module.evaluate).report
    if not run.ranks.is_main:
        return
    text = markdown(found) + ("\n" + PUBLISHED) * (cfg.dataset.name == "imagenet")
    contents = {"backbone": run.backbone.describe(), "dataset": cfg.dataset.name}
    path = run.result_path()
    page = path.with_name(f"{path.stem}.md")
    write_whole(page, f"{text}\n".encode())
    write_json(path, contents | {"evaluations": found})
    run.say(f"\n{text}\n\ntable  {page}")


def compose(cfg: DictConfig, name: str, random_init: bool) -> DictConfig:
    """The evaluation's own config, with what all of them share and what `settings` says."""
    config_name, overrides = PROTOCOLS.get(name, (name, []))
    mine = [s.partition(".")[2] for s in cfg.settings if s.startswith(f"{name}.")]
    given = compose_config(config_name, [*overrides, *mine])
    own = given.copy()
    kept = OWN | OWN_OF_TRAININGS if "epochs" in own else OWN
    for key in (own.keys() & cfg.keys()) - kept:
        own[key] = cfg[key]
    for setting in mine:  # also a part of a section
        key = setting.partition("=")[0].lstrip("+~")
        value = OmegaConf.select(given, key, default=ABSENT)
        if value is not ABSENT:
            OmegaConf.update(own, key, value, merge=False, force_add=True)
    own.random_init = random_init
    own.output_dir = str(Path(cfg.output_dir) / cfg.job_name)
    own.job_name = f"{name}-random-init" if random_init else name
    if "overwrite" in own:
        # From the beginning, unless Slurm has requeued the job: then it goes on where it was.
        own.overwrite = not (own.resume or is_restart())
        own.resume = resumes(own)
    check_config(own)
    return own


def markdown(found: dict[str, dict[str, dict]]) -> str:
    labels = list(next(iter(found.values())))
    rows = [["evaluation", "metric", *labels]]
    for name, variants in found.items():
        for metric in variants[labels[0]]["results"]:
            values = [variants[label]["results"].get(metric, float("nan")) for label in labels]
            rows.append([name, metric, *(f"{value:.4g}" for value in values)])
    protocols = [f"- {name}: {found[name][labels[0]]['protocol']}" for name in found]
    return "\n".join([table(rows), "", *protocols])


def table(rows: list[list[str]]) -> str:
    """Of Markdown; the first row is the header."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="evaluate")
