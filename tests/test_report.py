"""A report's numbers are those of the log files, and it needs nothing but itself."""

import base64
import io
import json
import math
import re
import statistics
import sys
from contextlib import redirect_stdout
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import launcher
import main_lmim
from launch.command import run_command_line
from launch.config import compose_config
from launch.report import (
    Row,
    compare_workers,
    environments,
    evaluations,
    figure,
    find_jobs,
    find_rows,
    main,
    readable,
    spread,
)
from tests.backbones import run_command
from tests.evaluations import results
from tests.runs import configured_here, records

LOSSES = {100: 2.0, 200: 1.5, 300: 1.25}
ODD = '<b>&"odd" \'$body ${x} $$ ü'


def write_job(folder: Path, *overrides: str, steps=(100, 200, 300), shift=0.0, **watched) -> Path:
    config = compose_config("demo", [*overrides])
    config.job_name = folder.name
    (folder / "results").mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    environment = {"command": ["launcher.py", "a<b"], "git_commit": "c0ffee" * 6, "python": "3.11"}
    environment |= {"git_uncommitted": [], "packages": {"torch": "2.6"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    lines = [{"step": 0, "epoch": 0.0, "nn_accuracy": 50 + shift}]
    for step in steps:
        line = {"step": step, "epoch": step / 10, "loss": LOSSES.get(step, 1.0) + shift}
        lines.append(line | {"lr": 1e-3, "images_per_second": 500 + shift, "data_wait": 0.1})
        numbers = {"rankme": 9 + shift, "same_place": 0.5, "mean_cosine": 0.9, **watched}
        lines.append({"step": step, "epoch": step / 10, "position_probe": 90.0, **numbers})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.txt").write_text(text + '{"step": 400, "los')  # cut off, as by a kill
    return folder


def write_evaluation(folder: Path, pretrained: Path | str, top1: float, **others) -> Path:
    (folder / "results").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"worker: eval.nn\nseed: 0\npretrained: {pretrained}\n")
    contents = {"evaluation": "nn", "results": {"top1": top1}, "protocol": "leave-one-out <i>"}
    contents |= {"pretrained": f"{pretrained}/checkpoints/step-300.pth", "dataset": "digits"}
    (folder / "results" / "nn.json").write_text(json.dumps(contents | others))
    return folder


class Page(HTMLParser):
    """Tables by the headings above them, addresses of other things, numbers of the curves."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses, self.tags, self.captions = [], [], []
        self.heading = ""
        self.feed(self.text)
        self.numbers = json.loads(re.search(r'id="numbers">(.*?)</script>', self.text).group(1))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag in ("h2", "h3"):
            self.heading = ""
        elif tag == "table":
            while self.heading in self.tables:  # of another worker
                self.heading += " again"
            self.tables[self.heading] = []
        elif tag == "tr":
            self.tables[self.heading].append([])
        elif tag in ("td", "th"):
            self.tables[self.heading][-1].append("")
        elif tag == "figcaption":
            self.captions.append("")

    def handle_data(self, text):
        within = next((t for t in self.tags[::-1] if t not in ("svg", "path", "code")), "")
        if within in ("h2", "h3"):
            self.heading += text.strip()
        elif within in ("td", "th"):
            self.tables[self.heading][-1][-1] += text.strip()
        elif within == "figcaption":
            self.captions[-1] += text

    def rows(self, heading: str) -> dict[str, dict[str, str]]:
        header, *rows = self.tables[heading]
        return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture
def report(monkeypatch, capsys, tmp_path):
    """The launcher's whole command in this process. -> (exit code, stdout, stderr)"""

    def run(*overrides: str) -> tuple[int, str, str]:
        command = ["launcher.py", "--config-name=report", f"output_dir={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", [*command, *overrides])
        capsys.readouterr()
        exit_code = run_command_line(launcher.launch, launcher.__doc__)
        return exit_code, *capsys.readouterr()

    return run


def logged(jobs: list[Path], name: str) -> dict[int, list[float]]:
    """By step that all have, read off the files by hand."""
    curves = [{r["step"]: r[name] for r in records(job) if name in r} for job in jobs]
    shared = set(curves[0]).intersection(*curves)
    return {step: [curve[step] for curve in curves] for step in sorted(shared)}


# ---- One page. -----------------------------------------------------------------------------------

BAND = "s0 … s2 (3 runs)"
REASON = "rankme 9 -> 2, 9 at most"
JUDGED = {"verdict": "collapsed", "since": 200, "reason": REASON}


def write_jobs(folder: Path) -> None:
    """Three seeds and others, evaluations of them and of other backbones, a picture."""
    for n, shift in enumerate((0.0, 0.25, 0.75)):
        judged = JUDGED if n == 0 else JUDGED | {"verdict": "healthy"}
        # What changes no result may differ.
        own = [f"seed={n}", f"print_freq={n + 1}", "env=local"]
        run = write_job(folder / f"s{n}", *own, shift=shift, **judged)
        write_evaluation(folder / f"nn-{n}", run, 60.0 + 2 * n)
    write_evaluation(folder / "random", run, 20.0, random_init=True)
    write_evaluation(folder / "timm", "timm:vit_tiny_patch16_224", 50.0)
    write_evaluation(folder / "loose", folder / "gone", 51.0)
    write_job(folder / "mine", "seed=7")
    other = write_job(folder / "other", "tau=0.1", shift=3.0, **JUDGED)
    before = {"before": 58.0, "after": None, "seconds": 3.5, "protocol": "nearest neighbour"}
    (other / "results" / "other.json").write_text(json.dumps(before))
    picture = other / "results" / "pictures" / "000-digit.png"
    picture.parent.mkdir()
    Image.new("RGB", (5, 4), "red").save(picture)
    one = {"evaluation": "few_shot", "protocol": "ridge", "pretrained": str(other)}
    found = {"few_shot": {"trained": one | {"results": {"shots_1": 40.5}}}}
    evaluation = write_evaluation(folder / "evaluate", other, 61.0)
    (evaluation / "results" / "evaluate.json").write_text(json.dumps({"evaluations": found}))
    write_evaluation(folder / "nn", other, 66.0)  # the same protocol once more
    turned = write_job(folder / "turned", "tau=0.3", **JUDGED)  # at first it was healthy
    log = (turned / "log.txt").read_text()
    log = log.replace('"collapsed", "since": 200', '"healthy", "since": 100', 1)
    (turned / "log.txt").write_text(log)
    write_job(folder / "no-number", "tau=0.4", shift=math.nan)
    write_job(folder / "late0", "seed=1", "tau=0.5")
    write_job(folder / "late1", "seed=2", "tau=0.5", steps=(150, 200), shift=0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Page, str]:
    """-> the jobs' folder, the page, what was printed"""
    folder, printed = tmp_path_factory.mktemp("jobs"), io.StringIO()
    write_jobs(folder)
    overrides = [f"jobs=[{folder}/*]", f"apart=[{folder}/mine]", f"output_dir={folder}/out"]
    with redirect_stdout(printed):
        main(compose_config("report", overrides))
    return folder, Page(folder / "out" / "report" / "report.html"), printed.getvalue()


def test_three_seeds_and_another_config_are_one_band_and_one_line(made):
    folder, page, _ = made
    for name in ("loss", "lr", "nn_accuracy", "rankme", "images_per_second"):
        found = page.numbers[f"main_lmim {name}"]
        assert {BAND, "other", "mine"} <= found.keys()
        expected = logged([folder / f"s{n}" for n in range(3)], name)
        assert found[BAND]["steps"] == list(expected)
        means = [statistics.mean(values) for values in expected.values()]
        deviations = [statistics.stdev(values) for values in expected.values()]
        assert found[BAND]["mean"] == pytest.approx(means)
        assert found[BAND]["std"] == pytest.approx(deviations, abs=1e-12)
        assert "std" not in found["other"]
        alone = logged([folder / "other"], name)
        assert found["other"]["mean"] == [value for (value,) in alone.values()]
    settings = page.rows("Settings that differ")
    assert settings[BAND] == {"": BAND, "seed": "0, 1, 2", "tau": "0.2"}
    assert settings["mine"] == {"": "mine", "seed": "7", "tau": "0.2"}
    assert settings["other"] == {"": "other", "seed": "0", "tau": "0.1"}
    training = page.rows("Training")
    rows = {BAND, "mine", "other", "turned", "no-number", "late0 … late1 (2 runs)"}
    assert training.keys() == rows and training["other"]["loss"] == "4.25"
    # 1.25 and the mean of the shifts, 1/3; their deviation is 0.382.
    assert training[BAND]["loss"] == "1.58 ± 0.38" and training[BAND]["step"] == "300"
    assert training[BAND]["lr"] == "0.001 ± 0"
    ran = [{*names.split(", ")} for names in page.rows("Environments")]
    assert len(ran) == 2 and any({"s0", "s1", "s2", "other"} <= names for names in ran)


def test_a_band_has_the_steps_that_all_have_and_says_so(made):
    _, page, printed = made
    found = page.numbers["main_lmim loss"]["late0 … late1 (2 runs)"]
    assert found == {"steps": [200], "mean": [1.75], "std": [pytest.approx(0.125**0.5)]}
    note = "late0 … late1 (2 runs): these end at steps 300, 200; the band has the steps of all."
    assert note in page.text and note in printed
    assert page.text.count("end at steps") == 1, "another config need not end there"


def test_the_verdicts(made):
    _, page, _ = made
    features = page.rows("Features")
    assert features["other"]["verdict"] == features["turned"]["verdict"] == "collapsed"
    assert page.rows("Runs")["turned"]["features"] == "collapsed since step 200"
    assert features[BAND]["verdict"] == "collapsed (1), healthy (2)"
    assert features["other"]["rankme"] == "12" and features["other"]["position_probe"] == "90"
    run = page.rows("Runs")["s1"]
    assert (run["features"], run["reason"]) == ("healthy since step 200", REASON)


def test_a_loss_that_is_no_number(made):
    _, page, _ = made
    assert page.numbers["main_lmim loss"]["no-number"]["mean"] == [None] * 3
    assert page.rows("Training")["no-number"]["loss"] == "nan"


def test_an_evaluation_belongs_to_the_run_that_it_is_of(made):
    _, page, _ = made
    found = {row: cells["top1"] for row, cells in page.rows("nn").items()}
    assert found == {BAND: "62.0 ± 2.0", "timm": "50", "loose": "51", "other": "61"}
    assert page.rows("nn")[BAND]["checkpoint"] == "step-300.pth"
    assert page.rows("nn, random init")[BAND]["top1"] == "20 (1 of 3 runs)"
    assert "leave-one-out &lt;i&gt; (digits)" in page.text


def test_what_pretraining_and_several_evaluations_leave(made):
    _, page, _ = made
    expected = {"": "", "before": "58", "after": "–", "seconds": "3.5", "checkpoint": "–"}
    assert page.rows("pre-training")["other"] | {"": ""} == expected
    assert page.rows("few_shot")["other"]["shots_1"] == "40.5"
    assert page.rows("nn (2)")["other"]["top1"] == "66"


def test_the_page_needs_nothing_but_itself(made):
    folder, page, _ = made
    *curves, pictured = page.addresses
    # loss, lr, images per second, waiting; nearest neighbour and four of the watch
    assert len(curves) == 4 + 5 and page.captions[-1] == "other: 000-digit"
    kind, _, contents = pictured.partition(",")
    assert kind == "data:image/png;base64"
    picture = folder / "other" / "results" / "pictures" / "000-digit.png"
    assert base64.b64decode(contents, validate=True) == picture.read_bytes()
    for address in curves:
        kind, _, contents = address.partition(",")
        drawn = base64.b64decode(contents, validate=True).decode()
        assert kind == "data:image/svg+xml;base64" and "</svg>" in drawn
        assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', drawn))
    assert not re.search(r"url\(|@import|<link|<script (?!type=.application/json)", page.text)


def test_odd_names(report, tmp_path):
    odd = {"worker": "w", "verdict": "x", "since": 0, "reason": "</script><script>"}
    folders = [tmp_path / ODD, tmp_path / "a" / "same", tmp_path / "a</script><b>" / "same"]
    for number, folder in enumerate(folders):  # the last one three folders deep
        small_job(folder, {"step": 1, "loss": 1.0} | odd, tau=number)
    exit_code, _, errors = report(f"jobs=['{tmp_path}/*','{folders[1]}','{folders[2]}']")
    assert (exit_code, errors) == (0, "")
    page = Page(tmp_path / "out" / "report" / "report.html")
    assert "b" not in page.tags and page.tags.count("script") == 1
    names = {ODD, *map(str, folders[1:])}
    assert page.rows("Runs").keys() == names == page.numbers["w loss"].keys()
    assert unescape(re.search(r"<h1>(.*)</h1>", page.text).group(1)).count(ODD) == 1


# ---- Parts of a page, from small folders. --------------------------------------------------------


def small_job(folder: Path, *lines: dict, results: dict | None = None, **config) -> Path:
    (folder / "results").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"worker": "w", "seed": 0} | config))
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if results is not None:
        (folder / "results" / "result.json").write_text(json.dumps(results))
    return folder


