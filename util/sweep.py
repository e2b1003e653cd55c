"""Sweeps: -m key=a,b,c makes one run per value, and one per combination of several such keys."""

import re
from argparse import Namespace
from itertools import product

from hydra.core.override_parser.types import ValueType
from omegaconf import DictConfig

from util.config import ConfigError, compose_config, job_directory, parse_override


def compose_all(command: Namespace) -> list[DictConfig]:
    """One config, or one per point of a sweep."""
    points = expand_sweep(command.overrides) if command.multirun else [(command.overrides, "")]
    configs = []
    for overrides, suffix in points:
        cfg = compose_config(command.config_name, overrides, command.config_dir)
        if suffix and "job_name" in cfg:
            name = cfg.job_name
            cfg.job_name += suffix  # as folders were named once
            if not job_directory(cfg).exists():
                cfg.job_name = name + without_signs(suffix)
        configs.append(cfg)
    names = {cfg.job_name for cfg in configs if "job_name" in cfg}
    if 1 < len(configs) != len(names):
        raise ConfigError("--multirun: expected values whose folders get different names")
    return configs


def expand_sweep(overrides: list[str]) -> list[tuple[list[str], str]]:
    """-> the overrides of each run, and what its job_name gets to tell it from the others."""
    choices = []
    for text in overrides:
        override = parse_override(text)
        if not override.is_sweep_override():
            choices.append([(text, "")])
            continue
        if override.key_or_group == "job_name":
            raise ConfigError(f"{text}: expected one value; each run of a sweep gets its own name")
        if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
            raise ConfigError(f"{text}: expected values with commas between them, or range(a,b)")
        key = override.get_key_element()
        values = list(override.sweep_string_iterator())
        choices.append([(f"{key}={value}", name_part(key, value)) for value in values])
    return [
        ([text for text, _ in point], "".join(part for _, part in point))
        for point in product(*choices)
    ]


def name_part(key: str, value: str) -> str:
    """Part of a folder's name."""
    return f"-{key.lstrip('+')}={value}".replace("/", "_")


def without_signs(suffix: str) -> str:
    """-seed=0-encoder=vit_tiny -> -seed0-encoder-vit_tiny: can be typed in any shell."""
    words = re.sub(r"=['\"]?(?=[a-zA-Z])", "-", suffix)
    return re.sub(r"[^\w.+-]+", "_", re.sub(r"['\"=]", "", words))
