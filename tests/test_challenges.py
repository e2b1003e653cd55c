"""bench/challenges.py: the paper's argument in numbers."""

import hashlib
import json
import os
import re
import signal
import statistics
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bench import challenges
from bench.challenges import (
    UNCLAIMED,
    Run,
    compare,
    describe,
    describe_rows,
    draw,
    evaluation,
    introduce,
    plan,
)
from bench.step import flops_per_image
from launch.config import compose_config
from tests.runs import (
    LAUNCHER,
    ROOT,
    TINY,
    assert_same_state,
    final_state,
    finish,
    records,
    start_process,
    succeed,
    wait_until,
)
from util.checkpoint import list_checkpoints

BASE = np.array([90.0, 91.0, 92.0])  # standard deviation 1


@pytest.mark.parametrize(
    ("values", "is_claimed", "expected"),
    [
        ([70, 71, 72], True, "20.0 lower than the recipe: as the paper says"),
        ([95, 96, 97], True, "5.0 higher than the recipe: not as the paper says"),
        ([70, 71, 72], False, "20.0 lower than the recipe"),
        ([95, 96, 97], False, "5.0 higher than the recipe"),
        # Two standard deviations of a difference between numbers that have 1 each are 2.8.
        *((x, True, f"2.7 {y}, less than two standard deviations (2.8): not shown") for x, y in (
            ([87.3, 88.3, 89.3], "lower than the recipe"),
            ([92.7, 93.7, 94.7], "higher than the recipe"),
        )),
        ([87.1, 88.1, 89.1], True, "2.9 lower than the recipe: as the paper says"),
        ([70], True, "21.0 lower than the recipe, of one seed: not shown"),
    ],
)  # fmt: skip
def test_what_numbers_show(values, is_claimed, expected):
    assert compare(BASE, np.array(values), is_claimed) == expected


# The columns of a table about digits, by hand.
MEASURES = [("nn", "top1"), ("knn", "k10_top1"), ("few_shot", "top1/10-shot")]
MEASURES += [("collapse", name) for name in ("rankme", "mean_cosine", "token_similarity")]
MEASURES += [("collapse", "position_probe")]


