"""A report's numbers are those of the log files, and it needs nothing but itself."""

import base64
import json
import math
import re
import statistics
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

import launcher
from tests.runs import LAUNCHER, finish, records, start_process, succeed
from util.command import run_command_line
from util.config import compose_config

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


@pytest.fixture
def page_of(report, tmp_path):
    def run(*overrides: str) -> Page:
        exit_code, _, errors = report(*overrides)
        assert (exit_code, errors) == (0, "")
        return Page(tmp_path / "out" / "report" / "report.html")

    return run


def logged(jobs: list[Path], name: str) -> dict[int, list[float]]:
    """By step that all have, read off the files by hand."""
    curves = [{r["step"]: r[name] for r in records(job) if name in r} for job in jobs]
    shared = set(curves[0]).intersection(*curves)
    return {step: [curve[step] for curve in curves] for step in sorted(shared)}


# ---- Numbers. ------------------------------------------------------------------------------------


def test_three_seeds_and_another_config_are_one_band_and_one_line(page_of, tmp_path):
    shifts = (0.0, 0.25, 0.75)
    seeds = [
        # What changes no result may differ.
        write_job(tmp_path / f"s{n}", f"seed={n}", f"print_freq={n + 1}", "env=local", shift=shift)
        for n, shift in enumerate(shifts)
    ]
    write_job(tmp_path / "other", "tau=0.1", shift=3.0)
    page = page_of(f"jobs=[{tmp_path}/s*,{tmp_path}/other]")
    band, line = "s0 … s2 (3 runs)", "other"
    for name in ("loss", "lr", "nn_accuracy", "rankme", "images_per_second"):
        found = page.numbers[f"main_lmim {name}"]
        assert found.keys() == {band, line}
        expected = logged(seeds, name)
        assert found[band]["steps"] == list(expected)
        means, deviations = (
            map(statistics.mean, expected.values()),
            map(statistics.stdev, expected.values()),
        )
        assert found[band]["mean"] == pytest.approx(list(means))
        assert found[band]["std"] == pytest.approx(list(deviations), abs=1e-12)
        assert "std" not in found[line]
        alone = logged([tmp_path / "other"], name)
        assert found[line]["mean"] == [value for (value,) in alone.values()]
    settings = page.rows("Settings that differ")
    assert settings[band] == {"": band, "seed": "0, 1, 2", "tau": "0.2"}
    assert settings[line] == {"": line, "seed": "0", "tau": "0.1"}
    training = page.rows("Training")
    assert training.keys() == {band, line} and training[line]["loss"] == "4.25"
    # 1.25 and the mean of the shifts, 1/3; their deviation is 0.382.
    assert training[band]["loss"] == "1.58 ± 0.38" and training[band]["step"] == "300"
    assert training[band]["lr"] == "0.001 ± 0"
    assert len(page.rows("Runs")) == 4 and list(page.rows("Environments")) == ["s0, s1, s2, other"]


@pytest.mark.slow
def test_a_run_of_ones_own_over_the_band_of_the_same_settings(page_of, tmp_path):
    for n in range(3):
        write_job(tmp_path / f"s{n}", f"seed={n}")
    write_job(tmp_path / "mine", "seed=7")
    page = page_of(f"jobs=[{tmp_path}/*]", f"apart=[{tmp_path}/mine]")
    assert page.rows("Training").keys() == {"mine", "s0 … s2 (3 runs)"}
    assert "end at steps" not in page.text
    assert page_of(f"jobs=[{tmp_path}/*]").rows("Training").keys() == {"mine … s2 (4 runs)"}


def test_runs_on_other_numbers_of_images_are_no_band(page_of, tmp_path):
    """The config does not say how many there are."""
    jobs = [write_job(tmp_path / f"s{n}", f"seed={n}") for n in range(2)]
    text = (jobs[1] / "log.txt").read_text()
    (jobs[1] / "log.txt").write_text(re.sub(r'"epoch": (\d+)\.', r'"epoch": 1\1.', text))
    settings = page_of(f"jobs=[{tmp_path}/s*]").rows("Settings that differ")
    assert {row["steps per epoch"] for row in settings.values()} == {"10", "2"}


