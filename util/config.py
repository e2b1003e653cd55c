"""From the command line to the composed configuration. Imports neither torch nor the models, so
that `--help`, `--cfg job` and submission answer at once."""

import argparse
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
LOCAL_GROUP = "local"  # the user's own settings, not shipped
# The only sections where a key may be added with +key=value: what they hold is passed through.
OPEN_SECTIONS = ("dataset.options", "env.slurm_extra", "env.nccl")


class UserError(Exception):
    """One sentence about something that the user can fix; printed without a traceback."""

    exit_code = 2  # bad input


class ConfigError(UserError):
    pass


class TrainingStopped(UserError):
    """The run cannot go on; the message says why and from where it can be taken up."""

    exit_code = 3


def parse_command_line(
    arguments: list[str], description: str, config_name: str = "lmim"
) -> argparse.Namespace:
    """-> config_name, config_dir, cfg, multirun, overrides"""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe_configs(),
    )
    parser.add_argument("--config-name", "-cn", default=config_name, metavar="NAME")
    parser.add_argument(
        "--config-dir",
        "-cd",
        default=CONFIG_DIR,
        type=lambda folder: Path(folder).resolve(),
        metavar="DIR",
        help="a folder of your own, laid out like configs/ and searched as well",
    )
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    parser.add_argument("--multirun", "-m", action="store_true", help="one run per value of a,b,c")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def describe_configs() -> str:
    """The epilog of --help: what can be chosen."""
    lines = ["configs (--config-name):", "  " + "  ".join(yaml_names([CONFIG_DIR])), ""]
    lines.append("groups (group=choice):")
    for group in group_names([CONFIG_DIR]):
        lines.append(f"  {group:8} " + "  ".join(group_choices(group, [CONFIG_DIR])))
    lines.append("\nkeys: python launcher.py --config-name=NAME --cfg job")
    return "\n".join(lines)


def yaml_names(folders: list[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def group_names(config_dirs: list[Path]) -> list[str]:
    return sorted({path.parent.name for folder in config_dirs for path in folder.glob("*/*.yaml")})


def group_choices(group: str, config_dirs: list[Path]) -> list[str]:
    return yaml_names([folder / group for folder in config_dirs])


# --- composing ----------------------------------------------------------------------------------


def compose_config(
    config_name: str, overrides: list[str], config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """The composed config. Hydra's errors become one sentence each."""
    config_name = config_name.removesuffix(".yaml")
    config_dirs = [config_dir, CONFIG_DIR]
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir={config_dir}: expected a folder of configs")
    if config_name not in yaml_names(config_dirs):
        valid = f"a config of {config_dir}, one of {', '.join(yaml_names(config_dirs))}"
        raise ConfigError(f"--config-name={config_name}: expected {valid}")
    for override in overrides:
        check_override(override, config_dirs)
    # Of two files with the same name, the one next to the named config counts.
    first, second = sorted(config_dirs, key=lambda d: not (d / f"{config_name}.yaml").is_file())
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(first), version_base="1.3"):
            config = compose(config_name, [*overrides, f'hydra.searchpath=["file://{second}"]'])
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, config_dirs)) from error
    check_keys(config)
    return config


def check_override(text: str, config_dirs: list[Path]) -> None:
    """Catch what Hydra would ignore, or answer with a traceback."""
    override = parse_override(text)
    key = override.key_or_group
    if override.package is not None or key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(unknown_key(text.split("=")[0], config_dirs))
    if (override.is_add() or override.is_delete()) and not is_open(key):
        raise ConfigError(f"{text}: keys can be set (key=value) but neither added nor removed")
    if override.is_sweep_override():
        valid = f"one value; a list is written {key}=[a,b], a text with a comma \"{key}='a,b'\""
        raise ConfigError(f"{text}: expected {valid}")
    if key in group_names(config_dirs):
        choices = group_choices(key, config_dirs)
        if override.value() not in choices:
            raise ConfigError(f"{text}: expected one of {', '.join(choices)}")


