"""bench/challenges.py: the paper's argument in numbers."""

import hashlib
import importlib
import json
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bench import challenges
from bench.challenges import (
    UNCLAIMED,
    Rows,
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


def write_runs(folder: Path, *labels: str) -> Rows:
    """Runs of the recipe and of each label, two seeds of which each left one number in all columns:
    10 less for a label than for the recipe, and all differ."""
    base = compose_config("demo", [f"output_dir={folder}", "encoder.depth=1"])
    rows: Rows = {}
    for number, label in enumerate(label for label in ("", *labels) for _ in range(2)):
        shift = -10 * bool(label) + (0.25 if number % 2 else 0.0) * (-1 if label else 1)
        cfg = base.copy()
        cfg.job_name = f"digits-{number}-{label}"
        cfg.encoder.depth = 2 if label else 1
        run = Run("digits", label, cfg)
        results: dict = {}
        for place, (name, metric) in enumerate(MEASURES):
            variants = results.setdefault(name, {"trained": {}, "random init": {}})
            for weights, value in (("trained", 50), ("random init", 20)):
                found = variants[weights].setdefault("results", {})
                found[metric] = value + place + shift
        lines = [
            {"step": 1, "loss": 9.0},
            {"step": 2, "loss": 2 + shift, "chance": 3.5 if label else 4.5},
            {"step": 2, "rankme": 1.0},
        ]
        verdict = {"verdict": "partial" if number % 4 == 3 else "healthy", "seconds": 60}
        weights_of_run = f"weights {number}"
        sha256 = hashlib.sha256(weights_of_run.encode()).hexdigest()
        table = {"evaluations": results, "backbone": {"sha256": sha256}}
        for path, text in (
            (run.folder / "checkpoints/step-00000002.pth", weights_of_run),
            (run.evaluated / "results/evaluate-0.json", json.dumps(table)),
            (run.folder / "results" / f"{cfg.job_name}.json", json.dumps(verdict)),
            (run.folder / "log.txt", "".join(json.dumps(line) + "\n" for line in lines)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        rows.setdefault(label, []).append(run)
    return rows


def test_a_page(tmp_path):
    """Only of the challenges that the paper has does a row say what the paper says. Six runs took a
    minute each, those of the recipe are counted once; a picture replaces an older one."""
    drawn, shown = tmp_path / "all.png", tmp_path / "figs" / "lab_mae.png"
    shown.parent.mkdir()
    shown.write_text("older")
    drawn.write_text("new")
    rows = write_runs(tmp_path, "target-joint", "target-stopgrad", "lab_mae")
    laboratory = {"": rows[""], "lab_mae": rows.pop("lab_mae")}
    plans = {"digits": {"challenge_target": rows, "lab_mae": laboratory}}
    own = ["digits=['a=1','b=2']", f"experiments=[{','.join(plans['digits'])}]"]
    cfg = compose_config("laboratory", [*own, f"page={tmp_path}/docs/page.md"])
    parts = list(describe(cfg, plans, {"lab_mae": drawn}))
    assert shown.read_text() == "new" and parts[-1].endswith("(../figs/lab_mae.png)")
    assert ": 8 runs, 8 minutes of training, 1 at a time (digits: a=1 b=2). Mean" in parts[1]
    assert parts[2] == cfg.note
    lower = "nearest neighbour: 10.2 lower than the recipe"
    challenge, laboratory = (part.splitlines() for part in parts if part.startswith("- "))
    assert challenge == [
        f"- `target-joint`, {lower}: as the paper says.",
        f"- `target-stopgrad`, {lower}.",
    ]
    assert laboratory == [f"- `lab_mae`, {lower}."]
    table = next(part for part in parts if part.startswith("| digits"))
    title, _, random, recipe, row, _ = (
        line.strip("| ").split(" | ") for line in table.splitlines()
    )
    assert title[:3] == ["digits", "nearest neighbour", "k-NN"]
    assert title[-5:] == ["position probe", "loss", "chance", "verdict", "GFLOP"]
    assert random == ["random weights", *(f"{20.12 + n:.2f} ± 0.18" for n in range(7)), *"––––"]
    deviation = " ± 0.18"
    assert recipe[:3] == ["recipe", f"50.12{deviation}", f"51.12{deviation}"]
    assert recipe[7:11] == [f"56.12{deviation}", f"2.12{deviation}", "4.5", "healthy 2"]
    assert float(row[11]) > float(recipe[11]) > 0, "GFLOP of two blocks and of one"
    assert row[:2] == ["`target-joint`", f"39.88{deviation}"]
    assert row[8:11] == [f"-8.12{deviation}", "3.5", "healthy 1, partial 1"]


def test_of_one_seed(tmp_path):
    """The same rows, of which a table shows nothing."""
    options = [f"output_dir={tmp_path}", "experiments=[challenge_loss]", "digits=['seed=3']"]
    (rows,) = plan(compose_config("challenges", options), "digits").values()
    assert [*rows][:2] == ["", "loss-l2"]
    assert {run.cfg.seed for runs in rows.values() for run in runs} == {3}
    rows = {label: runs[:1] for label, runs in write_runs(tmp_path, "target-joint").items()}
    lines, seen = describe_rows("digits", "challenge_target", rows)
    assert seen.endswith("10.0 lower than the recipe, of one seed: not shown.")
    assert lines.splitlines()[3].startswith("| recipe | 50 | 51 |")


def test_what_runs_and_what_evaluates_it(tmp_path):
    """Experiments of the laboratory compute as much as the recipe; random weights next to it."""
    settings = "seed=3,4 epochs=40 warmup_epochs=1 encoder.grid_size=3 encoder.depth=1 num_vis=4"
    listed = ",".join(f"'{setting}'" for setting in settings.split())
    options = [f"output_dir={tmp_path}", "experiments=[lab_mae]", f"textures=[{listed}]"]
    (rows,) = plan(compose_config("laboratory", options), "textures").values()
    runs = [run for own in rows.values() for run in own]
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
    base, rows = compose_config("textures", [f"output_dir={tmp_path}"]), {}
    for label in ("", "b", "a"):
        rows[label] = []
        for seed in (0, 1):
            cfg = base.copy()
            cfg.job_name = f"{seed}{label}"
            rows[label].append(Run("textures", label, cfg))
    cfg = compose_config("challenges", [f"output_dir={tmp_path}"])
    drawn = draw(cfg, {"x": rows})
    assert drawn == {"x": tmp_path / "x/results/pictures/all.png"}
    (own,) = finished
    assert own.pretrained == [str(tmp_path / name) for name in ("0", "0b", "0a")]
    assert Image.open(tmp_path / "mosaics/2.png").getpixel((0, 0)) == (2, 0, 0)


def test_an_evaluation_of_other_weights_or_of_fewer_columns_is_made_again(tmp_path):
    run = write_runs(tmp_path)[""][0]
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


def test_a_target_without_a_network_costs_less():
    cfg = compose_config("demo", [])
    without = compose_config("demo", ["target=pixels", "avg_sim_coeff=0"])
    assert flops_per_image(without) < flops_per_image(cfg)


def test_runs_go_to_processes_of_their_own(monkeypatch):
    """As many at a time as env.parallel says; an exit code of theirs is that of the command."""
    started = []
    monkeypatch.setattr(challenges, "run_side_by_side", lambda *own: started.append(own) or 3)
    cfg, runs = compose_config("challenges", ["env.parallel=2"]), [compose_config("demo", [])]
    challenges.finish(cfg, [])
    with pytest.raises(SystemExit) as stopped:
        challenges.finish(cfg, runs)
    assert started == [(runs, 2, challenges.WORKERS)] and stopped.value.code == 3
    monkeypatch.setattr(challenges, "run_side_by_side", lambda *own: 0)
    challenges.finish(cfg, runs)
    for name in challenges.WORKERS:
        assert find_spec(name)


@pytest.mark.slow
def test_from_runs_to_the_page(tmp_path, monkeypatch):
    """Stopped and started again; the page says what the runs have left."""
    page, runs, ran = tmp_path / "docs/page.md", tmp_path / "runs", []
    small = "max_steps=2 watch_images=16 encoder.depth=1 proj.mlp_dim=32 batch_size=8 seed=5"
    small += " dataset.options.train_images=24 dataset.options.eval_images=12 num_workers=0"
    overrides = ",".join(f"'{override}'" for override in small.split())
    options = [f"output_dir={runs}", f"page={page}", "experiments=[lab_lejepa]", "digits=null"]
    cfg = compose_config("challenges", [*options, f"textures=[{overrides}]"])
    monkeypatch.setattr("util.build.default_workers", lambda: 0)

    def finish_here(cfg, configs, stops_at=1):
        for own in configs:
            if len(ran) == stops_at:
                sys.exit(130)
            ran.append(own.job_name)
            importlib.import_module(own.worker).main(own)

    monkeypatch.setattr(challenges, "finish", finish_here)
    with pytest.raises(SystemExit):
        challenges.main(cfg)
    monkeypatch.setattr(challenges, "finish", partial(finish_here, stops_at=None))
    challenges.main(cfg)
    recipe, other = "textures", "textures-experiment-lab_lejepa"
    assert ran == [recipe, other, f"{recipe}-evaluated", f"{other}-evaluated", "lab_lejepa"]
    lines = [line.strip("| ").split(" | ") for line in page.read_text().splitlines()]
    rows = {line[0]: line for line in lines if len(line) > 1}
    assert list(rows) == ["textures", "---", "random weights", "recipe", "`lab_lejepa`"]
    for name, job, weights in (
        ("recipe", recipe, "trained"),
        ("random weights", recipe, "random init"),
        ("`lab_lejepa`", other, "trained"),
    ):
        (path,) = (runs / f"{job}-evaluated").glob("results/evaluate-*.json")
        found = json.loads(path.read_text())["evaluations"]
        for column, (name_of, measure) in {
            1: ("patches_linear", "pixel_accuracy"),
            2: ("patches_knn", "accuracy_20"),
            3: ("clusters", "ari_truth"),
            7: ("collapse", "position_probe"),
        }.items():
            number = found[name_of][weights]["results"][measure]
            assert rows[name][column] == f"{number:.4g}"
    last = [line for line in records(runs / recipe) if "loss" in line][-1]
    assert rows["recipe"][8:10] == [f"{last['loss']:.4g}", f"{last['chance']:.4g}"]
    assert rows["`lab_lejepa`"][9] == "–"
    assert (tmp_path / "figs/lab_lejepa.png").is_file()
    assert other in (runs / "challenges/report.html").read_text()


@pytest.mark.slow
def test_runs_side_by_side(tmp_path):
    """What is finished is not run again; one that fails does not keep the others from running."""
    command = [*LAUNCHER, *TINY, f"output_dir={tmp_path}", "-m", "env.parallel=2", "epochs=2"]
    code, output = finish(start_process([*command, "blr=1e30,1e-3"]))
    assert code == 3 and output.count(": done (") == 1 and output.count(": exit code 3 (") == 1
    alone = succeed(LAUNCHER, f"output_dir={tmp_path / 'alone'}", "blr=1e-3", "epochs=2")
    assert "demo: " in alone
    ours, expected = tmp_path / "demo-blr0.001", tmp_path / "alone/demo"
    assert_same_state(final_state(ours), final_state(expected))
    assert "\ndemo-blr0.001: vit_nano" in (ours / "logs/output.txt").read_text()
    code, output = finish(start_process([*command, "blr=1e-3,2e-3"]))
    assert code == 0 and output.count("already finished") == 1
    assert list_checkpoints(tmp_path / "demo-blr0.002/checkpoints")