@pytest.fixture
def write_runs(tmp_path):
    """-> runs of the label, two seeds of which each left one number in all columns: 10 less for the
    label than for the recipe, and all differ."""
    base = compose_config("demo", [f"output_dir={tmp_path}", "encoder.depth=1"])

    def write(label: str) -> list[Run]:
        runs = []
        for number, shift in enumerate((0.0, 0.25, -10.0, -10.25)):
            own = label if shift <= -10 else ""
            cfg = base.copy()
            cfg.job_name = f"digits-seed{number % 2}-{own}"
            cfg.encoder.depth = 2 if own else 1
            run = Run("digits", own, cfg)
            results: dict = {}
            for place, (name, metric) in enumerate(MEASURES):
                variants = results.setdefault(name, {"trained": {}, "random init": {}})
                for weights, value in (("trained", 50), ("random init", 20)):
                    found = variants[weights].setdefault("results", {})
                    found[metric] = value + place + shift
            lines = [
                {"step": 1, "loss": 9.0},
                {"step": 2, "loss": 2 + shift, "chance": 3.5 if own else 4.5},
            ]
            lines.append({"step": 2, "rankme": 1.0})
            verdict = {"verdict": "partial" if number == 3 else "healthy", "seconds": 60}
            weights_of_run = f"weights {number}"
            backbone = {"sha256": hashlib.sha256(weights_of_run.encode()).hexdigest()}
            table = {"evaluations": results, "backbone": backbone}
            for path, text in (
                (run.folder / "checkpoints/step-00000002.pth", weights_of_run),
                (run.evaluated / "results/evaluate-0.json", json.dumps(table)),
                (run.folder / "results" / f"{cfg.job_name}.json", json.dumps(verdict)),
                (run.folder / "log.txt", "".join(json.dumps(line) + "\n" for line in lines)),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            runs.append(run)
        return runs

    return write


@pytest.mark.parametrize(
    ("experiment", "label", "is_claimed"),
    [
        ("challenge_target", "target-joint", True),
        ("challenge_target", "target-stopgrad", False),
        ("challenge_target", "target-frozen", False),
        ("challenge_decoder", "decoder-self", True),
        ("lab_mae", "lab_mae", False),
        ("lab_lejepa", "lab_lejepa", False),
    ],
)
def test_what_a_table_says(write_runs, experiment, label, is_claimed):
    """Only of the challenges that the paper has does a row say what the paper says."""
    lines, seen = describe_rows("digits", experiment, write_runs(label))
    assert seen == (
        f"- `{label}`, nearest neighbour: 10.2 lower than the recipe"
        f"{': as the paper says' if is_claimed else ''}."
    )
    title, _, random, recipe, row = (line.strip("| ").split(" | ") for line in lines.splitlines())
    assert title[:3] == ["digits", "nearest neighbour", "k-NN"]
    assert title[-5:] == ["position probe", "loss", "chance", "verdict", "GFLOP"]
    assert random == ["random weights", *(f"{20.12 + n:.2f} ± 0.18" for n in range(7)), *"––––"]
    deviation = " ± 0.18"
    assert recipe[:3] == ["recipe", f"50.12{deviation}", f"51.12{deviation}"]
    assert recipe[7:11] == [f"56.12{deviation}", f"2.12{deviation}", "4.5", "healthy 2"]
    assert float(row[11]) > float(recipe[11]) > 0, "GFLOP of two blocks and of one"
    assert row[:2] == [f"`{label}`", f"39.88{deviation}"]
    assert row[8:11] == [f"-8.12{deviation}", "3.5", "healthy 1, partial 1"]


def test_a_page_says_how_long_its_runs_took(write_runs, tmp_path):
    """Four of a minute each. Its picture replaces an older one."""
    drawn, shown = tmp_path / "all.png", tmp_path / "figs" / "lab_mae.png"
    shown.parent.mkdir()
    shown.write_text("older")
    drawn.write_text("new")
    own = ["digits=['a=1','b=2']", "experiments=[lab_mae]", f"page={tmp_path}/docs/page.md"]
    cfg, runs = compose_config("laboratory", own), {"lab_mae": write_runs("lab_mae")}
    _, measured, note, *_, seen, picture = describe(cfg, {"digits": runs}, {"lab_mae": drawn})
    assert shown.read_text() == "new" and picture.endswith("(../figs/lab_mae.png)")
    assert ": 4 runs, 4 minutes of training, 1 at a time (digits: a=1 b=2). Mean" in measured
    assert note == cfg.note and seen.startswith("- `lab_mae`, nearest neighbour: 10.2 lower")


def test_one_seed_has_the_same_rows(tmp_path):
    cfg = compose_config("challenges", [f"output_dir={tmp_path}", "experiments=[challenge_loss]"])
    (runs,) = plan(cfg, "digits", ["seed=3"]).values()
    assert [run.label for run in runs][:2] == ["", "loss-l2"]
    assert {run.cfg.seed for run in runs} == {3}


def test_of_one_seed_a_table_shows_nothing(write_runs):
    lines, seen = describe_rows("digits", "challenge_target", write_runs("target-joint")[::2])
    assert seen.endswith("10.0 lower than the recipe, of one seed: not shown.")
    assert lines.splitlines()[3].startswith("| recipe | 50 | 51 |")


@pytest.mark.slow
def test_what_runs_and_what_evaluates_it(tmp_path):
    """Experiments of the laboratory compute as much as the recipe; random weights next to it."""
    cfg = compose_config("laboratory", [f"output_dir={tmp_path}", "experiments=[lab_mae]"])
    settings = ["seed=3,4", "epochs=40", "warmup_epochs=1", "encoder.grid_size=6"]
    (runs,) = plan(cfg, "textures", settings).values()
    found = [(run.label, run.cfg.seed) for run in runs]
    assert found == [("", 3), ("", 4), ("lab_mae", 3), ("lab_mae", 4)]
    recipe, _, other, _ = (run.cfg for run in runs)
    assert recipe.dataset.name == "textures" and recipe.resume
    assert (recipe.target.name, other.target.name) == ("ema", "pixels")
    cost = [flops_per_image(own) for own in (recipe, other)]
    assert recipe.epochs == 40 and other.epochs == round(40 * cost[0] / cost[1]) != 40
    other.dataset.options.eval_images = 5  # away from the default
    for run in runs[1:3]:
        own = evaluation(run)
        assert own.pretrained == str(run.folder) == str(tmp_path / run.cfg.job_name)
        assert f"{own.output_dir}/{own.job_name}" == f"{run.folder}-evaluated"
        assert own.dataset == run.cfg.dataset and own.seed == run.cfg.seed
        assert own.evals == ["patches_linear", "patches_knn", "clusters", "collapse"]
        assert own.beside_random_init == (run.label == "")


def test_what_is_drawn(monkeypatch, tmp_path):
    """The first seed of each row, in their order."""
    images, finished = [Image.new("RGB", (4, 4), (n, 0, 0)) for n in range(3)], []
    monkeypatch.setattr(
        challenges, "open_split", lambda cfg, split: SimpleNamespace(load=images.__getitem__)
    )
    monkeypatch.setattr(challenges, "finish", lambda cfg, configs: finished.extend(configs))
    base, runs = compose_config("textures", [f"output_dir={tmp_path}"]), []
    for label in ("", "b", "a"):
        for seed in (0, 1):
            cfg = base.copy()
            cfg.job_name = f"{seed}{label}"
            runs.append(Run("textures", label, cfg))
    cfg = compose_config("challenges", [f"output_dir={tmp_path}"])
    assert draw(cfg, {}) == {}
    drawn = draw(cfg, {"x": runs})
    assert drawn == {"x": tmp_path / "x/results/pictures/all.png"}
    (own,) = finished
    assert own.pretrained == [str(tmp_path / name) for name in ("0", "0b", "0a")]
    assert Image.open(tmp_path / "mosaics/2.png").getpixel((0, 0)) == (2, 0, 0)


def test_an_evaluation_of_other_weights_or_of_fewer_columns_is_made_again(write_runs):
    run, *_ = write_runs("target-joint")
    (file,) = run.evaluated.glob("results/*.json")
    table = json.loads(file.read_text())
    assert run.results() == table["evaluations"]
    (run.folder / "checkpoints/step-00000003.pth").write_text("trained again")
    assert run.results() == {}
    (run.folder / "checkpoints/step-00000003.pth").unlink()
    del table["evaluations"]["collapse"]
    file.write_text(json.dumps(table))
    assert run.results() == {}
    file.write_text("[")
    assert run.results() == {}


@pytest.mark.parametrize("name", ["challenges", "laboratory"])
def test_a_page_has_the_words_of_its_configs(name):
    """All but what comes from results: tables, pictures, and what is seen in them."""
    cfg = compose_config(name, [])
    page = (ROOT / cfg.page).read_text()
    parts = page.removesuffix("\n").split("\n\n")
    (measured,) = (part for part in parts if re.match(r"\d{4}-\d\d-\d\d, commit ", part))
    recipes = [recipe for recipe in ("digits", "textures") if cfg[recipe] is not None]
    settings = "; ".join(f"{recipe}: {' '.join(cfg[recipe])}" for recipe in recipes)
    assert f"({settings})" in measured
    words = [part for part in parts if not part.startswith(("|", "- `", "![")) and part != measured]
    title, _, *others = describe(cfg, {}, {})
    assert words == "\n\n".join([title, *others]).split("\n\n")
    assert [word for word in words if word.startswith("## ")] == [
        f"## {experiment}" for experiment in cfg.experiments
    ]
    claimed = re.findall(r"- `(.*)`, .*as the paper says", page)
    assert bool(claimed) == (name == "challenges") and not UNCLAIMED & {*claimed}


def test_the_laboratory_says_what_was_not_tuned_and_what_is_missing():
    cfg = compose_config("laboratory", [])
    assert "Nothing was tuned for these methods" in cfg.note
    for experiment in cfg.experiments:
        about, details = introduce(experiment)
        assert "arXiv" in about and "launcher.py" not in details
        assert re.match(r"Kept: .* Missing: .*", details), experiment


@pytest.mark.slow
def test_a_target_without_a_network_costs_less():
    ours = flops_per_image(compose_config("lmim", ["encoder=vit_tiny"]))
    without_target = flops_per_image(
        compose_config("lmim", ["encoder=vit_tiny", "target=pixels", "avg_sim_coeff=0"])
    )
    assert without_target < ours


@pytest.mark.slow
def test_from_runs_to_the_page(tmp_path):
    """Interrupted and started again; the page says what the runs have left."""
    page, runs = tmp_path / "docs/page.md", tmp_path / "runs"
    small = "max_steps=3 watch_images=16 encoder.depth=1 proj.mlp_dim=32 batch_size=16"
    small += " dataset.options.train_images=60 dataset.options.eval_images=20 seed=0,1"
    overrides = ",".join(f"'{override}'" for override in small.split())
    command = [sys.executable, "launcher.py", "--config-name=challenges", "env.parallel=2"]
    command += [f"output_dir={runs}", f"page={page}", "experiments=[lab_lejepa]"]
    command += ["digits=null", f"textures=[{overrides}]"]
    process = start_process(command)
    wait_until(lambda: list(runs.glob("*/checkpoints/*.pth")), process)
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 128 + signal.SIGINT, output
    code, output = finish(start_process(command), timeout=280)
    assert code == 0, output
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    rows = {line[0]: line for line in lines if len(line) > 1}
    assert list(rows) == ["textures", "---", "random weights", "recipe", "`lab_lejepa`"]
    for name, label, weights in (
        ("recipe", "", "trained"),
        ("random weights", "", "random init"),
        ("`lab_lejepa`", "-experiment-lab_lejepa", "trained"),
    ):
        jobs = [f"textures-seed{seed}{label}" for seed in (0, 1)]
        found = [next(runs.glob(f"{job}-evaluated/results/evaluate-*.json")) for job in jobs]
        found = [json.loads(path.read_text())["evaluations"] for path in found]
        for column, (name_of, measure) in {
            1: ("patches_linear", "pixel_accuracy"),
            2: ("patches_knn", "accuracy_20"),
            3: ("clusters", "ari_truth"),
            7: ("collapse", "position_probe"),
        }.items():
            numbers = [own[name_of][weights]["results"][measure] for own in found]
            mean, deviation = map(float, rows[name][column].split(" ± "))
            assert mean == pytest.approx(statistics.mean(numbers), rel=1e-2)
            assert deviation == pytest.approx(statistics.stdev(numbers), rel=0.06, abs=1e-9)
    logs = [records(runs / f"textures-seed{seed}") for seed in (0, 1)]
    last = [[record for record in log if "loss" in record][-1] for log in logs]
    assert float(rows["recipe"][8].split(" ± ")[0]) == pytest.approx(
        statistics.mean(record["loss"] for record in last), rel=1e-2
    )
    assert rows["recipe"][9] == f"{last[0]['chance']:.4g}" and rows["`lab_lejepa`"][9] == "–"
    assert (tmp_path / "figs/lab_lejepa.png").is_file()


@pytest.mark.slow
def test_runs_side_by_side(tmp_path):
    """What is finished is not run again; one that fails does not keep the others from running."""
    command = [*LAUNCHER, *TINY, f"output_dir={tmp_path}", "-m", "env.parallel=2"]
    code, output = finish(start_process([*command, "seed=0,1", "blr=1e-3,1e30"]))
    assert code == 3 and output.count(": done (") == 2 and output.count(": exit code 3 (") == 2
    alone = succeed(LAUNCHER, f"output_dir={tmp_path / 'alone'}", "seed=1", "blr=1e-3")
    assert "demo: " in alone
    ours, expected = tmp_path / "demo-seed1-blr0.001", tmp_path / "alone/demo"
    assert_same_state(final_state(ours), final_state(expected))
    assert "\ndemo-seed1-blr0.001: vit_nano" in (ours / "logs/output.txt").read_text()
    code, output = finish(start_process([*command, "seed=0,1", "blr=1e-3,2e-3"]))
    assert code == 0 and output.count("already finished") == 2
    assert list_checkpoints(tmp_path / "demo-seed1-blr0.002/checkpoints")
