"""What the measurements share: the published recipe, command lines, and what they write."""

import argparse
import json
from pathlib import Path

import torch
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
PRECISIONS = ("fp32", "bf16", "fp16")


def read_config(name: str) -> dict:
    """As it stands in its file: what OmegaConf would compose or fill in is left as it is."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def read_recipe() -> dict:
    """configs/lmim.yaml, and which encoder, decoder, target and loss it chooses, by name."""
    recipe = read_config("lmim")
    for choice in recipe["defaults"]:
        if isinstance(choice, dict):
            recipe |= choice
    return recipe


RECIPE = read_recipe()
GRID = read_config(f"encoder/{RECIPE['encoder']}")["grid_size"]


def command_line(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    return parser


def add_training_options(parser: argparse.ArgumentParser, precision: str) -> None:
    """precision: the default"""
    encoders = sorted(path.stem for path in (CONFIGS / "encoder").glob("*.yaml"))
    parser.add_argument("--encoder", default="vit_small", choices=encoders)
    parser.add_argument("--precision", default=precision, choices=PRECISIONS)
    parser.add_argument("--compile", action="store_true")


def write_results(path: Path | None, results: dict | list[dict]) -> None:
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