def rows_of(*folders: Path, apart: tuple[Path, ...] = ()) -> list[Row]:
    alone = find_jobs("apart", map(str, apart))
    return find_rows(find_jobs("jobs", map(str, folders)) | alone, alone)


def test_what_is_one_row(tmp_path):
    line = {"step": 1, "loss": 1.0}
    first = small_job(tmp_path / "a", line)
    alike = [small_job(tmp_path / "b", line, seed=1), small_job(tmp_path / "c", line, env={"x": 1})]
    other = [
        small_job(tmp_path / "d", line, worker="v"),
        small_job(tmp_path / "e", line, pretrained="a"),
        small_job(tmp_path / "f", line, pretrained_weights="a"),
        *(small_job(tmp_path / f"g{n}", line, tau=n) for n in range(5)),
    ]
    rows = rows_of(first, *alike, *other, tmp_path / "g0" / ".." / "a")
    assert [[job.name for job in row.jobs] for row in rows] == [
        ["a", "b", "c"],
        *([folder.name] for folder in other),
    ]
    assert len({(row.colour, row.dashes) for row in rows}) == len(rows) == 9
    assert len({row.colour for row in rows[:7]}) == 7
    assert len(rows_of(first, alike[0], apart=(alike[1],))) == 2
    in_other_order = (
        small_job(tmp_path / "h", line, x=1, y=2),
        small_job(tmp_path / "i", line, y=2, x=1),
    )
    assert len(rows_of(*in_other_order)) == 1


