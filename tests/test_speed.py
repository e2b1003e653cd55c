"""What makes the step fast changes nothing: no waiting for the device, compilation, recomputing."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine_pretrain import train_step
from models.lmim import Latents
from models.losses import SIGReg
from models.target import average_layers
from models.views import MASKS, sample_views
from tests.published import published_objective
from tests.runs import (
    LAUNCHER,
    TINY,
    finish,
    records,
    run,
    start_process,
    succeed,
    succeed_together,
    torchrun,
)
from tests.test_engine import GAP, GRID, VISIBLE, build_training, draw, run_steps

# Operations whose result, or the size of it, the host must know before it can go on.
WAITING_OPERATIONS = {
    "aten::_local_scalar_dense",  # item(), float(), bool(), if tensor: ...
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
}
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
# On a CPU these pass by the dispatcher, or are no more than a view.
WAITING_METHODS = ("tolist", "numpy", "cpu", "__array__")
# What a host makes and a GPU needs is copied there, and the host waits for the copy.
COPIED_FROM_HOST = ("tensor", "as_tensor", "from_numpy", "asarray")


def has_mask(indices: list[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


class HostWaits(TorchDispatchMode):
    """Notes everything inside that would make the host wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.patches = pytest.MonkeyPatch()

    def __enter__(self):
        for owner, names in ((torch.Tensor, WAITING_METHODS), (torch, COPIED_FROM_HOST)):
            for name in names:
                self.patches.setattr(owner, name, self.noting(name, getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        return super().__exit__(*error)

    def noting(self, name: str, function: Callable) -> Callable:
        def noted(*args, **kwargs):
            self.found.append(name)
            return function(*args, **kwargs)

        return noted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name().partition(".")[0]
        if name in WAITING_OPERATIONS or (name in INDEXING and has_mask(args[1])):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


def run_epoch(after_step: Callable[[int], None], **options) -> list[str]:
    """Six steps. -> what made the host wait"""
    training = build_training(accum_iter=2, clip_grad=1.0, **options)
    images, _ = draw(0, 8)
    generator = torch.Generator().manual_seed(0)

    def draw_views(step: int, micro: int, batch_size: int):
        return sample_views(batch_size, GRID, VISIBLE, GAP, generator)

    batches = iter([images] * 12)
    with HostWaits() as waits:
        for step in range(6):
            train_step(training, batches, draw_views, step, step / 6)
            after_step(training)
    assert next(batches, None) is None, "not all steps were run"
    return waits.found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_waits_for_the_device_between_log_points(precision):
    assert run_epoch(lambda training: None, precision=precision) == []


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("change", ["negatives", "pred_unit", "same_target"])
def test_no_switch_waits_for_the_device(masks, change):
    others = {"negatives": "batch", "pred_unit": None, "same_target": 0.9}
    objective = published_objective(**{change: others[change]})
    cpu = torch.device("cpu")
    sizes = {"slices": 4, "dim": 6, "seed": 0, "processes": 1, "device": cpu}
    sigreg = SIGReg(weight=1.0, on="image", all_reduce=lambda total: total, **sizes)
    generator = torch.Generator().manual_seed(0)
    layers = list(torch.randn(3, 4, 16, 6, requires_grad=True))
    with HostWaits() as waits:
        views = sample_views(4, 4, 5, 1, generator, masks=masks)
        targets = average_layers(layers, "instance", "batch")[:, 5:]
        loss, _ = objective(Latents(targets, targets.detach(), layers[0]), 0.5)
        sigreg.draw(3)
        (loss + sigreg(layers[0])).backward()
    assert waits.found == [] and views.visible_ids.shape == (4, 5)


WAITS = {
    "item": lambda training: training.meters.sums[0].item(),
    "float": lambda training: float(training.similarity_goal),
    "if": lambda training: bool(training.meters.sums.isfinite().all()),
    "mask": lambda training: training.meters.sums[training.meters.sums > 0],
    "log point": lambda training: training.meters.read(),
    "cpu": lambda training: training.meters.sums.cpu(),
    "numpy": lambda training: training.meters.sums.numpy(),
    "from host": lambda training: torch.tensor([1.0]),
}


@pytest.mark.parametrize("way", WAITS)
def test_each_way_to_wait_would_be_found(way):
    assert len(run_epoch(WAITS[way])) >= 6


# ---- Compilation and recomputing. ----------------------------------------------------------------


def losses_of(training, steps: int) -> torch.Tensor:
    losses = []
    for _ in range(steps):
        run_steps(training, 1)
        losses.append(training.meters.read()["loss"])
    return torch.tensor(losses)


# Relative, over 20 steps of training. bf16 rounds at other places when operations are fused.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


@pytest.mark.slow
def test_compiled_and_eager_training_agree_in_bf16(monkeypatch):
    """Up to the C++ that would be written, which takes minutes; in fp32, below, with it."""
    without_building = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr("torch.compile", without_building)
    eager, compiled = (build_training(precision="bf16") for _ in range(2))
    compiled.compile()
    expected, found = losses_of(eager, 20), losses_of(compiled, 20)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE["bf16"], atol=0)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_and_eager_training_agree_in_fp32_on_two_processes(tmp_path):
    """20 steps, with evaluations, which are not compiled, in between."""
    settings = ["epochs=2", "eval_freq=1", "batch_size=64"]
    # Compiled by one process, for the caches of both: by two it takes twice the work.
    first = ["max_steps=1", "compile=True", f"output_dir={tmp_path / 'first'}"]
    assert run(LAUNCHER, *settings, *first, timeout=600)[0] == 0
    for compiled in (True, False):
        own = [f"compile={compiled}", f"output_dir={tmp_path / str(compiled)}"]
        assert "uncompiled" not in succeed_together(2, *settings, *own)
    found, expected = records(tmp_path / "True/demo"), records(tmp_path / "False/demo")
    losses, accuracies = (
        [[record[name] for record in log if name in record] for log in (found, expected)]
        for name in ("loss", "nn_accuracy")
    )
    assert len(losses[1]) == 20 and len(accuracies[1]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE["fp32"])
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.5)


@pytest.mark.slow
def test_training_goes_on_where_compiling_fails(tmp_path):
    """Without a compiler for C++, on two processes: one line says so, and nothing else changes."""
    settings = ["epochs=1", "batch_size=64"]
    planted = {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [*torchrun(2), *TINY, *settings, "compile=True", f"output_dir={tmp_path / 'True'}"]
    code, output = finish(start_process(command, **planted))
    assert code == 0 and output.count("training goes on uncompiled (") == 1, output
    assert "/nowhere/c++" in output
    succeed_together(2, *settings, f"output_dir={tmp_path / 'False'}")
    losses = [[r["loss"] for r in records(tmp_path / name / "demo")] for name in ("True", "False")]
    assert losses[0] == losses[1] and len(losses[0]) == 10


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


@pytest.mark.slow
def test_recomputing_from_the_config(tmp_path):
    for name in ("True", "False"):
        succeed(LAUNCHER, "epochs=1", f"recompute={name}", f"output_dir={tmp_path / name}")
    losses = [[r["loss"] for r in records(tmp_path / name / "demo")] for name in ("True", "False")]
    assert losses[0] == losses[1] and len(losses[0]) == 10
