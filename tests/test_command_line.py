"""What users type at the launcher, and what they get. Nothing is run."""

import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import launcher
from launch.command import run_command_line, run_worker
from launch.config import CONFIG_DIR, compose_config, group_choices


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """The launcher's command with --cfg job. -> (exit code, its configs, stderr)"""

    def run(*arguments: str) -> tuple[int, list[dict], str]:
        command = ["launcher.py", "--cfg=job", f"output_dir={tmp_path}", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        exit_code = run_command_line(launcher.launch, "")
        printed = capsys.readouterr()
        return exit_code, list(yaml.safe_load_all(printed.out)), printed.err

    return run


@pytest.fixture
def composed(launch):
    def run(*arguments: str) -> list[dict]:
        exit_code, configs, errors = launch(*arguments)
        assert exit_code == 0 and errors == ""
        return configs

    return run


@pytest.fixture
def error_of(launch):
    def run(*arguments: str) -> str:
        exit_code, _, errors = launch(*arguments)
        assert exit_code == 2 and errors.startswith("error: ") and errors.count("\n") == 1
        return errors.removeprefix("error: ").strip()

    return run


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def own(tmp_path):
    """A folder of a user's own configs."""
    folder = tmp_path / "conf"
    write(folder / "mine.yaml", "defaults: [demo, _self_]\nepochs: 99\n")
    write(folder / "other.yaml", "defaults: [demo, {experiment: short}, _self_]\n")
    write(folder / "hydra_too.yaml", "defaults: [demo, _self_]\nhydra: {run: {dir: x}}\n")
    experiments = folder / "experiment"
    write(experiments / "short.yaml", "# @package _global_\nepochs: 7\nproj: {mlp_dim: 64}\n")
    taller = "# @package _global_\ndefaults: [{override /encoder: vit_tiny}]\nepochs: 8\n"
    write(experiments / "taller.yaml", taller)
    write(experiments / "nowhere.yaml", "epochs: 9\n")
    sweep = "sweep: {tau: [0.2, 0.3], seed: [0, 1]}\n"
    write(experiments / "taus.yaml", f"# @package _global_\n{sweep}")
    write(experiments / "long.yaml", f"# @package _global_\nepochs: 70\n{sweep}")
    variants = "['', 'num_vis=${patches:${grid_size},0.5} decoder=self', tau=0.5]"
    text = f"# @package _global_\nsweep: {{variants: {variants}, masks: [random, block]}}\n"
    write(experiments / "several.yaml", text)
    write(experiments / "broken.yaml", "# @package _global_\nsweep: {seed: 3}\n")
    write(folder / "sweeping.yaml", "defaults: [demo, _self_]\nsweep: {seed: [1]}\n")
    return folder


# ---- Values. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_path", "checkpoints/s-seed=0"),
        ("data_path", 'say "hi" (twice)'),
        ("env.nodelist", "node[01-04,07]"),
        ("env.nodelist", "^docker0"),
    ],
)
def test_a_value_that_needs_quotes_gets_them(composed, key, value):
    (config,) = composed(f"{key}={value}")
    assert OmegaConf.select(OmegaConf.create(config), key) == value


@pytest.mark.parametrize("value", ["it's", "'it", '"it', "'a'b", "[a=0", "{a"])
def test_a_broken_quotation_or_list_is_an_error(error_of, value):
    message = error_of(f"data_path={value}")
    assert message.startswith(f"data_path={value}: the value cannot be read; expected data_path=")