def test_runs_on_other_numbers_of_images_are_no_band(tmp_path):
    """The config does not say how many there are."""
    jobs = [small_job(tmp_path / f"{n}", {"step": 20, "epoch": n}, seed=n) for n in (2, 10)]
    assert [row.jobs[0].settings()["steps per epoch"] for row in rows_of(*jobs)] == [10, 2]


def test_what_a_row_says(tmp_path):
    lines = [{"step": n, "loss": 1.0} for n in (1, 2, 3)] + [{"step": 2, "rankme": 5.0}]
    judged = {"step": 3, "verdict": "healthy"}
    a = small_job(tmp_path / "a", *lines, judged, {"step": 3, "lr": 1.0})
    b = small_job(tmp_path / "b", *lines[1:], judged, {"step": 2, "lr": 1.0})
    (row,) = rows_of(a, b)
    assert row.verdicts() == "healthy" and row.last_step(["loss", "rankme", "lr"]) == 3
    assert row.last_step(["rankme"]) == 2 and row.last_step(["lr", "nn_accuracy"]) == "–"
    evaluated = small_job(tmp_path / "evaluated", results={"results": {"top1": 1}})
    ((only,),) = [row.jobs for row in rows_of(evaluated)]
    assert only.last_step == 0, "the page shows a dash"
    label = "a … b (2 runs)"
    assert [*row.notes()] == [
        f"{label}: no step that all have of lr.",
        f"{label}: seeds that are there twice (0, 0).",
    ]
    later = small_job(tmp_path / "later", lines[1], {"step": 4, "loss": 1.0}, seed=1)
    apart = small_job(tmp_path / "apart", {"step": 9, "loss": 1.0}, seed=2)
    assert "these end at steps 3, 9" in next(iter(rows_of(b, apart)[0].notes()))
    first_note = next(iter(rows_of(b, later)[0].notes()))
    assert first_note.endswith("these end at steps 3, 4; the band has the steps of all.")
    assert [*rows_of(b, later)[0].notes()][1].endswith("no step that all have of lr, rankme.")
    ((_, figures),) = [part for part in compare_workers([row])["w"][2] if part[0] == "Features"]
    assert [*figures] == ["rankme"]
    c = small_job(tmp_path / "c", *lines[:3], seed=7, tau=1)
    workers = compare_workers(rows_of(a, c, small_job(tmp_path / "d", lines[0], worker="v")))
    assert [*workers] == ["w", "v"] and workers["w"][1] == ["tau"]
    assert "rankme" in dict(workers["w"][2])["Features"], "one of two rows has it"