@pytest.mark.slow
def test_a_band_has_the_steps_that_all_have_and_says_so(report, page_of, tmp_path):
    write_job(tmp_path / "a", "seed=1")
    write_job(tmp_path / "b", "seed=2", steps=(150, 200), shift=0.5)
    page = page_of(f"jobs=[{tmp_path}/a,{tmp_path}/b]")
    (found,) = page.numbers["main_lmim loss"].values()
    assert found == {"steps": [200], "mean": [1.75], "std": [pytest.approx(0.125**0.5)]}
    note = "a … b (2 runs): these end at steps 300, 200; the band has the steps of all."
    assert note in page.text and note in report(f"jobs=[{tmp_path}/a,{tmp_path}/b]")[1]
    # Another config need not end there.
    write_job(tmp_path / "c", "tau=0.1", steps=(100,))
    assert "end at steps" not in page_of(f"jobs=[{tmp_path}/a,{tmp_path}/c]").text


def test_the_verdicts(page_of, tmp_path):
    reason = "rankme 9 -> 2, 9 at most"
    judged = {"verdict": "collapsed", "since": 200, "reason": reason}
    write_job(tmp_path / "s0", "seed=0", **judged)
    write_job(tmp_path / "s1", "seed=1", **judged | {"verdict": "healthy"})
    write_job(tmp_path / "other", "tau=0.1", **judged)
    turned = write_job(tmp_path / "turned", "tau=0.3", **judged)  # at first it was healthy
    log = (turned / "log.txt").read_text()
    log = log.replace('"collapsed", "since": 200', '"healthy", "since": 100', 1)
    (turned / "log.txt").write_text(log)
    page = page_of(f"jobs=[{tmp_path}/s*,{tmp_path}/other,{turned}]")
    features = page.rows("Features")
    assert features["other"]["verdict"] == features["turned"]["verdict"] == "collapsed"
    assert page.rows("Runs")["turned"]["features"] == "collapsed since step 200"
    assert features["s0 … s1 (2 runs)"]["verdict"] == "collapsed (1), healthy (1)"
    assert features["other"]["rankme"] == "9" and features["other"]["position_probe"] == "90"
    run = page.rows("Runs")["s1"]
    assert (run["features"], run["reason"]) == ("healthy since step 200", reason)


def test_a_loss_that_is_no_number(page_of, tmp_path):
    write_job(tmp_path / "a", shift=math.nan)
    page = page_of(f"jobs=[{tmp_path}/a]")
    assert page.numbers["main_lmim loss"]["a"]["mean"] == [None] * 3
    assert page.rows("Training")["a"]["loss"] == "nan"


# ---- Evaluations and pictures. -------------------------------------------------------------------


def test_an_evaluation_belongs_to_the_run_that_it_is_of(page_of, tmp_path):
    for n, top1 in enumerate((60.0, 62.0, 64.0)):
        run = write_job(tmp_path / f"s{n}", f"seed={n}")
        write_evaluation(tmp_path / f"nn-{n}", run, top1)
    write_evaluation(tmp_path / "random", run, 20.0, random_init=True)
    write_evaluation(tmp_path / "timm", "timm:vit_tiny_patch16_224", 50.0)
    write_evaluation(tmp_path / "loose", tmp_path / "gone", 51.0)
    page = page_of(f"jobs=[{tmp_path}/*]")
    band = "s0 … s2 (3 runs)"
    found = {row: cells["top1"] for row, cells in page.rows("nn").items()}
    assert found == {band: "62.0 ± 2.0", "timm": "50", "loose": "51"}
    assert page.rows("nn")[band]["checkpoint"] == "step-300.pth"
    assert page.rows("nn, random init")[band]["top1"] == "20 (1 of 3 runs)"
    assert "leave-one-out &lt;i&gt; (digits)" in page.text


def test_what_pretraining_and_several_evaluations_leave(page_of, tmp_path):
    run = write_job(tmp_path / "run")
    before = {"before": 58.0, "after": None, "seconds": 3.5, "protocol": "nearest neighbour"}
    (run / "results" / "run.json").write_text(json.dumps(before))
    one = {"evaluation": "few_shot", "protocol": "ridge", "pretrained": str(run)}
    found = {"few_shot": {"trained": one | {"results": {"shots_1": 40.5}}}}
    evaluation = write_evaluation(tmp_path / "evaluate", run, 61.0)
    (evaluation / "results" / "evaluate.json").write_text(json.dumps({"evaluations": found}))
    write_evaluation(tmp_path / "nn", run, 66.0)  # the same protocol once more
    page = page_of(f"jobs=[{tmp_path}/*]")
    assert page.rows("pre-training")["run"] | {"": ""} == {
        **{"": "", "before": "58", "after": "–", "seconds": "3.5", "checkpoint": "–"}
    }
    assert page.rows("few_shot")["run"]["shots_1"] == "40.5"
    assert page.rows("nn")["run"]["top1"] == "61" and page.rows("nn (2)")["run"]["top1"] == "66"