def test_home_is_where_paths_begin(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("output_dir", "data_path", "pretrained", "pretrained_weights", "cache_dir")
    config = compose_config("nn", [f"{key}=~/{key}" for key in keys])
    assert all(config[key] == f"/home/me/{key}" for key in keys)
    assert compose_config("nn", ["pretrained=mae:~/a=b.pth"]).pretrained == "mae:/home/me/a=b.pth"
    assert compose_config("nn", ["data_path=$HOME/a~"]).data_path == "$HOME/a~"
    assert compose_config("features", ["images=~/photos"]).images == "/home/me/photos"
    tars = compose_config("nn", ["dataset=tar", "dataset.options.index_folder=~/index"])
    assert tars.dataset.options.index_folder == "/home/me/index"


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_open_sections_need_no_plus(composed, error_of, plus):
    keys = [f"{plus}env.slurm_extra.x=1", f"{plus}dataset.options.image_size=16"]
    (config,) = composed(*keys, f"{plus}env.nccl={{A: b}}")
    assert config["env"]["slurm_extra"] == {"x": 1} and config["env"]["nccl"] == {"A": "b"}
    assert config["dataset"]["options"]["image_size"] == 16
    message = error_of(f"{plus}env.slurm_extra.a.b=1")
    valid = "a section of keys, each with a text, a number, True or False"
    assert message == f"env.slurm_extra={{'a': {{'b': 1}}}}: expected {valid}"
    assert error_of("env.nccl.A=null") == f"env.nccl={{'A': None}}: expected {valid}"


def test_the_hint_for_a_text_with_a_comma_works(composed, error_of):
    message = error_of("env.slurm_extra.mail_type=END,FAIL")
    hint = "env.slurm_extra.mail_type='END,FAIL'"
    assert message.endswith(f'a list is env.slurm_extra.mail_type=[a,b], a text "{hint}"')
    assert composed(hint)[0]["env"]["slurm_extra"] == {"mail_type": "END,FAIL"}


@pytest.mark.parametrize(
    ("config_name", "override", "expected"),
    [
        ("demo", "image_side=3", "image_side: unknown key; see --cfg job"),
        ("demo", "imge_side=3", "imge_side: unknown key; see --cfg job"),
        ("nn", "imge_side=3", "imge_side: unknown key; did you mean image_side?"),
        ("nn", "encodr=vit_base", "encodr: unknown key; see --cfg job"),
        ("nn", "encoder=vit_base", "encoder: unknown key; the config has none in its def"),
    ],
)
def test_only_keys_of_the_same_worker_are_proposed(error_of, config_name, override, expected):
    assert error_of(f"-cn={config_name}", override).startswith(expected)


# ---- Sweeps. -------------------------------------------------------------------------------------


def test_the_names_of_a_sweep_can_be_typed(composed):
    choices = ["seed=0,1", "encoder=vit_tiny", "tau=1e-1,2", "data_path=a/b=1,'c d'"]
    names = [config["job_name"] for config in composed("-cn=demo", "-m", *choices)]
    assert names[0] == "demo-seed0-tau0.1-data_path-a_b1"
    assert names[-1] == "demo-seed1-tau2-data_path-c_d" and len(set(names)) == 8


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("encoder=glob(*)", "encoder=glob(*): expected values with commas between them"),
        ("tau=interval(0,1)", "tau=interval(0,1): expected values with commas between them"),
        ("data_path=a/b,a_b", "--multirun: expected values whose folders get different names"),
    ],
)
def test_what_cannot_be_a_sweep(error_of, override, expected):
    assert error_of("-m", override).startswith(expected)


# ---- Experiments. --------------------------------------------------------------------------------


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_experiment_applies_after_the_config(composed, own, plus):
    (config,) = composed(f"-cd={own}", "-cn=mine", f"{plus}experiment=short")
    assert config["epochs"] == 7 and config["proj"] == {"mlp_depth": 3, "mlp_dim": 64}
    (config,) = composed(f"-cd={own}", "-cn=mine", f"{plus}experiment=short", "epochs=6")
    assert config["epochs"] == 6
    (config,) = composed(f"-cd={own}", "-cn=other", f"{plus}experiment=taller", "encoder=vit_nano")
    assert config["epochs"] == 8  # one that the config has already is replaced


def test_an_experiment_chooses_or_says_that_it_cannot(composed, error_of, own):
    taller = [f"-cd={own}", "experiment=taller"]
    (config,) = composed(*taller, "-cn=mine")
    assert config["encoder"]["name"] == "vit_tiny"
    assert error_of(*taller, "-cn=demo") == (
        "experiment/taller: expected encoder=vit_tiny on the command line as well, "
        "because demo overrides it"
    )
    (config,) = composed(*taller, "-cn=demo", "encoder='vit_small'")
    assert config["encoder"]["name"] == "vit_small"