def test_a_curve_is_drawn_in_the_colour_of_its_row(tmp_path):
    """With a mark for each point where there are few."""
    lines = [{"step": n, "loss": n / 9} for n in range(21)]
    few = small_job(tmp_path / "few", lines[0], *lines[2:])
    many = small_job(tmp_path / "many", *lines, tau=1)
    rows = rows_of(few, many)
    drawings = [figure("loss", [row])[2].decode() for row in rows]
    for row, drawing in zip(rows, drawings, strict=True):
        assert row.colour.lower() in drawing
    assert rows[1].colour.lower() not in drawings[0]
    assert figure("loss", [rows[0]])[2].decode() == drawings[0], "the same job, another drawing"
    assert drawings[0].count("<use") == drawings[1].count("<use") + 20
    for number, dashes in ((1, "6,2"), (2, "2,2"), (3, "8,2,2,2")):  # times the line's width
        scaled = ",".join(f"{1.6 * float(length):g}" for length in dashes.split(","))
        _, _, drawing = figure("loss", [Row(rows[1].jobs, number)])
        assert f"stroke-dasharray: {scaled}" in drawing.decode()


def test_folders_as_they_are_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = small_job(tmp_path / "a[1]", {"step": 1, "loss": 1.0})
    small_job(tmp_path / "a1", {"step": 1, "loss": 1.0})
    assert [*find_jobs("jobs", ["~/a[1]"])] == [folder.resolve()]
    monkeypatch.chdir(tmp_path)
    assert [*find_jobs("jobs", ["a[1]", str(folder)])] == [folder.resolve()]


