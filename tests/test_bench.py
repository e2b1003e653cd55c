"""The measurements measure what they say: work is counted as by hand, formulations do the same."""

import json
import re
import subprocess
import sys

import pytest
import torch

from bench.loader import PHOTO_SIZES, customary_transform, write_photos
from bench.step import EPOCH, Setting, build_training, count_flops, make_plain, plain_step
from data.datasets import build_dataset
from engine_pretrain import begin_step, end_step, micro_step
from models.views import sample_views
from tests.runs import ROOT, environment, finish, run_together, start_process
from util.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALLER = """
from bench import step
step.MATRIX_SIDES = {"cpu": (128, 256)}
step.RECIPE["proj"]["mlp_dim"] = 64
step.main()
"""
SMALL = Setting("vit_tiny", batch=4, grid=4, precision="fp32", compile=False, recompute=False)


@pytest.mark.slow
def test_the_plain_formulation_takes_the_same_step():
    ours, plain = build_training(SMALL, ALONE), make_plain(build_training(SMALL, ALONE))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        images = torch.randn(4, 3, 80, 80, generator=generator)
        views = sample_views(4, 4, SMALL.visible, 4, generator)
        begin_step(ours, EPOCH)
        metrics = micro_step(ours, images, views, last_of_step=True)
        end_step(ours, 0)
        numbers = plain_step(plain, images, views)
        assert numbers == pytest.approx(metrics.tolist(), rel=1e-4)
    # As one vector: Adam turns rounding in gradients that are nearly zero into full steps.
    weights, expected = (
        torch.cat([p.detach().flatten() for p in training.model.parameters()])
        for training in (plain, ours)
    )
    assert (weights - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.slow
def test_work_is_counted_as_by_hand():
    """Multiplications and additions of all matrix products; backward twice what has gradients."""

    def block(tokens: int, dim: int) -> float:
        return 2 * tokens * 12 * dim**2 + 4 * tokens**2 * dim

    def encoder(tokens: int, dim: int) -> float:
        head = 2 * (tokens + 1) * (dim * 4096 + 4096**2 + 4096 * dim)
        return 2 * tokens * 768 * dim + 12 * block(tokens + 1, dim) + head

    setting = Setting("vit_tiny", 4, grid=14, precision="fp32", compile=False, recompute=False)
    visible, masked, dim, inner = 20, 176, 192, 512
    queries, context = masked + 1, visible + 1
    cross = 2 * queries * 2 * inner**2 + 2 * context * 2 * inner**2 + 4 * queries * context * inner
    decoder = 2 * context * dim * inner + 2 * queries * inner * dim
    decoder += 3 * (block(queries, inner) + cross)
    loss = 2 * masked**2 * dim
    trained = encoder(visible, dim) + decoder + loss
    expected = 3 * trained + encoder(masked, dim)
    assert count_flops(setting) == pytest.approx(expected, rel=0.01)


def test_photos_are_like_imagenets(tmp_path):
    write_photos(tmp_path, 12)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert len(paths) == 12
    mean = sum(path.stat().st_size for path in paths) / len(paths)
    assert 80_000 < mean < 160_000  # ImageNet: about 110 kB
    dataset = build_dataset("imagefolder", "train", str(tmp_path), {"decoder": "pil"})
    assert {dataset.load(index).size for index in range(12)} == set(PHOTO_SIZES)
    assert customary_transform(dataset.load(0), 0, 0).shape == (3, 280, 280)


@pytest.mark.slow
def test_step_bench_reports_what_it_measured_on_two_processes(tmp_path):
    path = tmp_path / "results.json"
    options = ["--encoder", "vit_nano", "--batch", "2", "--grid", "4", "6", "--rounds", "1"]
    options += ["--plain", "fp32", "--json", str(path)]
    small = tmp_path / "small.py"
    small.write_text(SMALLER)
    output = run_together(2, *options, program=str(small))
    assert output.count("processes 2  ") == 2
    results = json.loads(path.read_text())
    assert [result["grid"] for result in results] == [4, 6]
    for result in results:
        assert 0 < result["share_of_peak"] < 1.5
        assert result["times_plain"] > 0 and result["images_per_second"] > 0
        work = result["images_per_second"] * result["gflop_per_image"]
        assert result["gflop_per_second"] == pytest.approx(work)


@pytest.mark.slow
def test_step_bench_runs_where_only_torch_and_timm_are():
    others = {"hydra", "omegaconf", "submitit", "tensorboard", "sklearn"}
    probe = f"import sys, bench.step; sys.exit(len({others} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment())
    assert ran.returncode == 0


@pytest.mark.slow
def test_loader_and_training_bench():
    command, photos = [sys.executable, "bench/loader.py"], ["--photos", "20"]
    read = [*command, *photos, "--images", "16", "--rounds", "1"]
    names = ("fast", "decoding", "fast, share of decoding")
    for _ in range(3):  # another test may disturb a single round
        reading = finish(start_process(read))[1]
        assert reading.count("fast, times pil float") == 2, reading
        found = [re.findall(rf"(?:^|  ){name} ([0-9.]+)", reading, re.MULTILINE) for name in names]
        fast, decoding, shares = ([float(number) for number in numbers] for numbers in found)
        assert len(fast) == len(decoding) == 2, reading
        assert shares == pytest.approx(
            [a / b for a, b in zip(fast, decoding, strict=True)], abs=1e-3
        ), reading
        if all(0.05 < share < 1.2 for share in shares):
            break
    else:
        pytest.fail(reading)
    options = ["--train", "--encoder", "vit_nano", "--batch", "2", "--steps", "2"]
    training = finish(start_process([*command, *photos, *options]))[1]
    assert training.count("waiting") == 2, training
