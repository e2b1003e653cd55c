"""The measurements measure what they say: work is counted as by hand, formulations do the same."""

import json
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench import roofline
from bench.loader import PHOTO_SIZES, customary_transform, write_photos
from bench.roofline import add_up
from bench.step import EPOCH, Setting, build_training, count_flops, make_plain, plain_step
from data.datasets import build_dataset
from engine_pretrain import begin_step, end_step, micro_step
from models.views import sample_views
from tests.runs import ROOT, environment, finish, run_together, start_process
from tests.test_fake_cuda import fake_step, small_config
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


@pytest.fixture
def one_gpu(monkeypatch):
    """Of 2 MFLOP/s in bf16 and 1 in fp32, and 3 MB/s; the settings of a command."""
    speed = {"practical": {"bf16": 2e-6, "fp32": 1e-6}, "practical_bandwidth": 3e-6}
    machine = {"peak": {"bf16": 4e-6, "fp32": 1.5e-6}, "bandwidth": 9e-6, **speed}
    monkeypatch.setattr(roofline, "GPUS", {"slow": machine})
    monkeypatch.setattr(roofline, "OWN", {"gpus": 3, "images": 1003}, raising=False)
    return machine


def table_rows(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_roofline_adds_up_the_step_and_says_how_long_training_takes(one_gpu, capsys):
    """accum_iter 2: tables are per micro-step, hours are those of both."""
    roofline.main(small_config(accum_iter=2, epochs=7))
    output = capsys.readouterr().out
    operations = fake_step(accum_iter=2)[1].operations
    micro_step = add_up(operations, {"slow": one_gpu}, 2)["all"]
    head, _, *rows = table_rows(output)
    assert head == ["per micro-step", *micro_step]
    whole = next(row for row in rows if row[0] == "all")
    assert [float(cell) for cell in whole[1:]] == pytest.approx([*micro_step.values()], rel=1e-3)
    largest = rows[rows.index(["the 10 that move most", "operation", "line", "GB"]) + 2 :]
    assert len(largest) == 10 and largest[0][1] == "_fused_adamw_ fp32"
    adamw = sum(o.bytes for o in operations if o.name == "_fused_adamw_")
    assert float(largest[0][3]) == pytest.approx(adamw / 2 / 1e9, rel=1e-3)
    assert {row[0].split()[-1] for row in largest} == {"forward", "backward"}
    steps = 7 * (1003 // (2 * 2 * 3))  # of two images on three GPUs, twice
    for how in ("eager", "compiled"):
        ms = micro_step[f"slow {how} ms"]
        share = micro_step["TFLOP"] / (ms / 1e3) / 4e-6
        expected = f"{ms * 2 * steps / 3.6e6:.1f} h, {6e3 / ms:.0f} images/s to load, {share:.0%}"
        assert f"slow {how}: {expected} of the peak" in output
    assert "\n7 epochs of 1003 images, at least:" in output


def test_roofline_counts_memory_and_gpus(one_gpu, capsys, monkeypatch):
    """GPUs by the config where the command does not say; a network of 8 GB, half of it trained."""
    monkeypatch.setitem(roofline.OWN, "gpus", 0)
    model = torch.nn.Sequential(*(torch.nn.Linear(10**5, 10**4, device="meta") for _ in range(2)))
    model[1].requires_grad_(False)
    inside, outside = (torch.empty(1).untyped_storage() for _ in range(2))
    kept = {inside._cdata: 6e9, outside._cdata: 1e9}
    recorder = SimpleNamespace(made=[inside], kept=kept)
    costs = SimpleNamespace(model=model, precision="bf16"), recorder
    sums = Counter({"slow eager ms": 36e5, "slow compiled ms": 18e5, "TFLOP": 3.6e-3})
    cfg = small_config(accum_iter=2, epochs=1)
    cfg.env.ngpu, cfg.env.world_size = 4, 2
    roofline.show_costs(cfg, *costs, sums)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "memory: weights 8.00 GB, gradients 4.00, moments 8.00, for the backward pass 3.0: 23.0 GB",
        "all-reduce: 4.00 GB of gradients per step among 8 GPUs",
    ]
    assert lines[4].startswith("slow eager: 62.0 h, 0 images/s")  # 1003 // 32 steps of two hours
    assert lines[5].endswith("50% of the peak")
    cfg.env.ngpu = None
    roofline.show_costs(cfg, *costs, sums)
    assert "among 2 GPUs" in capsys.readouterr().out


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