def test_tables_of_evaluations(tmp_path):
    run = small_job(tmp_path / "run", {"step": 1, "loss": 1.0})

    def evaluated(name: str, **contents) -> Path:
        found = {"evaluation": "nn", "protocol": "p", "dataset": "d"} | contents
        return small_job(tmp_path / name, results=found, worker="eval.nn", job_name=name)

    numbers = {"top1": 60.0, "how": "exact", "is_exact": True}
    first = evaluated("1", results=numbers, pretrained=f"lmim:{run}/checkpoints/x.pth")
    others = [
        evaluated("2", results={"top1": 61.0}, pretrained=str(run), protocol="q"),
        evaluated("3", results={"top1": 62.0}, pretrained=str(run), dataset="e"),
    ]
    variants = {"trained": {"results": {"top1": 1.0}}, "random init": {"results": {"top1": 2.0}}}
    own = {"evaluations": {"nn": variants}}
    both = small_job(tmp_path / "4", results=own, worker="eval.evaluate")
    rows = rows_of(run, first, *others, both)
    assert [row.label for row in rows] == ["run", "4"]
    tables = [(title, about, [*names], lines) for title, about, names, lines in evaluations(rows)]
    assert [(about, names) for _, about, names, _ in tables[-3:]] == [
        ("p (d)", ["top1", "how", "is_exact"]),
        ("q (d)", ["top1"]),
        ("p (e)", ["top1"]),
    ]
    assert tables[-3][3] == [(rows[0], ["60", "–", "–", "x.pth"])]
    assert [line[1][0] for _, _, _, lines in tables[:2] for line in lines] == ["1", "2"]


