"""How a command ends: errors that a user can mend become one sentence and an exit code."""

import os
import sys
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from util.config import ConfigError, compose_config, parse_command_line
from util.validate import check_config


def run_worker(main: Callable[[DictConfig], None], description: str) -> None:
    """The command line of a worker that was started by hand or by torchrun."""
    command = parse_command_line(sys.argv[1:], description)
    try:
        cfg = compose_config(command.config_name, command.overrides, command.config_dir)
        if command.show_config:
            print(OmegaConf.to_yaml(cfg), end="")
            return
        check_config(cfg)
    except ConfigError as error:
        stop(error)
    sys.exit(call(main, cfg))


def call(main: Callable[[DictConfig], None], cfg: DictConfig) -> int:
    """Run it -> exit code. 0: done; 2: bad input; 1: it had to stop."""
    from data.base import DataError
    from util.checkpoint import CheckpointError
    from util.run_record import TrainingStopped

    try:
        main(cfg)
    except (ConfigError, DataError, CheckpointError) as error:
        say_error(error)
        return 2
    except TrainingStopped as error:
        say_error(error)
        return 1
    return 0


def say_error(error: Exception) -> None:
    """One line on stderr. What all processes find alike, only the first one says."""
    rank = int(os.environ.get("RANK", 0))
    if isinstance(error, ConfigError) and rank != 0:
        return
    where = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{where}error: {error}", file=sys.stderr, flush=True)


def stop(error: Exception) -> None:
    say_error(error)
    sys.exit(2)
