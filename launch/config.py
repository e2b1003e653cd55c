"""From the command line to the composed configuration. Imports neither torch nor the models, so
that `--help`, `--cfg job` and submission answer at once."""

import argparse
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENT = "experiment"  # applied last, after the config's own values
SWEEP = "sweep"  # in an experiment: what -m runs (launch/sweep.py)
USER_GROUPS = ("local", EXPERIMENT)  # the user's own settings, not shipped
# The only sections where a key may be added: what they hold is passed through.
OPEN_SECTIONS = ("dataset.options", "env.slurm_extra", "env.nccl")
NOT_HYDRA = (
    "expected a key of the config or a flag of --help, because Hydra composes the config only: "
    "output_dir and job_name say where a run lives, env.* how it runs, -m starts a sweep, "
    "and there is no tab completion"
)
PATHS = ("output_dir", "data_path", "pretrained", "pretrained_weights", "cache_dir")


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
        add_help=False,
    )
    parser.add_argument("--help", "-h", action="store_true", help="what can be chosen")
    parser.add_argument("--config-name", "-cn", default=config_name, metavar="NAME")
    parser.add_argument(
        *("--config-dir", "-cd", "--config-path", "-cp"),
        default=CONFIG_DIR,
        type=lambda folder: Path(folder).expanduser().resolve(),
        metavar="DIR",
        help="a folder of your own, laid out like configs/ and searched as well",
    )
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    parser.add_argument("--resolve", action="store_true", help="always so: values are resolved")
    parser.add_argument("--multirun", "-m", action="store_true", help="one run per value of a,b,c")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    command = parser.parse_intermixed_args(arguments)
    if "/" in command.config_name:  # a file
        if command.config_dir != CONFIG_DIR:
            valid = "a name without '/' next to --config-dir"
            raise ConfigError(f"--config-name={command.config_name}: expected {valid}")
        path = Path(command.config_name).expanduser().resolve()
        command.config_dir, command.config_name = path.parent, path.name
    if command.help:
        parser.epilog = describe_configs([command.config_dir, CONFIG_DIR])
        parser.print_help()
        parser.exit()
    return command


def describe_configs(folders: list[Path]) -> str:
    """The epilog of --help: what can be chosen, each with the comment that its file begins with."""
    lines = []
    for group in ["", *group_names(folders)]:
        lines.append(f"\n{group} ({group}=NAME):" if group else "configs (--config-name):")
        for name in group_choices(group, folders):
            path = next(path for f in folders if (path := f / group / f"{name}.yaml").exists())
            first = path.read_text().removeprefix("# @package _global_\n").partition("\n")[0]
            about = first.removeprefix("# ") if first.startswith("#") else ""
            lines.append(f"  {name:15} {textwrap.shorten(about, 61, placeholder='...')}".rstrip())
    lines.append("\nkeys: python launcher.py --config-name=NAME --cfg job")
    return "\n".join(lines)


def yaml_names(folders: list[Path]) -> list[str]:
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def group_names(folders: list[Path]) -> list[str]:
    return sorted({path.parent.name for folder in folders for path in folder.glob("*/*.yaml")})


def group_choices(group: str, folders: list[Path]) -> list[str]:
    return yaml_names([folder / group for folder in folders])


# --- composing ----------------------------------------------------------------------------------


