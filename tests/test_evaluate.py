"""Several evaluations, one table."""

import pytest
import yaml

from eval.evaluate import PUBLISHED, compose, main
from launch.config import CONFIG_DIR, compose_config
from launch.validate import EVALUATIONS
from tests import eval_by_hand as by_hand
from tests.backbones import digits_checkpoint, run_command
from tests.evaluations import config


def test_a_table_by_hand(tmp_path, capsys):
    """Every key is away from its default, but for final_norm (below), or in the run after it."""
    path = by_hand.write_checkpoint(tmp_path)
    root = by_hand.write_images(tmp_path / "images")
    places = [f"data_path={root}", f"cache_dir={tmp_path / 'cache'}", "job_name=table"]
    settings = "nn.pooling=cls knn.neighbours=[6,38] knn.temperature=1".split()
    own = ["evals=[knn,nn]", f"settings={settings}", "beside_random_init=True", "seed=5"]
    cfg = config("evaluate", path, tmp_path, *by_hand.MOVED, *places, *own)
    main(cfg)

    columns = {"trained": by_hand.stored_weights(path, "target")}
    columns["random init"] = by_hand.fresh_weights(5)
    knn, nn = {}, {}
    for label, weights in columns.items():
        parts = {}
        for split in ("train", "val"):
            files, labels = by_hand.list_images(root, split)
            parts[split] = by_hand.features(files, weights, norm=True, pooling="mean"), labels
        knn[label] = {}
        for k in (6, 38):
            shares = by_hand.nearest_neighbours(parts["train"], parts["val"], k, 1)
            knn[label] |= {f"k{k}_top1": shares[0], f"k{k}_top5": shares[1]}
        features = by_hand.features(files, weights, norm=False, pooling="cls")
        nn[label] = {"top1": by_hand.leave_one_out(features, labels)}
    expected = {"knn": knn, "nn": nn}
    assert knn["trained"] != knn["random init"] and nn["trained"] != nn["random init"]
    job = tmp_path / "table"
    contents = by_hand.report_of(job)
    assert contents["dataset"] == "imagefolder" and contents["backbone"]["layer"] == 1
    found = contents["evaluations"]
    assert {name: list(variants) for name, variants in found.items()} == {
        "knn": list(columns),
        "nn": list(columns),
    }
    for name, variants in expected.items():
        for label, numbers in variants.items():
            report, folder = found[name][label], f"{name}-random-init"
            assert report["results"] == pytest.approx(numbers, abs=1e-9)
            assert report["random_init"] == (label != "trained")
            assert report == by_hand.report_of(job / (name if label == "trained" else folder))
    rows = [
        f"| {name} | {metric} | {variants['trained'][metric]:.4g} | "
        f"{variants['random init'][metric]:.4g} |"
        for name, variants in expected.items()
        for metric in variants["trained"]
    ]
    header = ["| evaluation | metric | trained | random init |", "| --- | ---: | ---: | ---: |"]
    protocols = [
        "- knn: k-NN, bank of 50 training images, votes of exp(cosine / 1), pooling mean, "
        "with final norm, percent",
        "- nn: nearest neighbour, leave-one-out inside the evaluation images, pooling cls, "
        "without final norm, percent",
    ]
    text = "\n".join([*header, *rows, "", *protocols])
    (page,) = (job / "results").glob("evaluate-imagefolder-*.md")
    assert page.read_text() == text + "\n"
    assert text in capsys.readouterr().out
    # Two splits and one of each of two networks.
    assert len(list((tmp_path / "cache").iterdir())) == 6

    cfg.beside_random_init, cfg.random_init, cfg.dataset.name = False, True, "imagenet"
    cfg.evals, cfg.settings = ["nn"], settings[:1]
    main(cfg)
    text = "\n".join(
        ["| evaluation | metric | random init |", "| --- | ---: | ---: |"]
        + [f"| nn | top1 | {nn['random init']['top1']:.4g} |", "", protocols[1], PUBLISHED]
    )
    (page,) = (job / "results").glob("evaluate-imagenet-*-random-init-*.md")
    assert page.read_text() == text + "\n"


