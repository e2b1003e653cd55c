"""Compose the configuration of a run, check it, and run it: here, or on Slurm.

python launcher.py --config-name=demo
python launcher.py --config-name=lmim dataset=imagenet data_path=/path/to/imagenet env.ngpu=8 ...
python launcher.py -m seed=1,2,3 ...    (a sweep: one run per value)
"""

import sys

from omegaconf import DictConfig, OmegaConf

from util.command import leave, say_error
from util.config import Command, ConfigError, compose_config, parse_command_line
from util.sweep import expand_sweep
from util.validate import check_config


def main() -> int:
    """-> exit code"""
    command = parse_command_line(sys.argv[1:], description=__doc__)
    try:
        configs = compose_all(command)
        if command.show_config:
            print("---\n".join(OmegaConf.to_yaml(cfg) for cfg in configs), end="")
            return 0
        for cfg in configs:
            check_config(cfg)
        return launch(configs)
    except ConfigError as error:
        say_error(error)
        return 2
    except KeyboardInterrupt:  # before there was anything to save
        return 130


def compose_all(command: Command) -> list[DictConfig]:
    """One config, or one per point of a sweep."""
    if not command.multirun:
        return [compose_config(command.config_name, command.overrides, command.config_dir)]
    configs = []
    for overrides, suffix in expand_sweep(command.overrides):
        cfg = compose_config(command.config_name, overrides, command.config_dir)
        cfg.job_name += suffix
        configs.append(cfg)
    return configs


def launch(configs: list[DictConfig]) -> int:
    """-> exit code. Torch is imported only where something runs on this machine."""
    cfg = configs[0]  # where to run is the same for all
    if cfg.env.slurm:
        from util.slurm import submit

        return submit(configs)
    from util.job import is_finished
    from util.local import run_here

    exit_codes = [0]
    for cfg in configs:
        if len(configs) > 1 and is_finished(cfg):  # of a sweep, what is missing
            continue
        exit_codes.append(run_here(cfg))
        if exit_codes[-1] > 128:  # interrupted: the rest of a sweep is not wanted either
            break
    return max(exit_codes)


if __name__ == "__main__":
    leave(main())