def compose_config(
    config_name: str, overrides: list[str], config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """The composed config. Hydra's errors become one sentence each."""
    config_name = config_name.removesuffix(".yaml")
    # Of two files with the same name, the one next to the named config counts.
    folders = sorted(
        [config_dir, CONFIG_DIR], key=lambda folder: not (folder / f"{config_name}.yaml").is_file()
    )
    if not config_dir.is_dir():
        raise ConfigError(f"--config-dir={config_dir}: expected a folder of configs")
    names, groups = yaml_names(folders), group_names(folders)
    if config_name not in names:
        raise ConfigError(
            f"--config-name={config_name}: expected a config of {config_dir}, "
            f"one of {', '.join(names)}"
        )
    try:
        checked = [check_override(text, folders) for text in overrides]
        chosen = [str(choice.input_line) for choice in checked if choice.key_or_group in groups]
        config = deepcopy(compose_files(config_name, tuple(chosen), tuple(folders)))
        for override in checked:
            if override.key_or_group not in groups:
                apply(override, config)
        missing = sorted(OmegaConf.missing_keys(config))  # names the key of what is not resolved
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(explain(error)) from error
    if missing:
        raise ConfigError(f"{missing[0]}=???: expected a value, for which ??? holds the place")
    check_keys(config)
    change_paths(config, os.path.expanduser)
    return config


@cache
def compose_files(
    config_name: str, choices: tuple[str, ...], folders: tuple[Path, ...]
) -> DictConfig:
    """The config with these choices of its groups. Cached: Hydra takes longer than all the rest."""
    overrides = [*choices, f'hydra.searchpath=["file://{folders[1]}"]']
    if EXPERIMENT in choices_in(read_first(config_name, folders)):  # whose place it takes
        overrides = [text.replace(f"+{EXPERIMENT}=", f"{EXPERIMENT}=", 1) for text in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folders[0]), version_base="1.3"):
        config = compose(config_name, overrides, return_hydra_config=True)
    check_files(config_name, choices, config.hydra.runtime.choices, folders)
    with open_dict(config):
        del config["hydra"]
        config.pop(SWEEP, None)
    return config


def apply(override: Override, config: DictConfig) -> None:
    """Set, add or remove one key, as Hydra would."""
    key = override.key_or_group
    section, _, name = key.rpartition(".")
    if OmegaConf.is_list(OmegaConf.select(config, section)):
        raise ConfigError(f"{override.input_line}: expected {section}=[a,b], the whole list")
    try:
        if override.is_delete():
            with open_dict(config):
                del OmegaConf.select(config, section)[name]
        else:
            OmegaConf.update(config, key, override.value(), force_add=override.is_force_add())
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise ConfigError(unknown_key(key, config)) from error


def change_paths(cfg: DictConfig, change: Callable[[str], str]) -> None:
    """In place, each path of a config; of pretrained=FAMILY:FILE, or of several, the file."""
    for key in (*PATHS, "images", "dataset.options.index_folder"):
        separator, given = ":" if key == "pretrained" else "\0", OmegaConf.select(cfg, key)
        paths = []
        for path in given if OmegaConf.is_list(given) else [given]:
            family, colon, file = str(path).rpartition(separator)
            is_path = isinstance(path, str) and family != "timm"
            paths.append(family + colon + change(file) if is_path else path)
        if given is not None:
            OmegaConf.update(cfg, key, paths if OmegaConf.is_list(given) else paths[0])


def check_override(text: str, folders: list[Path]) -> Override:
    """Catch what Hydra would ignore, or answer with a traceback."""
    if (readable := text.encode(errors="backslashreplace").decode()) != text:
        raise ConfigError(f"{readable}: expected a text in UTF-8")
    override = parse_override(text)
    key = override.key_or_group
    if re.split("[./]", key)[0] == "hydra":
        raise ConfigError(f"{text}: {NOT_HYDRA}")
    if override.package is not None:
        raise ConfigError(f"{text}: expected a key without '@'")
    is_removed = override.is_delete() and not (is_open(key) and key not in OPEN_SECTIONS)
    if is_removed or (override.is_add() and key != EXPERIMENT):
        raise ConfigError(f"{text}: keys can be set (key=value) but neither added nor removed")
    if override.is_sweep_override():
        a_text = f"\"{key}='{text.partition('=')[2]}'\""
        raise ConfigError(f"{text}: expected one value; a list is {key}=[a,b], a text {a_text}")
    if key in group_names(folders):
        choices = group_choices(key, folders)
        if override.value() not in choices:
            raise ConfigError(f"{text}: expected one of {', '.join(choices)}")
    return override


