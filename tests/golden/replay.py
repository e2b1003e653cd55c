"""Replay a golden pair (NAME.json: configuration, NAME.npz: numbers) with our models and engine.

state/* start weights, forward/* one forward pass, grad/* its gradients, features/* full-image
encoder outputs, train/S/* inputs of the training iterations, train/log their rows, final/* the
weights after them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from engine_pretrain import begin_step, end_step, micro_step
from models.lmim import LatentMIM
from models.losses import Objective
from models.views import Views, extract_patches
from tests.published import published_model, published_objective, published_training
from util.build import AUTOCAST, Training
from util.optim import Schedule, decays

CPU = torch.device("cpu")
MODEL_KEYS = (
    "grid_size patch_size patch_gap embed_dim depth num_heads freeze_pe mlp_dim mlp_depth "
    "decoder decoder_embed_dim decoder_depth decoder_num_heads avg_vis_mask_token "
    "target target_depth mask_target"
).split()

# Largest relative error allowed, by what is compared.
LIMITS = dict.fromkeys(
    "patches encoder target decoder loss similarities features log position_tables".split(), 1e-5
) | dict.fromkeys("gradients final_weights".split(), 1e-4)


class GoldenPair:
    def __init__(self, path: Path, device: torch.device = CPU, precision: str = "fp32"):
        self.name, self.device, self.precision = path.stem, device, precision
        description = json.loads(path.with_suffix(".json").read_text())
        self.config = description["config"]
        self.decay, self.no_decay = set(description["decay"]), set(description["no_decay"])
        with np.load(path.with_suffix(".npz")) as archive:
            self.arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
        self.arrays = {key: array.to(device) for key, array in self.arrays.items()}

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        prefix += "/"
        return {key[len(prefix) :]: a for key, a in self.arrays.items() if key.startswith(prefix)}

    def views(self, prefix: str) -> Views:
        inputs = self.group(prefix)
        offsets = (inputs.get("row_offset"), inputs.get("col_offset"))
        return Views(inputs["vis_idx"], inputs["mask_idx"], *offsets)

    def new_model(self) -> LatentMIM:
        given = {key: self.config[key] for key in MODEL_KEYS if key in self.config}
        return published_model(**given)

    def build_model(self) -> LatentMIM:
        model = self.new_model()
        model.load_state_dict(self.group("state"))
        return model.to(self.device)

    def autocast(self) -> torch.autocast:
        dtype = AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def build_objective(self) -> Objective:
        given = {key: self.config[key] for key in ("loss", "tau", "avg_sim_coeff")}
        return published_objective(**given)

    def build_training(self) -> Training:
        own = {key: self.config[key] for key in ("weight_decay", "accum_iter")}
        training = published_training(self.build_model(), self.precision, **own)
        training.objective = self.build_objective()
        training.schedule = Schedule(SimpleNamespace(**self.config), self.config["lr"])
        return training


def relative_error(ours, golden) -> float:
    """L2 norm of the difference over the norm; lists are taken as one vector."""

    def as_vector(tensors):
        return torch.cat([torch.as_tensor(t).detach().cpu().double().flatten() for t in tensors])

    ours, golden = as_vector(ours), as_vector(golden)
    return float((ours - golden).norm() / golden.norm())


def compare_forward(pair: GoldenPair) -> dict[str, float]:
    model, golden, views = pair.build_model(), pair.group("forward"), pair.views("forward")
    with pair.autocast():
        patches = model.patches(golden["images"], views)
        visible = model.encode_visible(patches, views)
        targets = model.encode_target(patches, views)
        predictions = model.decoder(visible, views.visible_ids, views.masked_ids)
        latents = model(golden["images"], views)
    loss, metrics = pair.build_objective()(latents, float(golden["sim_target"]))
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    golden_gradients = pair.group("grad")
    names = [name for name in gradients if name in golden_gradients]
    assert set(names) == set(golden_gradients), "parameters with a gradient differ"
    similarities = ("avg_sim_pred", "avg_sim_vis", "avg_sim_trg")
    return {
        "patches": relative_error([patches], [golden["patches"]]),
        "encoder": relative_error([visible], [golden["x_vis"]]),
        "target": relative_error([targets], [golden["x_trg_all"]]),
        "decoder": relative_error([predictions], [golden["x_pred"]]),
        "loss": relative_error([loss.detach()], [golden["loss"]]),
        "similarities": relative_error([metrics[1:4]], [golden[key] for key in similarities]),
        "gradients": relative_error(
            [gradients[name] for name in names], [golden_gradients[name] for name in names]
        ),
    }


def compare_position_tables(pair: GoldenPair) -> dict[str, float]:
    """Frozen tables are not learned, so a freshly built model must hold the golden ones."""
    if not pair.config["freeze_pe"]:
        return {}
    fresh, golden = pair.new_model().state_dict(), pair.group("state")
    tables = [key for key in fresh if key.endswith("pos_embeds")]
    error = relative_error([fresh[key] for key in tables], [golden[key] for key in tables])
    return {"position_tables": error}


@torch.no_grad()
def compare_features(pair: GoldenPair) -> dict[str, float]:
    encoder, golden = pair.build_model().encoder, pair.group("features")
    patches = extract_patches(golden["images"], encoder.patch_size)
    ids = torch.arange(patches.shape[1], device=pair.device).expand(len(patches), -1)
    with pair.autocast():
        before_norm = encoder.forward_features(patches, ids)
        full_output = encoder(patches, ids)
    return {
        "features": max(
            relative_error([before_norm], [golden["tokens_before_norm"]]),
            relative_error([full_output], [golden["full_output"]]),
        )
    }


def compare_training(pair: GoldenPair) -> dict[str, float]:
    training = pair.build_training()
    accum_iter, per_epoch = pair.config["accum_iter"], pair.config["iters_per_epoch"]
    rows, started_at = [], 0.0
    golden_log = pair.arrays["train/log"]
    for iteration in range(len(golden_log)):
        epoch, within_epoch = divmod(iteration, per_epoch)
        if within_epoch % accum_iter == 0:
            started_at = epoch + within_epoch / per_epoch
            begin_step(training, started_at)
        last = (within_epoch + 1) % accum_iter == 0
        images = pair.arrays[f"train/{iteration}/images"]
        metrics = micro_step(training, images, pair.views(f"train/{iteration}"), last)
        if last:
            end_step(training, iteration // accum_iter)
        learning_rate = training.optimizer.param_groups[0]["lr"]
        momentum = training.schedule.target_momentum(started_at)
        goal = float(training.similarity_goal)
        rows.append([learning_rate, momentum, goal, *metrics[:4].tolist()])
    ours, golden = training.model.state_dict(), pair.group("final")
    assert set(ours) == set(golden), "weights differ in name"
    columns = zip(torch.tensor(rows, dtype=torch.float64).T, golden_log.T, strict=True)
    return {
        "log": max(relative_error([ours_], [golden_]) for ours_, golden_ in columns),
        "final_weights": relative_error(ours.values(), [golden[key] for key in ours]),
    }


def decay_sets_agree(pair: GoldenPair) -> bool:
    trained = {n: p for n, p in pair.build_model().named_parameters() if p.requires_grad}
    decay = {name for name, parameter in trained.items() if decays(name, parameter)}
    return decay == pair.decay and set(trained) - decay == pair.no_decay


def compare(
    path: Path, device: torch.device = CPU, precision: str = "fp32"
) -> tuple[dict[str, float], bool]:
    """-> relative error by name, and whether the decay sets agree."""
    pair = GoldenPair(path, device, precision)
    errors = compare_forward(pair) | compare_position_tables(pair)
    errors |= compare_features(pair) | compare_training(pair)
    return errors, decay_sets_agree(pair)