def is_open(key: str) -> bool:
    return key.startswith(tuple(f"{section}." for section in OPEN_SECTIONS))


def parse_override(text: str) -> Override:
    key, equals, _ = text.partition("=")
    if not key.strip("+~") or (not equals and not key.startswith("~")):
        raise ConfigError(f"'{text}' is not of the form key=value")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        valid = f"\"{key}='...'\" where it holds brackets, commas, colons or quotes"
        raise ConfigError(f"{text}: the value cannot be read; expected {valid}") from error


def explain(error: Exception, config_dirs: list[Path]) -> str:
    """Hydra's and OmegaConf's errors in one sentence."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    for message in map(str, causes):
        if unknown := re.search(r"(?s)is not in struct.*full_key: (\S+)", message):
            return unknown_key(unknown.group(1), config_dirs)
        if no_group := re.search(r"Could not override '([^'@]+)'", message):
            return unknown_key(no_group.group(1), config_dirs)
        if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
            group, choice = missing.groups()
            choices = ", ".join(group_choices(group, config_dirs))
            return f"{group}={choice}: expected one of {choices}"
    return ": ".join(" ".join(str(cause).split()) for cause in causes)


# --- known keys ---------------------------------------------------------------------------------


def check_keys(config: DictConfig) -> None:
    """Hydra knows the keys on the command line; those in a user's own files are checked here."""
    known = shipped_keys(config.get("worker"))
    if not known:
        return  # the user's own worker has keys of its own
    for key, value in flatten(OmegaConf.to_container(config)).items():
        if key in OPEN_SECTIONS or is_open(key):
            continue
        inside = sorted(name for name in known if name.startswith(f"{key}."))
        if inside:
            raise ConfigError(f"{key}={value}: expected its keys one by one: {', '.join(inside)}")
        if key not in known:
            raise ConfigError(unknown_key(key, [CONFIG_DIR]))


def unknown_key(key: str, config_dirs: list[Path]) -> str:
    known = [*shipped_keys(), *group_names(config_dirs)]
    close = get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --cfg job for the valid ones"
    if key.startswith(f"{LOCAL_GROUP}."):
        hint = "the first line of configs/local/default.yaml must be '# @package _global_'"
    return f"{key}: unknown key; {hint}"


@cache
def shipped_keys(worker: str | None = None) -> dict[str, object]:
    """The keys of the shipped configs that name this worker (of all, without one) and of every
    choice of every group, with a shipped value. Empty where no shipped config names it."""
    configs = [path for path in CONFIG_DIR.glob("*.yaml") if worker in (None, worker_of(path))]
    keys = {}
    for path in configs:
        keys |= flatten(read_yaml(path))
    if not configs:
        return keys
    for path in CONFIG_DIR.glob("*/*.yaml"):
        if path.parent.name != LOCAL_GROUP:
            is_global = path.read_text().startswith("# @package _global_")
            keys |= flatten(read_yaml(path), "" if is_global else f"{path.parent.name}.")
    return keys


def worker_of(path: Path) -> str | None:
    """The worker that a shipped config names, or that it takes over from the one it builds on."""
    contents = read_yaml(path)
    bases = [name for name in contents["defaults"] if isinstance(name, str) and name != "_self_"]
    return contents.get("worker") or next((worker_of(path.with_stem(base)) for base in bases), None)


def read_yaml(path: Path) -> dict:
    return OmegaConf.to_container(OmegaConf.load(path))


def flatten(section: dict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all leaves, with their values, without Hydra's `defaults`."""
    leaves = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        elif key != "defaults":
            leaves[f"{prefix}{key}"] = value
    return leaves


def job_directory(cfg: DictConfig) -> Path:
    """A pure function of the config: a requeued job finds itself again."""
    return Path(cfg.output_dir) / cfg.job_name


def processes_per_node(cfg: DictConfig) -> int:
    """One for each GPU; without GPUs as many as the config says."""
    return cfg.env.ngpu or cfg.env.tasks_per_node