def is_open(key: str) -> bool:
    return f"{key}.".startswith(tuple(f"{section}." for section in OPEN_SECTIONS))


def parse_override(text: str) -> Override:
    """Texts that Hydra would want in quotes are put in quotes. Where keys may be added, the + is
    implied."""
    key, equals, value = text.partition("=")
    if not key.strip("+~") or (not equals and not key.startswith("~")):
        raise ConfigError(f"'{text}' is not of the form key=value")
    if key.lstrip("+") == EXPERIMENT:
        key = f"+{EXPERIMENT}"
    elif is_open(key.lstrip("+")):
        key = f"++{key.lstrip('+')}"
    items = re.split(r",(?![^\[\](){}]*[\])}])", value)  # not at commas inside brackets
    for readable in (value, ",".join(map(quote, items))):
        with suppress(HydraException):
            return OverridesParser.create().parse_override(key + equals + readable)
    valid = f"{key.lstrip('+')}=VALUE with its quotes and brackets closed"
    raise ConfigError(f"{text}: the value cannot be read; expected {valid}")


def quote(value: str) -> str:
    """A plain word needs no quotes; a broken list or quotation stays one."""
    broken = value.startswith(tuple("[{'\"")) or any(value.count(mark) % 2 for mark in "'\"")
    if broken or re.fullmatch(r"[\w./:-]*", value, re.ASCII):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def check_files(
    config_name: str, typed: Sequence[str], chosen: DictConfig, folders: Sequence[Path]
) -> None:
    """Catch what Hydra would ignore in files. chosen: of each group, in the end."""
    groups = [f"{group}/{choice}" for group, choice in chosen.items()]
    for name in [*bases_of(config_name, folders), *groups]:
        contents = read_first(name, folders)
        is_experiment = name.startswith(f"{EXPERIMENT}/")
        for section in ("hydra",) if is_experiment else ("hydra", SWEEP):
            if section in contents:
                valid = f"no section '{section}', which would do nothing"
                raise ConfigError(f"{name}.yaml: expected {valid}")
        for group, choice in choices_in(contents).items() if is_experiment else ():
            if choice != chosen[group] and not any(t.startswith(f"{group}=") for t in typed):
                valid = f"{group}={choice} on the command line as well"
                raise ConfigError(f"{name}: expected {valid}, because {config_name} overrides it")


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's errors in one sentence."""
    text = str(error.__cause__ or error)
    if no_group := re.search(r"Could not override '([^'@]+)'", text):
        return f"{no_group.group(1)}: unknown key; the config has none in its defaults"
    if key := getattr(error, "full_key", None):
        return f"{key}: the value cannot be read ({text.splitlines()[0]})"
    return " ".join(text.partition("Config search path")[0].split())


# --- known keys ---------------------------------------------------------------------------------


def check_keys(config: DictConfig) -> None:
    """Hydra knows the keys on the command line; those in a user's own files are checked here."""
    worker = config.get("worker")
    if not shipped_keys(worker):
        return  # the user's own worker has keys of its own
    known = shipped_keys(worker) | group_keys()  # local settings may be meant for another worker
    for key, value in flatten(OmegaConf.to_container(config)).items():
        if key in known or is_open(key):
            continue
        if inside := sorted(name for name in known if name.startswith(f"{key}.")):
            raise ConfigError(f"{key}={value}: expected its keys one by one: {', '.join(inside)}")
        raise ConfigError(unknown_key(key, config))


