"""Every config composes, every key is known and read, and a mistake is answered in one sentence."""

import ast
import re
import shlex
import shutil
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch.config import (
    CONFIG_DIR,
    NOT_HYDRA,
    OPEN_SECTIONS,
    USER_GROUPS,
    ConfigError,
    compose_config,
    flatten,
    group_choices,
    group_names,
    job_directory,
    parse_command_line,
    read_yaml,
    shipped_keys,
    yaml_names,
)
from launch.validate import RULES, check_config
from models.losses import Objective
from util.build import OF_THE_SAME_NAME

ROOT = CONFIG_DIR.parent
CONFIGS = yaml_names([CONFIG_DIR])
CHOICES = [
    (group, choice)
    for group in group_names([CONFIG_DIR])
    for choice in group_choices(group, [CONFIG_DIR])
]
ENCODERS = group_choices("encoder", [CONFIG_DIR])
PUBLISHED = shlex.split(
    "--config-name=lmim worker=main_lmim encoder=vit_base decoder_depth=3 avg_sim_coeff=0.1 "
    "loss=infonce_patches patch_gap=4 epochs=800 warmup_epochs=40 blr=1.5e-4 min_lr_frac=0.25 "
    "weight_decay=0.05 batch_size=256 accum_iter=2 env.ngpu=8 dataset=imagenet resume=True "
    "output_dir=./checkpoints data_path=/path/to/imagenet env.slurm=True env.distributed=True"
)


def compose_flat(config_name: str, *overrides: str, **settings) -> dict[str, object]:
    return flatten(OmegaConf.to_container(compose_config(config_name, list(overrides), **settings)))