def test_numbers_and_environments_as_text(tmp_path):
    assert spread([1234.56], 1) == "1235" and spread([0.123456], 2) == "0.1235 (1 of 2 runs)"
    assert spread([], 1) == "–" and spread([5.0, 5.0], 2) == "5 ± 0"
    assert (
        spread([100.0, 100.002], 2) == "100.0010 ± 0.0014" and spread([0.0, 28.3], 2) == "14 ± 20"
    )
    assert readable(np.array([1.0, math.inf, -math.inf, math.nan])) == [1.0, None, None, None]
    job = small_job(tmp_path / "a", {"step": 1, "loss": 1.0})
    seen = {"git_commit": "0123456789abcdef", "git_uncommitted": ["x.py", "y.py"]}
    seen |= {"python": "3.12", "packages": {"torch": "2.9", "timm": "1"}}
    (job / "environment.json").write_text(json.dumps(seen))
    jobs = [*find_jobs("jobs", [str(job)]).values()]
    cells = ("0123456789ab", "x.py, y.py", "3.12", "torch 2.9, timm 1")
    assert environments(jobs) == {cells: ["a"]}


# ---- Bad input. ----------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(report, tmp_path):
    (tmp_path / "empty").mkdir()
    silent = small_job(tmp_path / "silent")
    line = {"step": 100, "loss": 1.0}
    damaged = small_job(tmp_path / "damaged", line)
    (damaged / "results" / "nn.json").write_text("{")
    for n, step in enumerate((100, 110)):
        small_job(tmp_path / f"s{n}", line | {"step": step}, seed=n)
    cases = {
        f"jobs=[{tmp_path}/gone]": "gone holds no config.yaml",
        f"jobs=[{tmp_path}/empty]": f"jobs={tmp_path}/empty: expected a job's folder",
        f"apart=[{tmp_path}/silent]": "has neither logged a step nor left results",
        f"jobs=[{tmp_path}/damaged]": "has a damaged file",
        f"jobs=[{tmp_path}/e*]": "expected folders of jobs, but it matches none",
        "jobs=[]": "jobs=[]: expected folders of jobs",
        "jobs=checkpoints/demo": "jobs=checkpoints/demo: expected a list of texts",
    }
    for override, expected in cases.items():
        exit_code, _, errors = report(override)
        assert exit_code == 2 and expected in errors, override
        assert errors.startswith("error: ") and errors.count("\n") == 1, override
    assert not (tmp_path / "out" / "report" / "report.html").exists()
    # A glob takes what is a job, and says what it leaves out.
    exit_code, output, _ = report(f"jobs=['{tmp_path}/s[0i]*']")
    assert exit_code == 0 and f"left out: {silent} has neither" in output


# ---- A real run. ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_a_real_run_and_its_evaluation(tmp_path):
    main_lmim.main(configured_here(tmp_path, "max_steps=3", "watch_images=60"))
    assert run_command("nn", f"pretrained={tmp_path}/demo", f"output_dir={tmp_path}") == 0
    main(compose_config("report", [f"jobs=[{tmp_path}/*]", f"output_dir={tmp_path}/out"]))
    page = Page(tmp_path / "out" / "report" / "report.html")
    expected = logged([tmp_path / "demo"], "loss")
    assert len(expected) == 3
    assert page.numbers["main_lmim loss"]["demo"]["mean"] == [loss for (loss,) in expected.values()]
    result = results(tmp_path, "nn")
    name, value = next(iter(result["results"].items()))
    assert page.rows("nn")["demo"][name] == f"{value:.4g}"
    assert "since step" in page.rows("Runs")["demo"]["features"]
