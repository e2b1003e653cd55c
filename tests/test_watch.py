"""The watch over a run: its numbers against their definitions, its judgement of planted histories,
and runs that are alive and that are not."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.base import ArrayDataset
from data.transforms import EvalTransform
from eval.collapse import CollapseWatch, judge, measure_pooled, measure_tokens
from launch.config import compose_config
from tests.runs import (
    LAUNCHER,
    assert_same_state,
    final_state,
    finish,
    read_board,
    records,
    run,
    start_process,
    succeed,
    succeed_together,
)
from util.build import build_model, eval_loader
from util.distributed import Ranks
from util.loop import watched_steps

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = [
    *("encoder.embed_dim=24", "encoder.depth=2", "proj.mlp_dim=32", "batch_size=20"),
    *("decoder_embed_dim=24", "num_workers=0"),
]


def some_images(labels) -> ArrayDataset:
    images = np.random.default_rng(0).integers(0, 255, (90, 24, 24, 3), dtype=np.uint8)
    return ArrayDataset("some", images, labels, ["a", "b"])


def measured(dataset: ArrayDataset, *overrides: str, ranks: Ranks = ALONE) -> dict[str, float]:
    cfg = compose_config("demo", [*SMALL, *overrides])
    torch.manual_seed(3)
    encoder = build_model(cfg).encoder
    watch = CollapseWatch(cfg, ranks, eval_loader(cfg, ranks, dataset, EvalTransform(24, 1.0)))
    first = watch.measure(encoder, lambda images: images / 255)
    assert watch.measure(encoder, lambda images: images / 255) == first
    return first


def test_images_are_measured_in_small_batches():
    dataset = some_images([0] * 90)
    for batch_size, first in ((80, 64), (20, 20)):
        cfg = compose_config("demo", [*SMALL, f"batch_size={batch_size}"])
        images = eval_loader(cfg, ALONE, dataset, EvalTransform(24, 1.0))
        assert len(CollapseWatch(cfg, ALONE, images).loader.batches[0]) == first


def test_similarities_equal_their_definitions():
    tokens = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0)) + 1
    found = measure_tokens(tokens[:4].split(3), tokens[4:].split(2), (5, 6), ALONE)
    unit = F.normalize(tokens.double(), dim=-1).numpy()
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    same = np.mean([unit[i, p] @ unit[j, p] for i, j in pairs for p in range(5)])
    places = [(p, q) for p in range(5) for q in range(5) if p != q]
    other = np.mean([unit[i, p] @ unit[j, q] for i, j in pairs for p, q in places])
    assert found["same_place"] == pytest.approx(same, abs=1e-12)
    assert found["other_places"] == pytest.approx(other, abs=1e-12)
    inside = np.mean([unit[i].mean(0) @ unit[i].mean(0) for i in range(7)])
    assert found["token_similarity"] == pytest.approx(inside, abs=1e-12)


def test_what_is_measured_and_of_which_images():
    """A third of the images, evenly spread, before the final norm."""
    dataset = some_images(np.arange(90) % 2)
    found = measured(dataset, "watch_images=30")
    torch.manual_seed(3)
    encoder = build_model(compose_config("demo", SMALL)).encoder
    chosen = torch.from_numpy(dataset.images[::3]).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens = encoder.encode_images(chosen / 255)[:, 1:]
    pooled = tokens.mean(dim=1)
    expected = measure_tokens([tokens[::2]], [tokens[1::2]], (16, 24), ALONE)
    for name in ("rankme", "mean_cosine"):
        expected[name] = measure_pooled(pooled)[name]
    assert found == pytest.approx(expected, rel=1e-5) and found["position_chance"] == 100 / 16


def test_labels_play_no_part():
    first = measured(some_images(np.arange(90) % 2))
    assert measured(some_images(np.zeros(90))) == first
    unlabelled = some_images(np.zeros(90))
    unlabelled.labels = None
    assert measured(unlabelled) == first


def test_an_unreadable_image_is_left_out(monkeypatch):
    load = ArrayDataset.load

    def broken(self, index):
        if index == 5:
            raise OSError("damaged")
        return load(self, index)

    monkeypatch.setattr(ArrayDataset, "load", broken)
    dataset = some_images(np.zeros(90))
    kept = [index for index in range(90) if index != 5]
    found = measured(dataset)
    monkeypatch.undo()
    dataset.images, dataset.labels = dataset.images[kept], dataset.labels[kept]
    whole = measured(dataset)
    assert found["same_place"] == pytest.approx(whole["same_place"], rel=1e-5)
    assert found["rankme"] == pytest.approx(whole["rankme"], rel=1e-5)


# ---- The judgement. ------------------------------------------------------------------------------


def history(**steps: tuple[float, float]) -> dict[int, dict[str, float]]:
    """s10=(rankme, content), ..."""
    return {int(s[1:]): {"rankme": r, "same_place": 1 - c} for s, (r, c) in steps.items()}


START = {"s0": (8.0, 0.2)}
FALLS = {"s0": (9.0, 0.04), "s30": (4.0, 0.02), "s90": (7.0, 0.03), "s150": (20.0, 0.2)}
CASES = {  # steps of 600 -> (verdict, since)
    "a network without training": (START, ("too early to say", 0)),
    "falls at first, as good runs do": (START | {"s30": (3.4, 0.1)}, ("too early to say", 0)),
    "a good run": (FALLS, ("healthy", 150)),
    "less than at the start": (START | {"s90": (12, 0.19)}, ("partial", 90)),
    "fewer directions": (START | {"s90": (7.9, 0.4), "s150": (7, 0.4)}, ("partial", 90)),
    "a code of places": (START | {"s90": (5, 0.03), "s150": (5, 0.02)}, ("collapsed", 90)),
    "all images alike": (START | {"s10": (1.4, 0.2)}, ("collapsed", 10)),
    "late": (START | {"s150": (30, 0.5), "s300": (28, 0.12)}, ("collapsed", 300)),
    "a quarter is left": (START | {"s90": (8, 0.0501)}, ("partial", 90)),
    "exactly a quarter of the directions": (START | {"s90": (2, 0.2)}, ("partial", 90)),
    "exactly as at the start": (START | {"s90": (8, 0.2)}, ("healthy", 90)),
    "it comes back": (START | {"s90": (2, 0.01), "s150": (9, 0.3)}, ("healthy", 150)),
    "no number": (START | {"s90": (8, math.nan)}, ("collapsed", 90)),
    "no number of directions": (START | {"s90": (math.nan, 1)}, ("collapsed", 90)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_judgement(name):
    steps, expected = CASES[name]
    judged = judge(history(**steps), 600)
    assert (judged.verdict, judged.since) == expected


def test_the_reason_names_what_was_lost():
    judged = judge(history(**START, s90=(5, 0.04), s150=(5, 0.02)), 600)
    assert str(judged) == "collapsed since step 90 (content 0.2 -> 0.02)"
    judged = judge(history(**START, s150=(30, 0.5), s300=(28, 0.12)), 600)
    assert judged.reason == "content 0.2 -> 0.12, once 0.5"
    judged = judge(history(**START, s150=(30, 0.5), s300=(28, 0.3)), 600)
    assert judged.reason == "rankme 8 -> 28, content 0.2 -> 0.3"
    assert judge({}, 600) is None


def test_when_it_is_looked_at():
    assert watched_steps(600) == {0, 10, 30, 90, 100, 150, 300}
    assert watched_steps(500) == {0, 10, 30, 75, 100, 125, 300}
    assert {100_000, 300_000, 37_500, 62_500} < watched_steps(250_000)


# ---- Runs. ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_is_watched(tmp_path):
    """On two processes: the same weights as without, and the numbers of one process."""
    share = ["batch_size=64", "eval_freq=2", "max_steps=24"]
    succeed_together(2, *share, f"output_dir={tmp_path / 'off'}")
    output = succeed_together(2, *share, f"output_dir={tmp_path}", "watch_images=100")
    job = tmp_path / "demo"
    assert_same_state(final_state(job), final_state(tmp_path / "off" / "demo"))
    lines = [record for record in records(job) if "rankme" in record]
    # At 15 % and 25 % of 30 steps, at the evaluations, and at the end of the trial.
    assert [line["step"] for line in lines] == [0, 4, 8, 10, 20, 24]
    alone = ["batch_size=128", "max_steps=1", "watch_images=100"]
    succeed(LAUNCHER, *alone, f"output_dir={tmp_path / 'alone'}")
    first = records(tmp_path / "alone" / "demo")[0]
    assert first["rankme"] == pytest.approx(lines[0]["rankme"], rel=1e-5)
    assert first["same_place"] == pytest.approx(lines[0]["same_place"], rel=1e-5)
    last = judge({line["step"]: line for line in lines}, 30)
    assert output.count(f"features {last}\n") == 1 and f"features     {last}\n" in output
    result = json.loads((job / "results" / "demo.json").read_text())
    assert (result["verdict"], result["since"]) == (last.verdict, last.since)
    shown = read_board(job / "tensorboard")
    assert [event.step for event in shown.Scalars("collapse/rankme")] == [0, 4, 8, 10, 20, 24]
    (text,) = shown.Tensors("collapse/verdict")[-1].tensor_proto.string_val
    assert text.decode() == last.verdict
    pictures = [(image.step, image.width, image.height) for image in shown.Images("eval/images")]
    assert pictures == [(20, 4 * 30, 6 * 30), (24, 4 * 30, 6 * 30)]
    (config,) = shown.Tensors("train/config")[0].tensor_proto.string_val
    assert b"    watch_images: 100\n" in config
    status = [*LAUNCHER, "--config-name=status", f"output_dir={tmp_path}"]
    header, row = finish(start_process(status))[1].splitlines()
    assert row[header.index("features") :].startswith(f"{last.verdict}  ")


@pytest.mark.slow
def test_a_run_that_collapses_ends_where_it_is_asked_to(tmp_path):
    dead = ["target=joint", "loss=l2", "avg_sim_coeff=0", "proj.mlp_depth=0", "watch_images=100"]
    settings = [*dead, "epochs=9", "blr=2e-2", f"output_dir={tmp_path}"]
    code, output = run(LAUNCHER, *settings, "on_collapse=stop")
    assert code == 3 and "Traceback" not in output
    step = final_state(tmp_path / "demo")["step"]
    error = output.splitlines()[-1]
    assert error.startswith(f"error: on_collapse=stop: collapsed since step {step} (")
    assert f"; step {step} is saved" in error and 0 < step <= 27
    output = succeed(LAUNCHER, *settings)
    assert f"from step {step}\n" in output
    assert f"features     collapsed since step {step} (" in output