# Of each key that the evaluations share: what is not its default.
SHARED = {
    "pretrained": "timm:vit_tiny_patch16_224",
    **{"pretrained_weights": "tiny.pth", "which": "target", "layer": 1, "image_side": 32},
    **{"precision": "bf16", "seed": 3, "batch_size": 7, "num_workers": 2, "data_timeout": 20},
    **{"cache_dir": "cache", "data_path": "images", "max_bad_images": 0.25},
}
NOT_SHARED = {"final_norm", "random_init", "output_dir"}  # each evaluation has its own
TRAININGS = {"batch_size": 512, "precision": "auto"}
# Its worker, and what its name says.
NAMES = {
    "nn": {"worker": "eval.nn", "protocol": "paper", "final_norm": False},
    "knn": {"worker": "eval.nn", "protocol": "knn", "final_norm": True},
    "few_shot": {"worker": "eval.few_shot", "final_norm": True},
    "linear_probe": {"worker": "eval.linear_probe", "final_norm": True} | TRAININGS,
    "finetune": {"worker": "eval.finetune", "final_norm": False} | TRAININGS | {"batch_size": 128},
    "collapse": {"worker": "eval.collapse", "final_norm": False},
    "patches_knn": {"worker": "eval.segmentation", "method": "knn"},
    "patches_linear": {"worker": "eval.segmentation", "method": "linear"},
    "clusters": {"worker": "eval.segmentation", "method": "unsupervised", "segments": ["truth"]},
}


@pytest.fixture(scope="module")
def whole():
    """The config of a run whose shared keys are all away from their defaults."""
    changes = [f"{key}={value}" for key, value in SHARED.items()]
    sections = "dataset=masks dataset.crop_ratio=0.8 env.timeout=77".split()
    return compose_config("evaluate", [*changes, *sections, "output_dir=out", "job_name=table"])


def test_what_there_is_to_share(whole):
    defaults = yaml.safe_load((CONFIG_DIR / "backbone" / "default.yaml").read_text())
    assert set(defaults) == {*SHARED, *NOT_SHARED}
    assert all(defaults[key] != value for key, value in SHARED.items())
    assert set(NAMES) == set(EVALUATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_evaluation_takes_over(whole, name):
    own = compose(whole, name, random_init=name == "nn")
    expected = SHARED | NAMES[name] | {"random_init": name == "nn", "output_dir": "out/table"}
    expected["job_name"] = "nn-random-init" if name == "nn" else name
    assert {key: own[key] for key in expected} == expected
    assert own.dataset == whole.dataset and own.env == whole.env


def test_a_setting_goes_before_what_is_shared(whole):
    whole = whole.copy()
    whole.evals = ["nn", "knn"]
    whole.settings = [
        *("knn.layer=2", "knn.dataset.crop_ratio=0.5", "knn.cache_dir=null"),
        *("knn.final_norm=False", "nn.dataset=digits", "nn.batch_size=9"),
        *("nn.+env.slurm_extra.a=b", "knn.backbone=default"),  # a new key; a group without one
    ]
    knn, nn = (compose(whole, name, random_init=False) for name in ("knn", "nn"))
    assert (knn.layer, knn.final_norm, knn.cache_dir, knn.batch_size) == (2, False, None, 7)
    assert knn.dataset == {**whole.dataset, "crop_ratio": 0.5}
    assert (nn.layer, nn.cache_dir, nn.batch_size) == (1, "cache", 9)
    assert nn.dataset == compose_config("nn", ["dataset=digits"]).dataset
    assert nn.env.slurm_extra == {"a": "b"} and knn.env == whole.env


def test_a_wrong_setting_ends_it_before_anything_runs(tmp_path, capfd):
    common = [f"output_dir={tmp_path}", f"pretrained={digits_checkpoint(tmp_path)}", "evals=[nn]"]
    for settings, expected in [
        ("settings=['knn.neighbours=3']", "expected NAME.key=value, NAME one of nn"),
        ("settings=['nn.neighbors=3']", "neighbors: unknown key; did you mean neighbours"),
        ("settings=['nn.temperature=0']", "temperature=0: expected a number above 0"),
        ("evals=[nm]", "evals=['nm']: expected a list of different ones of nn, knn"),
    ]:
        assert run_command("evaluate", *common, settings) == 2
        output = capfd.readouterr()
        assert expected in output.err and "top1" not in output.out


@pytest.mark.parametrize("restarts", ["0", "1"])
def test_a_requeued_job_keeps_what_its_trainings_have_saved(tmp_path, monkeypatch, restarts):
    cfg = compose_config("evaluate", ["dataset=digits", f"output_dir={tmp_path}"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    own = compose(cfg, "finetune", random_init=False)
    assert (own.resume, own.overwrite) == (restarts == "1", restarts == "0")


def test_final_norm_belongs_to_each_evaluation(tmp_path, capfd):
    checkpoint = digits_checkpoint(tmp_path)
    overrides = [f"pretrained={checkpoint}", f"output_dir={tmp_path}", "final_norm=False"]
    assert run_command("evaluate", *overrides) == 2
    assert "settings=['NAME.final_norm=False']" in capfd.readouterr().err
