"""What makes the step fast changes nothing: no waiting for the device, compilation, recomputing."""

from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.fake_cuda import CUDA, fake_cuda
from engine_pretrain import Training
from models.lmim import Latents, average_layers
from models.losses import SIGReg
from models.views import MASKS, sample_views
from tests.published import published_model, published_objective
from tests.runs import configured_here, records
from tests.test_distributed import spawn
from tests.test_engine import build_training, draw, run_steps
from tests.test_pretraining import pretrain
from util.distributed import Ranks


def test_no_switch_waits_for_the_device(monkeypatch):
    """The step as published: tests/test_fake_cuda.py."""
    normal = torch.Tensor.normal_
    monkeypatch.setattr("torch.Tensor.normal_", lambda tensor, **_: normal(tensor))
    with fake_cuda() as recorder:
        sizes = {"slices": 4, "dim": 6, "seed": 0, "processes": 1, "device": CUDA}
        sigreg = SIGReg(weight=1.0, on="image", all_reduce=lambda total: total, **sizes)
        layers = list(torch.randn(3, 4, 16, 6, requires_grad=True, device=CUDA))
        with recorder:
            for masks in MASKS:
                views = sample_views(4, 4, 5, 1, torch.Generator(CUDA), masks=masks)
                assert views.visible_ids.shape == (4, 5) and views.visible_ids.device == CUDA
            targets = average_layers(layers, "instance", "batch")[:, 5:]
            sigreg.draw(3)
            total = sigreg(layers[0])
            for changes in ({"negatives": "batch"}, {"pred_unit": None}, {"same_target": 0.9}):
                latents = Latents(targets, targets.detach(), layers[0])
                total = total + published_objective(**changes)(latents, 0.5)[0]
            total.backward()
    assert recorder.operations and recorder.copies == []


def losses_of(training: Training, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        run_steps(training, 1)
        losses.append(training.meters.read()["loss"])
    return losses


@pytest.mark.slow
def test_compiled_and_eager_training_agree():
    """The one test in which code is built: of the loss alone, for each part takes many seconds."""
    eager, compiled = build_training(), build_training()
    compiled.objective = torch.compile(compiled.objective, dynamic=False)
    expected, found = losses_of(eager, 20), losses_of(compiled, 20)
    assert expected[-1] < expected[0]
    assert found == pytest.approx(expected, rel=1e-5)


def fails_to_compile(graph, inputs):
    raise RuntimeError("no compiler")


def train_on_two_processes(ranks: Ranks, folder: Path) -> None:
    compile_it = torch.compile
    works = partial(compile_it, backend="eager")
    fails = partial(compile_it, backend=fails_to_compile) if ranks.rank == 1 else works
    for run, torch.compile in {"compiled": works, "fails": fails, "eager": None}.items():
        settings = ["epochs=2", "eval_freq=1", "batch_size=64", f"compile={run != 'eager'}"]
        with (
            (folder / f"{run}.{ranks.rank}").open("w") as printed,
            redirect_stdout(printed),
            redirect_stderr(printed),
        ):
            pretrain(configured_here(folder / run, *settings), ranks)


@pytest.mark.slow
def test_compiled_training_on_two_processes(tmp_path):
    """With evaluations, which are not compiled, in between. Where compiling fails, in one of the
    processes, one line says so and all go on without."""
    spawn(train_on_two_processes, 2, tmp_path, tmp_path)
    found = {}
    for run in ("compiled", "fails", "eager"):
        log = records(tmp_path / run / "demo")
        found[run] = [[r[name] for r in log if name in r] for name in ("loss", "nn_accuracy")]
        printed = "".join((tmp_path / f"{run}.{rank}").read_text() for rank in range(2))
        assert printed.count("training goes on uncompiled (") == (run == "fails"), printed
        assert ("no compiler" in printed) == (run == "fails")
    assert found["compiled"] == found["fails"] == found["eager"]
    assert [len(values) for values in found["eager"]] == [20, 2]


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_recomputing_changes_no_bit(decoder):
    plain = build_training(decoder=decoder)
    saving = build_training(decoder=decoder)
    saving.model.encoder.recompute = saving.model.decoder.recompute = True
    kept = [saved_bytes(training) for training in (plain, saving)]
    assert kept[1] < 0.7 * kept[0]
    run_steps(plain, 3)
    run_steps(saving, 3)
    for ours, expected in zip(saving.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, expected)


def saved_bytes(training) -> int:
    """What autograd keeps of a forward pass for the backward pass."""
    sizes = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        latents = training.network(*draw(0, 8))
        sum(tokens.sum() for tokens in latents)
    return sum(sizes.values())


def test_recomputing_from_the_config():
    model = published_model(depth=1, recompute=True)
    assert model.encoder.recompute and model.target_encoder.recompute and model.decoder.recompute
