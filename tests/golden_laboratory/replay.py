"""One function per kind of file: our code on the inputs of the original, number by number.

What an array is follows from its name, sizes from the arrays and the configuration.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.lmim import average_layers, make_projection
from models.losses import (
    epps_pulley,
    gaussian_tables,
    infonce_patches,
    patch_logits,
    standardise_predictions,
    without_same_targets,
)
from models.views import extract_patches, sample_views
from tests.published import prediction_loss

DOUBLE, SINGLE = 1e-6, 1e-5  # largest relative errors, by what the original computed in
# Of samplers: in standard errors of the difference; the probability of a histogram.
SIGMAS_OF_MAPS, SIGMAS_OF_MEANS, LEAST_PROBABILITY = 4.8, 4.5, 1e-5


class Golden:
    """The arrays of a file. Each must have been an input or have been compared in the end."""

    def __init__(self, stem: Path):
        self.config = json.loads(stem.with_suffix(".json").read_text())["config"]
        with np.load(stem.with_suffix(".npz")) as archive:
            self.arrays = {key: torch.from_numpy(archive[key]) for key in archive.files}
        self.inputs: set[str] = set()
        self.results: dict[str, tuple[float, float]] = {}  # how far off, and what is allowed

    def __getitem__(self, key: str) -> Tensor:
        self.inputs.add(key)
        return self.arrays[key].clone()

    def find(self, pattern: str) -> list[re.Match]:
        return [found for key in self.arrays if (found := re.fullmatch(pattern, key))]

    def compare(self, key: str, ours: Tensor, computed_in: str = "") -> None:
        """The largest difference over the largest number. computed_in: an array in whose precision
        this one was computed, whatever it is stored in."""
        golden = self.arrays[key]
        types = (golden.dtype, self.arrays[computed_in or key].dtype)
        assert ours.shape == golden.shape, f"{key}: {ours.shape} and {golden.shape}"
        error = (ours.detach().double() - golden.double()).abs().max() / golden.abs().max()
        self.results[key] = float(error), SINGLE if torch.float32 in types else DOUBLE

    def compare_with_gradient(self, name: str, loss: Tensor, leaf: Tensor) -> None:
        self.compare(f"loss/{name}", loss)
        (gradient,) = torch.autograd.grad(loss, leaf)
        self.compare(f"grad/{name}", gradient, computed_in=f"loss/{name}")

    def problems(self) -> list[str]:
        """`not <=` and not `>`: a NaN is beyond every limit."""
        beyond = [key for key, (error, limit) in self.results.items() if not error <= limit]
        left = self.arrays.keys() - self.inputs - self.results.keys()
        return beyond + [f"{key} is not compared" for key in sorted(left)]

    def summary(self) -> str:
        if not self.results:
            return "0 arrays"
        shares = {key: error / limit for key, (error, limit) in self.results.items()}
        worst = max(shares, key=shares.get)
        error, limit = self.results[worst]
        return f"{len(shares)} arrays, nearest to its limit {worst} ({error:.1e} of {limit:.0e})"


def pixel_mae(golden: Golden) -> None:
    patches = extract_patches(golden["images"], golden.config["patch_size"])
    golden.compare("patches", patches)
    masked = golden["mask"] == 1
    first = masked.logical_not().sum(dim=1, keepdim=True)  # as many are visible
    assert torch.equal(masked, golden["ids_restore"] >= first)
    predictions = golden["predictions"].requires_grad_()
    for name, loss in (("raw", "l2"), ("norm", "norm_l2")):
        value = prediction_loss(loss, predictions[masked][None], patches[masked][None], tau=1.0)
        golden.compare_with_gradient(name, value, predictions)


def projection_target(golden: Golden) -> None:
    weight, bias = golden["weight"], golden["bias"]
    projection = make_projection(weight.shape[1], weight.shape[0]).double()
    projection.load_state_dict({"weight": weight, "bias": bias})
    images = golden["images_bhwc"].permute(0, 3, 1, 2)
    patches = extract_patches(images, golden.config["patch_size"])
    golden.compare("targets", projection(patches))
    # Other random numbers of the same distribution, of which there may be few: the extremes within
    # a fiftieth of the bound, deviations within a twentieth (of biases a quarter).
    least, most, spread, bias_spread, bound, ideal = golden["init_stats"].tolist()
    torch.manual_seed(0)
    fan_in = round(bound**-2)
    own = make_projection(fan_in, 4096)
    extremes = [own.weight.min() - least, own.weight.max() - most, own.bias.abs().max() - bound]
    off = [float(e.abs()) / bound * 50 for e in extremes]
    off += [float((own.weight.std() - s).abs()) / ideal * 20 for s in (spread, ideal)]
    off += [float((own.bias.std() - ideal).abs()) / ideal * 20, abs(bias_spread / ideal - 1) * 4]
    golden.results["init_stats"] = max(off), 1.0


# Norm of each layer and of the mean, loss, beta; d2v2 divides sums over channels by sqrt(D).
AVERAGES = {
    "d2v1_recipe": ("layer", "layer", "smooth_l1", 2.0),
    "d2v1_no_post": ("layer", None, "smooth_l1", 2.0),
    "d2v1_no_norm_l2": (None, None, "l2", 1.0),
    "d2v1_instance": ("instance", None, "smooth_l1", 0.5),
    "d2v1_batch": ("batch", None, "smooth_l1", 0.5),
    "d2v2_recipe": ("instance", "layer", "l2", 1.0),
    "d2v2_layer": ("layer", None, "smooth_l1", 1.0),
}


def topk_average(golden: Golden) -> None:
    layers = [golden[f"layer/{index}"] for index in range(len(golden.find(r"layer/\d+")))]
    layers, masked = layers[-golden.config["k"] :], golden["mask"]
    predictions = golden["predictions"].requires_grad_()
    for name, (norm, post_norm, loss, beta) in AVERAGES.items():
        targets = average_layers(layers, norm, post_norm)[masked]
        golden.compare(f"targets/{name}", targets)
        value = prediction_loss(loss, predictions[None], targets[None], 1.0, loss_beta=beta)
        scale = targets.shape[1] ** 0.5 if name.startswith("d2v2") else 1
        golden.compare_with_gradient(name, scale * value, predictions)


def discrimination(predictions, targets, tau, unit, negatives, same_target) -> Tensor:
    """As infonce_patches, of images with different numbers of tokens: [M_i, D] each."""
    counts = [len(own) for own in predictions]
    if len(set(counts)) == 1:
        tokens = torch.stack(predictions), torch.stack(targets)
        return infonce_patches(*tokens, tau, unit, negatives, same_target)
    rows, all_targets = torch.cat(predictions)[None], torch.cat(targets)[None]
    rows = standardise_predictions(rows, unit)
    if negatives == "batch":
        logits = patch_logits(rows, all_targets, tau)[0]
        losses = F.cross_entropy(logits, torch.arange(len(logits)), reduction="none")
        return 2 * tau * torch.stack([own.mean() for own in losses.split(counts)]).mean()
    losses = []
    for own, target in zip(rows[0].split(counts), targets, strict=True):
        if same_target is not None and len(target) > 1:
            candidates = torch.zeros(1, len(target), len(target))
            candidates = without_same_targets(candidates, target[None], same_target)
            if (candidates == 0).sum(dim=2).min() == 1:
                continue
        pair = own[None], target[None]
        losses.append(infonce_patches(*pair, tau, None, "image", same_target))
    return torch.stack(losses).mean()


def patch_discrimination(golden: Golden) -> None:
    predictions, targets = golden["predictions"].requires_grad_(), golden["targets"]
    for found in golden.find(r"loss/(\w+?_(\w+?)(?:_vec)?/(\w+)/unit([01])/tau([\d.]+))"):
        name, kind, masks, unit, tau = found.groups()
        decoded = golden[f"masks_{masks}"] == 2
        per_image = [
            [own[chosen] for own, chosen in zip(tokens, decoded, strict=True)]
            for tokens in (predictions, targets)
        ]
        value = discrimination(
            *per_image,
            float(tau),
            "batch" if unit == "1" else None,
            {"patch": "image", "masked": "image", "all": "batch"}[kind],
            golden.config["same_target_threshold"] if kind == "masked" else None,
        )
        golden.compare_with_gradient(name, value, predictions)


def sigreg(golden: Golden) -> None:
    x, last, count = golden["x"], golden.config["t_max"], golden.config["knots"]
    knots = torch.linspace(0, last, count, dtype=torch.float64)
    gaussian, weights = gaussian_tables(knots)
    golden.compare("univariate/t", knots)
    golden.compare("univariate/phi", gaussian)
    golden.compare("univariate/weights", weights)
    axes = torch.eye(x.shape[1], dtype=torch.float64)
    golden.compare("univariate/statistic", epps_pulley(x, axes, knots))
    for found in golden.find(r"(sliced/t([\d.]+)/step\d+)/directions"):
        name, last = found.groups()
        samples = x.float().requires_grad_()
        loss = epps_pulley(samples, golden[found[0]], torch.linspace(0, float(last), count)).mean()
        golden.compare(f"{name}/loss", loss)
        golden.compare(f"{name}/grad", torch.autograd.grad(loss, samples)[0])
    views, directions = golden["minimal/proj"].requires_grad_(), golden["minimal/directions_raw"]
    loss = epps_pulley(views, directions / directions.norm(dim=0), knots).mean()
    golden.compare("minimal/loss", loss)
    golden.compare("minimal/grad", torch.autograd.grad(loss, views)[0])
    for found in golden.find(r"minimal/total_lambda([\d.]+)"):
        share = float(found[1])
        golden.compare(found[0], (1 - share) * golden["minimal/invariance"] + share * loss)
    sigreg_of_processes(golden, torch.linspace(0, golden.config["t_max"], count))


def sigreg_of_processes(golden: Golden, knots: Tensor) -> None:
    """One after the other: each notes its means, then each gets the sum of all."""
    processes = len(golden.find(r"ranks/x\d+"))
    if not processes:
        return  # a file need not have this part; other ranks/* alone are "not compared"
    samples = [golden[f"ranks/x{rank}"].requires_grad_() for rank in range(processes)]
    directions, means = golden["ranks/directions"], []

    def note(own: Tensor) -> Tensor:
        means.append(own)
        return own

    for own in samples:
        epps_pulley(own, directions, knots, processes, note)
    total = torch.stack(means).sum(dim=0)
    for rank, own in enumerate(samples):
        loss = epps_pulley(own, directions, knots, processes, lambda _: total).mean()
        golden.compare(f"ranks/loss{rank}", loss, computed_in=f"ranks/x{rank}")
        golden.compare(f"ranks/grad{rank}", torch.autograd.grad(loss, own)[0])


def block_masks(golden: Golden) -> None:
    grid, draws = golden.config["grid"], golden.config["draws"]
    for number, found in enumerate(golden.find(r"(\w+)/(\d+)/visible_map")):
        masks, masked = found[1].replace("uniform", "random"), int(found[2])
        generator = torch.Generator().manual_seed(number)
        views = sample_views(draws, grid, grid**2 - masked, 0, generator, masks=masks)
        visible = torch.zeros(draws, grid**2).scatter(1, views.visible_ids, 1.0)
        assert (visible.sum(dim=1) == grid**2 - masked).all()
        visible = visible.unflatten(1, (grid, grid))
        compare_shares(golden, found[0], visible.mean(dim=0), draws)
        name = f"{found[1]}/{masked}"
        compare_means(golden, f"{name}/visible_neighbours", visible_neighbours(visible), draws)
        if not masks.endswith("roll") and masks != "random":
            rectangle = visible if masks == "inverse" else 1 - visible
            compare_histograms(golden, f"{name}/extent", bounding_boxes(rectangle))


def visible_neighbours(visible: Tensor) -> Tensor:
    """visible [draws, side, side] -> of each draw the mean over masked cells, of the four next to
    each"""
    cross = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])[None, None]
    around = F.conv2d(visible[:, None], cross, padding=1)[:, 0]
    return ((1 - visible) * around).sum(dim=(1, 2)) / (1 - visible).sum(dim=(1, 2))


def bounding_boxes(cells: Tensor) -> dict[tuple[int, int], int]:
    """cells [draws, side, side] -> how often each (height, width)"""
    sides = []
    for along in (2, 1):
        place = torch.arange(cells.shape[1])
        used = cells.amax(dim=along) > 0
        last = torch.where(used, place, -1).amax(dim=1)
        sides.append(last - torch.where(used, place, cells.shape[1]).amin(dim=1) + 1)
    boxes, counts = torch.stack(sides, dim=1).unique(dim=0, return_counts=True)
    return {tuple(box): count for box, count in zip(boxes.tolist(), counts.tolist(), strict=True)}


def compare_shares(golden: Golden, key: str, ours: Tensor, draws: int) -> None:
    theirs = golden.arrays[key]
    both = (ours.double() + theirs) / 2
    deviation = (both * (1 - both) * 2 / draws).sqrt()
    sigmas = ((ours - theirs).abs() / deviation.clamp(min=1e-12)).max()
    golden.results[key] = float(sigmas), SIGMAS_OF_MAPS


def compare_means(golden: Golden, key: str, ours: Tensor, draws: int) -> None:
    mean, deviation = golden.arrays[key].tolist()
    error = ((deviation**2 + float(ours.double().var())) / draws) ** 0.5
    sigmas = abs(float(ours.double().mean()) - mean) / max(error, 1e-12)
    spread = abs(float(ours.double().std()) - deviation) / deviation / 0.1  # within a tenth
    golden.results[key] = max(sigmas, spread * SIGMAS_OF_MEANS), SIGMAS_OF_MEANS


def compare_histograms(golden: Golden, key: str, ours: dict[tuple[int, int], int]) -> None:
    from scipy.stats import chi2_contingency

    theirs = {(height, width): n for height, width, n in golden.arrays[key].tolist()}
    pairs = np.array(
        [[h.get(box, 0) for box in ours.keys() | theirs.keys()] for h in (ours, theirs)]
    )
    frequent = pairs.sum(axis=0) >= 10
    rare = pairs[:, ~frequent].sum(axis=1, keepdims=True)
    table = np.hstack([pairs[:, frequent], rare if rare.sum() else rare[:, :0]])
    probability = chi2_contingency(table, correction=False).pvalue if table.shape[1] > 1 else 1.0
    golden.results[key] = LEAST_PROBABILITY / max(probability, 1e-300), 1.0


KINDS: dict[str, Callable[[Golden], None]] = {
    "block_masks": block_masks,
    "patch_discrimination": patch_discrimination,
    "pixel_mae": pixel_mae,
    "projection_target": projection_target,
    "sigreg": sigreg,
    "topk_average": topk_average,
}
