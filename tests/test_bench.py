"""The measurements measure what they say: work is counted as by hand, formulations do the same."""

import json
import sys
from functools import cache
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig

from bench import loader, step
from bench.step import (
    build_training,
    draw_images,
    flops_per_image,
    make_plain,
    plain_step,
    step_of,
)
from data.datasets import build_dataset
from launch.config import compose_config
from main_lmim import view_source
from models.losses import METRICS
from tests.runs import run_together
from util.build import read_geometry
from util.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALLER = """
from bench import step
step.MATRIX_SIDES = {"cpu": (128, 256)}
step.run_bench(step.main, step.__doc__, plain="", rounds=7, threads=0)
"""


@cache
def composed(*overrides: str) -> DictConfig:
    return compose_config("lmim", list(overrides))


def test_the_plain_formulation_takes_the_same_step():
    settings = "encoder=vit_tiny encoder.depth=2 grid_size=4 num_vis=4 proj.mlp_dim=64"
    cfg = composed(*settings.split(), "batch_size=4", "accum_iter=1")
    ours, plain = (build_training(cfg, ALONE, "fp32", tuned) for tuned in (True, False))
    make_plain(plain, cfg.weight_decay)
    torch.manual_seed(1)
    images = draw_images(cfg, ALONE.device)
    torch.manual_seed(1)
    step = step_of(cfg, ours, ALONE)
    draw_views = view_source(cfg, ALONE, read_geometry(cfg))
    for number in range(3):
        step(number)
        expected = ours.meters.read()
        numbers = plain_step(plain, images, draw_views(number, 0, cfg.batch_size))
        assert numbers == pytest.approx([expected[name] for name in METRICS], rel=1e-4)
    # As one vector: Adam turns rounding in gradients that are nearly zero into full steps.
    weights, expected = (
        torch.cat([p.detach().flatten() for p in training.model.parameters()])
        for training in (plain, ours)
    )
    assert (weights - expected).norm() < 1e-4 * expected.norm()


def test_work_is_counted_as_by_hand():
    """Multiplications and additions of all matrix products; backward twice what has gradients."""

    def block(tokens: int, dim: int) -> float:
        return 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim

    def encoder(tokens: int, dim: int) -> float:
        head = 2 * (tokens + 1) * (dim * 4096 + 4096**2 + 4096 * dim)
        return 2 * tokens * 768 * dim + 2 * block(tokens + 1, dim) + head

    visible, masked, dim, inner = 20, 176, 192, 512
    queries, context = masked + 1, visible + 1
    cross = 2 * queries * 2 * inner**2 + 2 * context * 2 * inner**2 + 4 * queries * context * inner
    decoder = 2 * context * dim * inner + 2 * queries * inner * dim
    decoder += 3 * (block(queries, inner) + cross)
    loss = 2 * masked**2 * dim
    trained = encoder(visible, dim) + decoder + loss
    expected = 3 * trained + encoder(masked, dim)
    counted = flops_per_image(composed("encoder=vit_tiny", "encoder.depth=2", "recompute=True"))
    assert counted == pytest.approx(expected, rel=0.01)


def test_photos_are_like_imagenets(tmp_path):
    loader.write_photos(tmp_path, 12)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(paths) == 12
    mean = sum(path.stat().st_size for path in paths) / len(paths)
    assert 80_000 < mean < 160_000  # ImageNet: about 110 kB
    dataset = build_dataset("imagefolder", "train", str(tmp_path), {"decoder": "pil"})
    assert {dataset.load(index).size for index in range(12)} == set(loader.PHOTO_SIZES)
    crop = loader.customary_transform(composed())(dataset.load(0), 0, 0)
    assert crop.shape == (3, 280, 280) and crop.dtype == torch.float32


def test_a_measurement_has_keys_of_its_own(monkeypatch):
    calls = []
    monkeypatch.setattr(step, "run_worker", lambda main, about: main(sys.argv[1:]))
    for own in (["rounds=3", "plain=bf16"], []):
        monkeypatch.setattr(sys, "argv", ["bench", *own, "encoder=vit_tiny"])
        step.run_bench(lambda *cfg, **own: calls.append((cfg, own)), "", rounds=7, plain="")
    assert calls == [
        ((["encoder=vit_tiny"],), {"rounds": 3, "plain": "bf16"}),
        ((["encoder=vit_tiny"],), {"rounds": 7, "plain": ""}),
    ]
    monkeypatch.setattr(sys, "argv", ["bench", "rounds=many"])
    with pytest.raises(SystemExit, match="error: rounds=many: expected a whole number"):
        step.run_bench(print, "", rounds=7)


@pytest.mark.slow
def test_step_bench_reports_what_it_measured_on_two_processes(tmp_path):
    settings = "encoder=vit_nano batch_size=2 num_vis=4 grid_size=4 proj.mlp_dim=64 precision=fp32"
    small = tmp_path / "small.py"
    small.write_text(SMALLER)
    output = run_together(2, *settings.split(), "plain=fp32", "rounds=1", program=str(small))
    result = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert result["processes"] == 2 and result["encoder"] == "vit_nano"
    assert 0 < result["share_of_peak"] < 1.5
    assert result["times_plain"] > 0
    work = result["images_per_second"] * result["gflop_per_image"]
    assert result["gflop_per_second"] == pytest.approx(work, rel=1e-3)


def test_loader_bench_reports_what_it_measured(capsys, monkeypatch):
    """By a clock that goes on by half a second whenever it is read."""
    clock = count(step=0.5)
    monkeypatch.setattr(loader, "time", SimpleNamespace(perf_counter=clock.__next__))
    loader.main(composed("num_workers=0").copy(), photos=16, images=40, rounds=1)
    result = json.loads(capsys.readouterr().out)
    assert result["workers"] == 0 and result["pil float, times pil float"] == 1
    # Of 40 images two batches are read, and 16 files decoded, each in that time.
    assert (result["fast"], result["pil"], result["decoding"]) == (64, 64, 32)
    assert result["fast, share of decoding"] == 2