def test_mistakes_with_experiments(error_of, own):
    message = error_of(f"-cd={own}", "experiment=x")
    expected = "experiment=x: expected one of broken, challenge_correlation"
    assert message.startswith(expected) and message.endswith("several, short, taller, taus")
    message = error_of(f"-cd={own}", "-cn=demo", "-m", "experiment=broken")
    assert message == "experiment=broken: expected a list for each key of its sweep"
    assert error_of(f"-cd={own}", "-cn=sweeping").startswith("sweeping.yaml: expected no section '")
    assert error_of(f"-cd={own}", "experiment=nowhere").endswith("must be '# @package _global_'")


def names(configs: list[dict]) -> list[str]:
    return [config["job_name"] for config in configs]


def test_a_sweep_over_experiments(composed, own):
    sweep = composed(f"-cd={own}", "-cn=mine", "-m", "experiment=short,taller")
    assert [config["epochs"] for config in sweep] == [7, 8]
    assert names(sweep) == ["demo-experiment-short", "demo-experiment-taller"]


def test_the_sweep_of_an_experiment(composed, own, tmp_path):
    (tmp_path / "demo").mkdir()
    sweep = composed(f"-cd={own}", "-cn=demo", "-m", "experiment=taus")
    assert names(sweep) == ["demo", "demo-seed1", "demo-tau0.3", "demo-tau0.3-seed1"]
    by_hand = composed("-cn=demo", "tau=0.3", "seed=1", "job_name=demo-tau0.3-seed1")
    assert sweep[3:] == by_hand
    # What is typed takes the place of its own; without -m only its settings count.
    typed = composed(f"-cd={own}", "-cn=demo", "-m", "experiment=taus", "seed=5,6", "tau=0.4")
    assert [(config["seed"], config["tau"]) for config in typed] == [(5, 0.4), (6, 0.4)]
    assert names(typed) == ["demo-seed5", "demo-seed6"]
    (single,) = composed(f"-cd={own}", "-cn=demo", "experiment=long")
    assert single["epochs"] == 70 and "sweep" not in single


@pytest.mark.slow
def test_variants_are_not_combined_with_each_other(composed, own):
    sweep = composed(f"-cd={own}", "-cn=demo", "-m", "experiment=several")
    assert names(sweep) == [
        *("demo", "demo-masks-block"),
        *("demo-num_vis8-decoder-self", "demo-num_vis8-decoder-self-masks-block"),
        *("demo-tau0.5", "demo-tau0.5-masks-block"),
    ]
    assert sweep[3]["num_vis"] == 8 and sweep[3]["decoder"]["name"] == "self"
    typed = composed(f"-cd={own}", "-cn=demo", "-m", "experiment=several", "decoder=cross")
    assert names(typed) == names(sweep)[:2] + names(sweep)[4:]


@pytest.mark.slow
def test_what_experiments_share_runs_once(composed, own):
    both = composed(f"-cd={own}", "-cn=demo", "-m", "experiment=taus,long,several")
    assert len(names(both)) == len(set(names(both))) == 4 + 4 + 5
    assert "demo-experiment-long-tau0.3-seed1" in names(both)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["-cn=demo", "-cn=lmim dataset=imagenet data_path=/x env.slurm=True"]
)
def test_the_shipped_experiments_go_with_every_recipe(composed, recipe):
    published = {"num_vis": 49, "decoder_depth": 8, "patch_gap": 0, "avg_vis_mask_token": False}
    published |= {"avg_sim_coeff": 0, "target": {"name": "pixels"}, "loss": {"name": "norm_l2"}}
    experiments = ",".join(group_choices("experiment", [CONFIG_DIR]))
    runs = composed(*recipe.split(), "-m", f"experiment={experiments}", "seed=3")
    assert len(runs) == 1 + 3 + 4 + 3 + 3 + 4  # the recipe once
    if "lmim" in recipe:
        (mae,) = (run for run in runs if run["job_name"].endswith("lab_mae"))
        assert mae == mae | published and mae["proj"]["mlp_depth"] == 0
    (data2vec,) = (run for run in runs if run["job_name"].endswith("lab_data2vec"))
    assert data2vec["target_layers"] == f"top:{data2vec['encoder']['depth'] // 2}"
    assert data2vec["num_vis"] == {4: 6, 14: 76}[data2vec["grid_size"]]