def unknown_key(key: str, config: DictConfig) -> str:
    """With keys to choose from that this config has."""
    known = {*flatten(OmegaConf.to_container(config)), *map(str, config)} - {key}
    close = get_close_matches(key, sorted(known), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --cfg job for the valid ones"
    if (group := key.split(".")[0]) in USER_GROUPS:
        hint = f"the first line of configs/{group}/*.yaml must be '# @package _global_'"
    return f"{key}: unknown key; {hint}"


@cache
def shipped_keys(worker: str | None = None) -> dict[str, object]:
    """The keys of the shipped configs that name this worker (of all, without one) and of every
    choice of their groups, with a shipped value. Empty where no shipped config names it."""
    keys = {}
    for path in configs_of(worker):
        keys |= flatten(read_yaml(path))
    return keys | group_keys(groups_of(worker)) if keys else {}


@cache
def group_keys(groups: frozenset[str] | None = None) -> dict[str, object]:
    """The keys of every choice of these groups, or of all that are shipped."""
    keys = {}
    for path in CONFIG_DIR.glob("*/*.yaml"):
        group = path.parent.name
        if group not in USER_GROUPS and (groups is None or group in groups):
            is_global = path.read_text().startswith("# @package _global_")
            keys |= flatten(read_yaml(path), "" if is_global else f"{group}.")
    return keys


@cache
def groups_of(worker: str | None) -> frozenset[str]:
    """The groups in the defaults of the shipped configs of this worker."""
    return frozenset(group for path in configs_of(worker) for group in choices_in(read_yaml(path)))


def choices_in(contents: dict) -> dict[str, str]:
    """Of each group in the defaults of a file, with `override` and `optional` or without."""
    bases = [base for base in contents.get("defaults") or [] if isinstance(base, dict)]
    return {key.split()[-1].lstrip("/"): base[key] for base in bases for key in base}


def configs_of(worker: str | None) -> list[Path]:
    """Last those that name it themselves, and do not only build on one that does."""
    paths = sorted(CONFIG_DIR.glob("*.yaml"), key=lambda path: "worker" in read_yaml(path))
    return [path for path in paths if worker in (None, worker_of(path.stem, [CONFIG_DIR]))]


def worker_of(config_name: str, folders: Sequence[Path]) -> str | None:
    """The worker that a config names, or that it takes over from the one it builds on."""
    named = (read_first(name, folders).get("worker") for name in bases_of(config_name, folders))
    return next(filter(None, named), None)


def bases_of(config_name: str, folders: Sequence[Path]) -> Iterator[str]:
    """A config and those that it builds on."""
    yield config_name
    for base in read_first(config_name, folders).get("defaults") or []:
        if isinstance(base, str) and base not in ("_self_", config_name):
            yield from bases_of(base, folders)


def read_first(name: str, folders: Sequence[Path]) -> dict:
    files = (folder / f"{name}.yaml" for folder in folders)
    return next((read_yaml(file) for file in files if file.is_file()), {})


@cache
def read_yaml(path: Path) -> dict:
    contents = OmegaConf.to_container(OmegaConf.load(path))
    return contents if isinstance(contents, dict) else {}


def flatten(section: dict, prefix: str = "") -> dict[str, object]:
    """Dotted names of all leaves, with their values, without Hydra's `defaults`."""
    leaves = {}
    for key, value in section.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        elif key != "defaults":
            leaves[f"{prefix}{key}"] = value
    return leaves


def scaled(value, amount, full):
    """For configs: the value where the amount is full or more, less in proportion below; whole from
    1 on. What is wrong with the amount its own check says."""
    is_less = isinstance(amount, int | float) and 0 < amount < full
    share = value * amount / full if is_less else value
    return round(share) if share >= 1 else share


def patches(grid_size, share):
    """For configs: so many of the grid's patches, rounded."""
    return round(share * grid_size**2)


OmegaConf.register_new_resolver("scaled", scaled, replace=True)
OmegaConf.register_new_resolver("patches", patches, replace=True)


def job_directory(cfg: DictConfig) -> Path:
    """A pure function of the config: a requeued job finds itself again."""
    return Path(cfg.output_dir) / cfg.job_name


def processes_per_node(cfg: DictConfig) -> int:
    """One for each GPU; without GPUs as many as the config says."""
    return cfg.env.ngpu or cfg.env.tasks_per_node
