"""Sweeps: -m key=a,b,c makes one run per value, and one per combination of several such keys."""

from itertools import product

from util.config import ConfigError, parse_override


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
