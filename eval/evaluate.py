"""Several evaluations of one backbone, and one table of their results.

python launcher.py --config-name=evaluate pretrained=checkpoints/lmim-vit_base \\
    'evals=[nn,linear_probe,few_shot,collapse]' data_path=/path/to/imagenet

Each of them runs with its own config; `settings` changes keys of these. The results of each are in
output_dir/job_name/NAME/results, the table in output_dir/job_name/results/evaluate.{md,json}.
"""

import importlib
from pathlib import Path

from omegaconf import DictConfig

from eval.common import EvalRun, run_evaluation, run_joined, write_json
from util.command import run_worker
from util.config import ConfigError, compose_config
from util.job import is_restart
from util.validate import check_config

# One name can be two protocols of one worker.
PROTOCOLS = {
    "nn": ("nn", ["protocol=paper"]),
    "knn": ("nn", ["protocol=knn", "final_norm=True"]),
}
# What an evaluation takes over from this config, where it has the key.
SHARED = (
    "pretrained pretrained_weights which layer image_side precision seed batch_size num_workers "
    "cache_dir data_path dataset env"
).split()
# Those that fine-tune or augment choose their own batch size and precision.
OWN = {"linear_probe": {"batch_size", "precision"}, "finetune": {"batch_size", "precision"}}

# ViT-B/16 on ImageNet-1K, as published; not measured here.
REFERENCES = {
    "Latent MIM, 800 epochs": {"nn": "50.1", "linear_probe": "72.0", "finetune": "83.0"},
    "MAE, 1600 epochs": {"linear_probe": "68.0", "finetune": "83.6"},
    "I-JEPA, 600 epochs": {"linear_probe": "72.9"},
    "DINO": {"knn": "76.1", "linear_probe": "78.2", "finetune": "82.8"},
    "iBOT": {"knn": "77.3", "linear_probe": "79.8", "finetune": "84.1"},
}


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "evaluate", evaluate)


def evaluate(run: EvalRun) -> None:
    cfg = run.cfg
    run.backbone.cpu()  # it is only described: each evaluation loads its own
    check_settings(cfg)
    variants = {"trained": False, "random init": True}
    if not cfg.beside_random_init:
        variants = {
            label: is_random
            for label, is_random in variants.items()
            if is_random == cfg.random_init
        }
    # Composed before the first one runs, so that a wrong key in `settings` ends it at once.
    plan = [
        (name, label, compose(cfg, name, label, is_random))
        for name in cfg.evals
        for label, is_random in variants.items()
    ]
    found: dict[str, dict[str, dict]] = {}
    for name, label, own_cfg in plan:
        worker = importlib.import_module(own_cfg.worker)
        worker_name = own_cfg.worker.rpartition(".")[2]
        own = run_joined(own_cfg, run.ranks, worker_name, worker.evaluate)
        found.setdefault(name, {})[label] = own.report
    if run.ranks.is_main:
        write_table(run, found)


def check_settings(cfg: DictConfig) -> None:
    if not cfg.final_norm:
        raise ConfigError(
            "final_norm=False: expected settings=['NAME.final_norm=False'], because each "
            "evaluation has its own"
        )
    for setting in cfg.settings:
        name = setting.partition(".")[0]
        if name not in cfg.evals:
            raise ConfigError(
                f"settings: {setting}: expected NAME.key=value with NAME one of "
                f"{', '.join(cfg.evals)}"
            )


def compose(cfg: DictConfig, name: str, label: str, random_init: bool) -> DictConfig:
    """The evaluation's own config, with what all of them share and what `settings` says."""
    config_name, overrides = PROTOCOLS.get(name, (name, []))
    mine = [s.partition(".")[2] for s in cfg.settings if s.startswith(f"{name}.")]
    own = compose_config(config_name, [*overrides, *mine])
    changed = {setting.partition("=")[0] for setting in mine}
    for key in SHARED:
        if key in own and key not in OWN.get(name, set()) | changed:
            own[key] = cfg[key]
    own.random_init = random_init
    own.output_dir = str(Path(cfg.output_dir) / cfg.job_name)
    own.job_name = name if label == "trained" else f"{name}-random-init"
    if "overwrite" in own:
        # From the beginning, unless Slurm has requeued the job: then it goes on where it was.
        own.resume = own.resume or is_restart()
        own.overwrite = not own.resume
    check_config(own)
    return own


# --- the table ----------------------------------------------------------------------------------


def write_table(run: EvalRun, found: dict[str, dict[str, dict]]) -> None:
    has_references = run.cfg.dataset.name == "imagenet"
    table = markdown(found, has_references)
    path = run.job / "results" / "evaluate.md"
    path.write_text(table + "\n")
    contents = {
        "backbone": run.backbone.describe(),
        "dataset": run.cfg.dataset.name,
        "evaluations": found,
        "references": REFERENCES if has_references else {},
    }
    write_json(run.job / "results" / "evaluate.json", contents)
    run.say(f"\n{table}\n\ntable  {path}")


def markdown(found: dict[str, dict[str, dict]], with_references: bool) -> str:
    labels = list(next(iter(found.values())))
    header = ["evaluation", "metric", *labels]
    rows = []
    for name, variants in found.items():
        for metric in variants[labels[0]]["results"]:
            values = [
                f"{variants[label]['results'].get(metric, float('nan')):.4g}" for label in labels
            ]
            rows.append([name, metric, *values])
    text = aligned_right(header, rows, from_column=2)
    protocols = "\n".join(
        f"- {name}: {variants[labels[0]]['protocol']}" for name, variants in found.items()
    )
    text = f"{text}\n\n{protocols}"
    return f"{text}\n\n{reference_table(list(found))}" if with_references else text


def reference_table(names: list[str]) -> str:
    """Published numbers. Leave-one-out nearest neighbours have their own column: they are not
    comparable to a k-NN with a bank of training images."""
    columns = [n for n in ("nn", "knn", "linear_probe", "finetune") if n in names]
    if not columns:
        return ""
    titles = {"nn": "nn (leave-one-out)", "knn": "knn (training bank)"}
    header = ["published, ViT-B/16", *[titles.get(name, name) for name in columns]]
    rows = [
        [method, *[numbers.get(name, "-") for name in columns]]
        for method, numbers in REFERENCES.items()
    ]
    return aligned_right(header, rows, from_column=1)


def aligned_right(header: list[str], rows: list[list[str]], from_column: int) -> str:
    """A table of Markdown."""
    rule = ["---"] * from_column + ["---:"] * (len(header) - from_column)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="evaluate")