def error_of(config_name: str, *overrides: str, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(config_name, list(overrides), **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- What is shipped. ----------------------------------------------------------------------------


@pytest.mark.parametrize("config_name", CONFIGS)
def test_every_config_composes_and_is_valid(config_name, tmp_path):
    check_config(compose_config(config_name, [f"output_dir={tmp_path}"]))


def groups_of(config_name: str) -> set[str]:
    bases = read_yaml(CONFIG_DIR / f"{config_name}.yaml")["defaults"]
    return {group for base in bases if isinstance(base, dict) for group in base}


@pytest.mark.parametrize("config_name", ["lmim", "nn"])
def test_every_choice_composes(config_name):
    """Choices of different groups do not exclude each other: as many at once as there are. Of nn
    the groups that lmim lacks."""
    others = groups_of("lmim") if config_name == "nn" else set()
    groups = sorted(groups_of(config_name) - others - set(USER_GROUPS))
    choices = [group_choices(group, [CONFIG_DIR]) for group in groups]
    for chosen in zip_longest(*choices):
        pairs = {group: choice for group, choice in zip(groups, chosen, strict=True) if choice}
        config = compose_config(config_name, [f"{group}={pairs[group]}" for group in pairs])
        for group in pairs.keys() & config.keys():  # the others set keys of the top level
            assert config[group].get("name", pairs[group]) == pairs[group]


def test_the_defaults_are_the_published_recipe():
    command = parse_command_line(PUBLISHED, "")
    assert command.config_name == "lmim" and len(command.overrides) == len(PUBLISHED) - 1
    published = compose_flat(command.config_name, *command.overrides)
    defaults = compose_flat("lmim")
    theirs = {"resume": True, "data_path": "/path/to/imagenet"}  # not the recipe, but the user's
    assert {key: published[key] for key in published if published[key] != defaults[key]} == theirs
    assert defaults["encoder.name"] == "vit_base" and defaults["dataset.name"] == "imagenet"
    assert defaults["loss.name"] == "infonce_patches"


def test_each_file_of_a_group_says_whether_it_changes_results():
    for group, choice in CHOICES:
        if group != "local":
            text = (CONFIG_DIR / group / f"{choice}.yaml").read_text()
            assert re.search(r"(?m)^# .*[Cc]hanges (no result|results)", text), f"{group}/{choice}"


def test_the_job_directory_follows_from_the_config_alone():
    first, second = (compose_config("lmim", ["encoder=vit_tiny"]) for _ in range(2))
    assert job_directory(first) == job_directory(second) == Path("checkpoints/lmim-vit_tiny")


# ---- Every key is read, and every key that is read exists. ---------------------------------------


def attribute_chains(source: str) -> set[str]:
    """'env.ngpu' for each cfg.env.ngpu and self.cfg.env.ngpu, and for env.ngpu where env = cfg.env;
    the longest chains only, without the method that is called on them."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    prefixes = dict.fromkeys(("cfg", "self.cfg", "run.cfg", "self.run.cfg"), "")
    inner = set()
    for node in nodes:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("cfg."):
            prefixes[ast.unparse(node.targets[0])] = ast.unparse(node.value)[len("cfg.") :] + "."
            inner.add(id(node.value))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    inner |= {id(node.value) for node in attributes}
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    found = set()
    for node in attributes:
        chain = ast.unparse(node.value if id(node) in called else node)
        for name, prefix in prefixes.items():
            if id(node) not in inner and re.fullmatch(rf"{re.escape(name)}\.[\w.]+", chain):
                found.add(prefix + chain[len(name) + 1 :])
    return found


def keys_read_by_code() -> set[str]:
    """A check of a value is no use of it: launch/validate.py does not count."""
    files = [*ROOT.glob("*.py")]
    for folder in ("data", "launch", "util", "eval", "models", "bench"):
        files += (ROOT / folder).glob("*.py")
    return {
        chain
        for file in files
        if file.name != "validate.py"
        for chain in attribute_chains(file.read_text())
    }


def keys_read_by_configs() -> set[str]:
    texts = [path.read_text() for path in CONFIG_DIR.rglob("*.yaml") if "local" not in path.parts]
    return {key for text in texts for key in re.findall(r"\$\{([\w.]+)\}", text)}


def test_attribute_chains_are_found():
    source = "cfg.a.b + self.run.cfg.c; f(run.cfg.d.e); other.cfg.f; cfg; run(self.cfg).g; config.h"
    assert attribute_chains(source) == {"a.b", "c", "d.e"}
    source = "env = cfg.env; f(env.g, cfg.h.i.items()); cfg.get('j'); environment.k"
    assert attribute_chains(source) == {"env.g", "h.i"}


def test_every_key_is_read():
    reads = keys_read_by_code() | keys_read_by_configs()
    checked_only = {"env.distributed"}  # a promise of the user's: False means one process
    reads |= {"digits", "textures"}  # cfg[name] in bench/challenges.py
    reads |= {*OF_THE_SAME_NAME.split(), *(field.name for field in fields(Objective))}
    unread = {
        key
        for key in shipped_keys()
        if key not in reads | checked_only and not any(key.startswith(f"{r}.") for r in reads)
    }
    assert unread == set()


def test_every_key_that_is_read_exists():
    keys = set(shipped_keys())
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    everywhere = keys_read_by_code() | attribute_chains((ROOT / "launch/validate.py").read_text())
    assert everywhere - keys - sections == set()


def test_every_key_is_checked():
    values = shipped_keys().items()
    switches = {key for key, value in values if isinstance(value, bool)}
    assert set(RULES) == shipped_keys().keys() - switches | {
        "resume"
    }  # a switch with a third value


# ---- Mistakes. -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epoch=3", "epoch: unknown key; did you mean epochs?"),
        ("encoder.dept=3", "encoder.dept: unknown key; did you mean encoder.depth"),
        ("encoder.depth.x=3", "encoder.depth.x: unknown key"),
        ("encodr=vit_base", "encodr: unknown key; did you mean encoder"),
        ("foo/bar=1", "foo/bar: unknown key"),
        ("encoder@foo=vit_base", "encoder@foo=vit_base: expected a key without '@'"),
        ("hydra.run.dir=x", f"hydra.run.dir=x: {NOT_HYDRA}"),
        ("+hydra/launcher=x", f"+hydra/launcher=x: {NOT_HYDRA}"),
        ("+foo=1", "+foo=1: keys can be set (key=value) but neither added nor removed"),
        ("++foo=1", "foo: unknown key"),
        ("~epochs", "~epochs: keys can be set"),
        *((f"~{section}", f"~{section}: keys can be set") for section in OPEN_SECTIONS),
        ("encoder=vit_foo", f"encoder=vit_foo: expected one of {', '.join(ENCODERS)}"),
        ("encoder=", "encoder=: expected one of "),
        ("encoder=3", "encoder=3: expected one of "),
        ("loss=[l1,l2]", "loss=[l1,l2]: expected one of "),
        ("proj=3", "proj=3: expected its keys one by one: proj.mlp_depth, proj.mlp_dim"),
        ("tau=0.1,0.2", "tau=0.1,0.2: expected one value"),
        ("tau=[0.1", "tau=[0.1: the value cannot be read"),
        ("job_name=${nope}", "job_name: the value cannot be read (Interpolation key 'nope' not"),
        ("env.setup=[a,'${nope}']", "env.setup[1]: the value cannot be read (Interpolation key"),
        ("env.comment=${oc.env:NOPE}", "env.comment: the value cannot be read (KeyError raised"),
        ("tau=${tau}", "tau: the value cannot be read (Recursive interpolation detected)"),
        ("tau=${scaled:1}", "tau: the value cannot be read (TypeError raised while"),
        ("tau=${", "tau: the value cannot be read (no viable alternative at input '${')"),
        ("env.setup.0=x", "env.setup.0=x: expected env.setup=[a,b], the whole list"),
        ("dataset.mean.x=1", "dataset.mean.x=1: expected dataset.mean=[a,b], the whole list"),
        ("seed=???", "seed=???: expected a value, for which ??? holds the place"),
        ("env.nccl.A=???", "env.nccl.A=???: expected a value"),
        ("dataset.std=[1,???,1]", "dataset.std[1]=???: expected a value"),
        ("job_name=a\udcff", "job_name=a\\udcff: expected a text in UTF-8"),
        ("epochs", "'epochs' is not of the form key=value"),
        ("=3", "'=3' is not of the form key=value"),
    ],
)
def test_an_override_that_means_nothing_is_an_error(override, expected):
    assert error_of("lmim", override).startswith(expected)


def test_an_unknown_config_lists_the_valid_ones():
    assert error_of("nope").endswith("one of " + ", ".join(CONFIGS))


@pytest.mark.parametrize("section", OPEN_SECTIONS)
def test_open_sections_take_keys_of_the_users(section):
    config = compose_config("demo", [f"+{section}.own=1"])
    assert OmegaConf.select(config, section) == {"own": 1}


def test_a_key_may_be_forced():
    assert compose_config("lmim", ["++epochs=7"]).epochs == 7


# ---- A user's own configs. -----------------------------------------------------------------------


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_local_settings_apply_when_they_are_there(tmp_path):
    configs, without = tmp_path / "configs", tmp_path / "without"
    for folder in (configs, without):
        shutil.copytree(CONFIG_DIR, folder, ignore=shutil.ignore_patterns("local"))
    before = compose_flat("lmim", config_dir=without)
    local = "# @package _global_\ndata_path: /here\nenv:\n  ngpu: 4\n"
    write(configs / "local" / "default.yaml", local)
    after = compose_flat("lmim", config_dir=configs)
    assert after == before | {"data_path": "/here", "env.ngpu": 4}
    assert compose_flat("lmim", "env.ngpu=2", config_dir=configs)["env.ngpu"] == 2


def test_unknown_keys_in_local_settings_are_an_error(tmp_path):
    write(tmp_path / "local" / "default.yaml", "# @package _global_\nenv:\n  npgu: 4\n")
    message = error_of("lmim", config_dir=tmp_path)
    assert message.startswith("env.npgu: unknown key; did you mean env.ngpu")


def test_local_settings_without_their_first_line_are_explained(tmp_path):
    write(tmp_path / "local" / "default.yaml", "data_path: /here\n")
    assert error_of("lmim", config_dir=tmp_path).endswith("must be '# @package _global_'")


def test_an_own_config_builds_on_the_shipped_ones(tmp_path):
    write(tmp_path / "mine.yaml", "defaults: [demo, {override encoder: tall}, _self_]\nepochs: 7\n")
    tall = (CONFIG_DIR / "encoder" / "vit_nano.yaml").read_text().replace("depth: 4", "depth: 9")
    write(tmp_path / "encoder" / "tall.yaml", tall)
    config = compose_config("mine", [], tmp_path)
    assert (config.epochs, config.encoder.depth, config.dataset.name) == (7, 9, "digits")
    assert compose_config("mine", ["encoder=vit_tiny"], tmp_path).encoder.name == "vit_tiny"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [lmim, _self_]\nepoch: 3\n", "epoch: unknown key; did you mean epochs?"),
        ("defaults: [lmim, _self_]\nencoder: {dept: 3}\n", "encoder.dept: unknown key"),
        ("defaults: [lmim, {nope: x}]\n", "Could not find 'nope/x'"),
        ("defaults: [lmim, {override encoder: x}]\n", "Available options in 'encoder'"),
        ("defaults: [lmim, _self_]\nepochs: [3\n", "while parsing a flow"),
    ],
)
def test_mistakes_in_an_own_config_are_errors(tmp_path, text, expected):
    write(tmp_path / "mine.yaml", text)
    assert expected in error_of("mine", config_dir=tmp_path)


def test_an_own_worker_may_have_keys_of_its_own(tmp_path):
    write(tmp_path / "mine.yaml", "defaults: [lmim, _self_]\nworker: my_worker\nmine: 3\n")
    assert compose_config("mine", [], tmp_path).mine == 3