# ---- Flags of Hydra's. ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    ["-cp {} -cn mine", "--config-path {} -cn mine", "-cn {}/mine.yaml --resolve", "-cn {}/mine"],
)
def test_ways_to_name_a_config(composed, own, flags):
    assert composed(*flags.format(own).split())[0]["epochs"] == 99


def test_a_config_without_defaults(error_of, own):
    write(own / "bare.yaml", "defaults:\nepochs: 3\n")
    assert error_of(f"-cd={own}", "-cn=bare").startswith("Invalid defaults list in 'bare'")


def test_flags_that_mean_nothing_here(error_of, own):
    assert error_of(f"-cd={own}", "-cn=hydra_too").startswith("hydra_too.yaml: expected no section")
    message = error_of(f"-cd={own}", f"-cn={own}/mine")
    assert message.endswith("mine: expected a name without '/' next to --config-dir")


def test_only_the_job_s_config_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launcher.py", "--cfg=hydra"])
    with pytest.raises(SystemExit, match="2"):
        run_command_line(launcher.launch, "")
    assert "invalid choice: 'hydra' (choose from" in capsys.readouterr().err


def test_help_lists_the_users_own(monkeypatch, capsys, own):
    monkeypatch.setattr(sys, "argv", ["launcher.py", "--help", f"-cd={own}"])
    with pytest.raises(SystemExit, match="0"):
        run_command_line(launcher.launch, "")
    assert {"mine", "experiment", "taller", "demo", "vit_nano"} <= set(
        capsys.readouterr().out.split()
    )


def test_the_printed_config_is_checked(launch):
    exit_code, (config,), errors = launch("epochs=abc")
    assert exit_code == 2 and config["epochs"] == "abc"
    assert errors == "error: epochs=abc: expected a whole number from 1 to 10**9\n"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("epochs=10000000000", "a whole number from 1 to 10**9"),
        ("data_timeout=100000000000", "a number from 0 to 10**9"),
        ("num_workers=5000", "a whole number from 0 to 1024, or null"),
        ("encoder.depth=1000000", "a whole number from 1 to 1000"),
        ("decoder_embed_dim=4000000", "a whole number from 1 to 100000"),
    ],
)
def test_what_no_machine_has(error_of, override, expected):
    """Here, where nothing is run: it would take all that there is."""
    assert error_of(override) == f"{override}: expected {expected}"


@pytest.mark.parametrize("value", ["[cls,cls]", "[]", "cls"])
def test_a_list_of_different_choices(error_of, value):
    message = error_of("-cn=linear_probe", f"poolings={value}")
    assert "expected a list of different ones of cls, mean, cls+mean" in message


def test_a_finished_job_is_composed_again(composed, tmp_path):
    (config,) = composed("-cn=demo", "tau=0.3", "env.slurm_extra.x=1")
    folder = tmp_path / "demo"
    write(folder / "config.yaml", OmegaConf.to_yaml(config))
    assert composed(f"-cd={folder}", "-cn=config") == [config]
    assert composed(f"-cn={folder}/config.yaml", "epochs=70") == [config | {"epochs": 70}]


def test_a_worker_names_the_launcher_for_sweeps(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main_lmim.py", "-m", "-cn=demo", "seed=0,1"])
    monkeypatch.setattr("launch.command.leave", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        run_worker(print, "")
    assert capsys.readouterr().err.startswith("error: --multirun: expected with launcher.py")


def test_torchrun_submits_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    command = ["launcher.py", f"output_dir={tmp_path}", "env.slurm=True"]
    monkeypatch.setattr(sys, "argv", command)
    assert run_command_line(launcher.launch, "") == 2
    said = "error: env.slurm=True: expected to be started by python, not by torchrun\n"
    assert capsys.readouterr().err == said
