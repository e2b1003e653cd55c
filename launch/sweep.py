"""Sweeps: -m key=a,b,c makes one run per value, and one per combination of several such keys. The
section `sweep` of an experiment adds to them what the command line does not set itself."""

import re
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from hydra.core.override_parser.types import ValueType
from omegaconf import DictConfig, OmegaConf

from launch.config import (
    CONFIG_DIR,
    EXPERIMENT,
    SWEEP,
    ConfigError,
    compose_config,
    parse_override,
    read_first,
)

VARIANTS = "variants"  # in `sweep`: overrides of any keys, which are not combined


class Choice(NamedTuple):
    """What one key of the command line, or of an experiment's `sweep`, adds to a run."""

    overrides: list[str]
    name: str = ""  # what job_name gets for it


def compose_all(command: Namespace) -> list[DictConfig]:
    """One config, or one per point of a sweep. What several experiments have in common is there
    once."""
    if not command.multirun:
        return [compose_config(command.config_name, command.overrides, command.config_dir)]
    configs: dict[str, DictConfig] = {}
    recipe = None
    for typed, own in expand_sweep(command):
        overrides = [text for choice in [*typed, *own] for text in choice.overrides]
        cfg = compose_config(command.config_name, overrides, command.config_dir)
        if "job_name" in cfg:
            recipe = recipe or compose_config(command.config_name, [], command.config_dir)
            parts = [*(choice.name for choice in typed), *changes(cfg, recipe, own)]
            cfg.job_name += without_signs("".join(parts))
        name = cfg.get("job_name", str(len(configs)))
        if configs.setdefault(name, cfg) != cfg:
            raise ConfigError("--multirun: expected values whose folders get different names")
    return [*configs.values()]


def expand_sweep(command: Namespace) -> list[tuple[list[Choice], list[Choice]]]:
    """Of each run: what the command line chooses, and what its experiment does."""
    points = product(*map(choices_of, command.overrides))
    return [
        (list(typed), list(own))
        for typed in points
        for own in product(*own_axes(command, [text for choice in typed for text in choice[0]]))
    ]


def choices_of(text: str) -> list[Choice]:
    """Of one override of the command line."""
    override = parse_override(text)
    if not override.is_sweep_override():
        return [Choice([text])]
    if override.key_or_group == "job_name":
        raise ConfigError(f"{text}: expected one value; each run of a sweep gets its own name")
    if override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
        raise ConfigError(f"{text}: expected values with commas between them, or range(a,b)")
    key, values = override.get_key_element(), override.sweep_string_iterator()
    is_experiment = override.key_or_group == EXPERIMENT  # whose part own_axes adds
    return [
        Choice([f"{key}={value}"], "" if is_experiment else name_part(key, value))
        for value in values
    ]


def own_axes(command: Namespace, overrides: list[str]) -> list[list[Choice]]:
    """Of the experiment that these choose."""
    typed = {override.key_or_group: override.value() for override in map(parse_override, overrides)}
    name = str(typed.get(EXPERIMENT))
    contents = read_first(f"{EXPERIMENT}/{name}", [command.config_dir, CONFIG_DIR])
    sweep = contents.get(SWEEP, {})
    if not isinstance(sweep, dict) or not all(isinstance(v, list) for v in sweep.values()):
        raise ConfigError(f"{EXPERIMENT}={name}: expected a list for each key of its {SWEEP}")
    # One that changes nothing but by its sweep shares its runs with others.
    axes = [[Choice([], name_part(EXPERIMENT, name))]] if contents.keys() - {SWEEP} else []
    for key, values in sweep.items():
        texts = map(str, values) if key == VARIANTS else (f"{key}={value}" for value in values)
        choices = [Choice(text.split()) for text in texts]
        axes.append(
            [c for c in choices if not typed.keys() & {text.partition("=")[0] for text in c[0]}]
        )
    return [axis for axis in axes if axis]


def changes(cfg: DictConfig, recipe: DictConfig, choices: list[Choice]) -> Iterator[str]:
    """Parts of a folder's name, for what is not as in the recipe."""
    for choice in choices:
        yield choice.name
        for text in choice.overrides:
            key, _, typed = text.partition("=")
            value = OmegaConf.select(cfg, key)
            if value != OmegaConf.select(recipe, key):
                yield name_part(key, typed if isinstance(value, DictConfig) else str(value))


def name_part(key: str, value: str) -> str:
    """Part of a folder's name."""
    return f"-{key.lstrip('+')}={value}".replace("/", "_")


def without_signs(suffix: str) -> str:
    """-seed=0-encoder=vit_tiny -> -seed0-encoder-vit_tiny: can be typed in any shell."""
    words = re.sub(r"=['\"]?(?=[a-zA-Z])", "-", suffix)
    return re.sub(r"[^\w.+-]+", "_", re.sub(r"['\"=]", "", words))