def test_the_page_needs_nothing_but_itself(page_of, tmp_path):
    job = write_job(tmp_path / "a")
    picture = job / "results" / "pictures" / "000-digit.png"
    picture.parent.mkdir()
    Image.new("RGB", (5, 4), "red").save(picture)
    page = page_of(f"jobs=[{job}]")
    *curves, pictured = page.addresses
    # loss, lr, images per second, waiting; nearest neighbour and four of the watch
    assert len(curves) == 4 + 5 and page.captions[-1] == "a: 000-digit"
    kind, _, contents = pictured.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(contents, validate=True) == picture.read_bytes()
    for address in curves:
        kind, _, contents = address.partition(",")
        drawn = base64.b64decode(contents, validate=True).decode()
        assert kind == "data:image/svg+xml;base64" and "</svg>" in drawn
        assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', drawn))
    assert not re.search(r"url\(|@import|<link|<script (?!type=.application/json)", page.text)
    first = page.text
    assert page_of(f"jobs=[{job}]").text == first, "the same jobs, another page"


def test_odd_names(page_of, tmp_path):
    write_job(tmp_path / ODD, "seed=1", reason="</script><script>", verdict="x", since=0)
    folders = [tmp_path / "a" / "same", tmp_path / "a</script><b>" / "same"]  # three folders deep
    for number, folder in enumerate(folders):
        write_job(folder, f"tau=0.{number + 3}")
    page = page_of(f"jobs=['{tmp_path}/*','{folders[0]}','{folders[1]}']")
    assert "b" not in page.tags and page.tags.count("script") == 1
    assert page.rows("Runs").keys() == {ODD, *map(str, folders)}
    assert page.numbers["main_lmim loss"].keys() == {ODD, *map(str, folders)}
    assert unescape(re.search(r"<h1>(.*)</h1>", page.text).group(1)).count(ODD) == 1


# ---- Bad input. ----------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(report, tmp_path):
    (tmp_path / "empty").mkdir()
    silent = write_job(tmp_path / "silent")
    (silent / "log.txt").write_text("")
    damaged = write_job(tmp_path / "damaged")
    (damaged / "results" / "nn.json").write_text("{")
    for n, steps in enumerate([(100,), (110,)]):
        write_job(tmp_path / f"s{n}", f"seed={n}", steps=steps)
        path = tmp_path / f"s{n}" / "log.txt"
        path.write_text(path.read_text().split("\n", 1)[1])  # without step 0
    cases = {
        f"jobs=[{tmp_path}/gone]": "gone holds no config.yaml",
        f"jobs=[{tmp_path}/empty]": f"jobs={tmp_path}/empty: expected a job's folder",
        f"apart=[{tmp_path}/silent]": "has neither logged a step nor left results",
        f"jobs=[{tmp_path}/damaged]": "has a damaged file",
        f"jobs=[{tmp_path}/e*]": "expected folders of jobs, but it matches none",
        f"jobs=[{tmp_path}/s?]": "s0 … s1 (2 runs): expected runs that have logged the same steps",
        "jobs=[]": "jobs=[]: expected folders of jobs",
        "jobs=checkpoints/demo": "expected a list of folders of jobs or globs of them",
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
def test_of_a_real_run_and_its_evaluation(page_of, tmp_path):
    succeed(LAUNCHER, "max_steps=12", "watch_images=60", f"output_dir={tmp_path}")
    command = [*LAUNCHER, "--config-name=nn", f"pretrained={tmp_path}/demo", "dataset=digits"]
    code, output = finish(start_process([*command, f"output_dir={tmp_path}"]))
    assert code == 0, output
    page = page_of(f"jobs=[{tmp_path}/*]")
    expected = logged([tmp_path / "demo"], "loss")
    assert len(expected) == 12
    assert page.numbers["main_lmim loss"]["demo"]["mean"] == [loss for (loss,) in expected.values()]
    result = json.loads((tmp_path / "nn/results/nn.json").read_text())
    name, value = next(iter(result["results"].items()))
    assert page.rows("nn")["demo"][name] == f"{value:.4g}"
    assert "since step" in page.rows("Runs")["demo"]["features"]
