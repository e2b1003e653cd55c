"""How a command ends: errors that a user can mend become one sentence and an exit code."""

import os
import signal
import sys
import time
from collections.abc import Callable

from omegaconf import DictConfig, OmegaConf

from util.config import ConfigError, compose_config, parse_command_line
from util.validate import check_config

GRACE_SECONDS = 5


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
    """One line on stderr."""
    rank = int(os.environ.get("RANK", 0))
    if rank != 0:
        wait_for_first_process()
    where = f"[rank {rank}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"{where}error: {error}", file=sys.stderr, flush=True)


def wait_for_first_process() -> None:
    """What all processes find alike, the first one says; torchrun ends the others as soon as it has
    left. One that is still there after this has a problem of its own to tell."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)


def stop(error: Exception) -> None:
    say_error(error)
    sys.exit(2)
