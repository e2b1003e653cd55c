"""The command line of a measurement: the keys of a config, and some of its own."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import NoReturn

from launch.command import run_worker


def run_bench(main: Callable, description: str, **own: int | str) -> NoReturn:
    """Run main(cfg, **own). own: its keys that no config has, with their defaults."""
    for text in sys.argv[1:]:
        name, _, value = text.partition("=")
        if name not in own:
            continue
        if isinstance(own[name], int) and not value.isdecimal():
            sys.exit(f"error: {text}: expected a whole number")
        own[name] = type(own[name])(value)
        sys.argv.remove(text)
    run_worker(partial(main, **own), description)


def show(result: dict) -> None:
    """As JSON, numbers to four digits."""
    rounded = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in result.items()
    }
    print(json.dumps(rounded, indent=2), flush=True)
