"""From the command line to a checked configuration. Imports neither torch nor the models, so that
`--help`, `--cfg job` and submission answer at once."""

import argparse
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
# The only places where a key may be added with +key=value: what they hold is passed through.
OPEN_KEYS = ("dataset.options.",)


class ConfigError(Exception):
    """One sentence for the user, who can mend it: exit code 2, no traceback."""


@dataclass
class Command:
    config_name: str
    config_dir: Path
    show_config: bool
    multirun: bool
    overrides: list[str]


def parse_command_line(arguments: list[str], description: str) -> Command:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=describe_configs(),
    )
    parser.add_argument("--config-name", "-cn", default="lmim", metavar="NAME")
    parser.add_argument("--config-dir", "-cd", default=CONFIG_DIR, type=Path, metavar="DIR")
    parser.add_argument("--cfg", "-c", choices=["job"], help="print the composed config and stop")
    parser.add_argument("--multirun", "-m", action="store_true", help="one run per value of a,b,c")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args(arguments)
    return Command(
        config_name=parsed.config_name,
        config_dir=parsed.config_dir.resolve(),
        show_config=parsed.cfg is not None,
        multirun=parsed.multirun,
        overrides=parsed.overrides,
    )


def describe_configs() -> str:
    """The epilog of --help: what can be chosen."""
    lines = ["configs (--config-name):", "  " + "  ".join(config_names(CONFIG_DIR)), ""]
    lines.append("groups (group=choice):")
    for group in sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir()):
        lines.append(f"  {group.name:8} " + "  ".join(config_names(group)))
    lines.append("\nkeys: python launcher.py --config-name=NAME --cfg job")
    return "\n".join(lines)


def config_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def compose_config(
    config_name: str, overrides: list[str], config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """The composed config. Hydra's errors become one sentence each."""
    check_overrides(overrides)
    if not (config_dir / f"{config_name}.yaml").is_file():
        raise ConfigError(
            f"--config-name={config_name}: no such config in {config_dir}; "
            f"valid: {', '.join(config_names(config_dir))}"
        )
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            config = compose(config_name, overrides)
        OmegaConf.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, config_name, config_dir)) from error
    return config


def check_overrides(overrides: list[str]) -> None:
    for override in overrides:
        key = override.split("=")[0]
        if "=" not in override or not key.lstrip("+~"):
            raise ConfigError(f"'{override}' is not of the form key=value")
        added = key.startswith(("+", "~"))
        if added and not key.lstrip("+~").startswith(OPEN_KEYS):
            raise ConfigError(
                f"{key}: keys can be set (key=value) but neither added nor removed, "
                f"because every key is read by something"
            )


def explain(error: Exception, config_name: str, config_dir: Path) -> str:
    message = str(error)
    if unknown := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", message):
        return unknown_key(unknown.group(2), config_name, config_dir)
    if isinstance(error, ConfigCompositionException) and (cause := error.__cause__) is not None:
        if "full_key" in str(cause):
            return explain(cause, config_name, config_dir)
        message = f"{message}: {cause}"
    if missing := re.search(r"Could not find '(\w+)/([^']+)'", message):
        group, choice = missing.groups()
        valid = ", ".join(config_names(config_dir / group))
        return f"{group}={choice}: no such choice; valid: {valid}"
    if no_group := re.search(r"Could not override '([^'@]+)'", message):
        return unknown_key(no_group.group(1), config_name, config_dir)
    return " ".join(message.split())


def unknown_key(key: str, config_name: str, config_dir: Path) -> str:
    known = flat_keys(compose_config(config_name, [], config_dir))
    close = difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --cfg job for the valid ones"
    return f"{key}: unknown key; {hint}"


def flat_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Dotted names of all leaves."""
    keys = []
    for key in config:
        node = OmegaConf.select(config, str(key), throw_on_missing=False)
        name = f"{prefix}{key}"
        keys += flat_keys(node, f"{name}.") if isinstance(node, DictConfig) and node else [name]
    return keys


def job_directory(cfg: DictConfig) -> Path:
    """A pure function of the config: a requeued job finds itself again."""
    return Path(cfg.output_dir) / cfg.job_name
