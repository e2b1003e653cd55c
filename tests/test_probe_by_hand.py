"""The linear probe as a whole, against a loop written by hand: every key is away from its default,
so that one which does not arrive where it belongs is noticed. Also what fine-tuning's twin of this
file, and evaluations, need."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling, Transpose
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from eval.backbone import OwnBackbone
from eval.linear_probe import main
from models.vit import Encoder
from tests.backbones import digits_checkpoint
from tests.evaluations import EVAL, TRAIN, build_few_digits, config, few_digits, results
from tests.runs import final_state, records

pytestmark = ON_CPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what is written by hand runs on the CPU"
)

# ---- What both files need. -----------------------------------------------------------------------

# Mean and deviation: of pre-training, and of the data set's config.
TRAINED = (0.21, 0.34, 0.47), (0.52, 0.23, 0.41)
OF_DATASET = (0.43, 0.26, 0.12), (0.27, 0.58, 0.36)
DATASET = [f"dataset.mean={list(OF_DATASET[0])}", f"dataset.std={list(OF_DATASET[1])}"]


def pretrained(folder: Path, *overrides: str, colours: tuple | None) -> Path:
    """A checkpoint that says what its images were normalised with, or does not."""
    path = digits_checkpoint(folder, *overrides)
    contents = torch.load(path, weights_only=True)
    del contents["config"]["dataset"]
    if colours is not None:
        contents["config"]["dataset"] = {"mean": list(colours[0]), "std": list(colours[1])}
    torch.save(contents, path)
    return path


def load_encoder(path: Path, part: str, blocks: int, norm: bool) -> Encoder:
    contents = torch.load(path, weights_only=True)
    shape = {"grid_size": 6, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
    head = {"mlp_dim": 32, "mlp_depth": 3, "freeze_pe": contents["config"]["freeze_pe"]}
    encoder = Encoder(**shape, **head, recompute=False)
    weights = contents["state_dict"].items()
    encoder.load_state_dict({k.removeprefix(part): v for k, v in weights if k.startswith(part)})
    encoder.blocks, encoder.head = encoder.blocks[:blocks], nn.Identity()
    if not norm:
        encoder.norm = nn.Identity()
    return encoder


def all_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    """-> [N, 1 + rows * columns, D], the class token first"""
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)  # [N, 3, rows, columns, 4, 4]
    grid, table = patches.shape[2:4], encoder.pos_embed.pos_embeds[None]
    patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if grid != (6, 6):
        rows = table[:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        rows = F.interpolate(rows, grid, mode="bicubic", antialias=True)
        table = torch.cat([table[:, :1], rows.flatten(2).transpose(1, 2)], dim=1)
    patches = encoder.embed(patches) + table[:, 1:]
    cls = (encoder.cls_token + table[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls, patches], dim=1)
    for block in encoder.blocks:
        tokens = block(tokens)
    return encoder.norm(tokens)


def encode(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """-> by pooling: [N, D] or [N, 2 D]"""
    tokens = all_tokens(encoder, images)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    return {"cls": cls, "mean": mean, "cls+mean": torch.cat([cls, mean], dim=1)}


def normalised(image: Image, colours: tuple) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in colours)
    return (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std


def central_images(split: str, side: int, shorter: int, colours: tuple) -> tuple[Tensor, Tensor]:
    """Resized to shorter x shorter, of which the central side x side. -> images, labels"""
    digits, edge = build_few_digits(split, None), (shorter - side) // 2
    box, images = (edge, edge, edge + side, edge + side), []
    for index in range(len(digits)):
        image = digits.load(index).resize((shorter, shorter), Resampling.BICUBIC)
        images.append(normalised(image.crop(box), colours))
    return torch.stack(images), torch.from_numpy(digits.labels)


def images_of_step(step: int, per_step: int, seed: int) -> tuple[int, list[int]]:
    """-> epoch, the numbers of the images in their order"""
    epoch, place = divmod(step, TRAIN // per_step)
    order = np.random.default_rng([2, seed, epoch]).permutation(TRAIN)
    return epoch, order[place * per_step : (place + 1) * per_step].tolist()


def learning_rate(epoch: float, peak: float, floor: float, warmup: float, epochs: int) -> float:
    """Linear from zero, then half a cosine."""
    if epoch < warmup:
        return peak * epoch / warmup
    progress = (epoch - warmup) / (epochs - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def percent_right(logits: Tensor, labels: Tensor) -> list[float]:
    """The label is the first; it is among the first five."""
    better = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    return [100 * int((better < first).sum()) / EVAL for first in (1, 5)]


def means(values: list[float], count: int) -> list[float]:
    """Of the first count, of the next, ..."""
    return [sum(values[i : i + count]) / count for i in range(0, len(values), count)]


@contextmanager
def optimiser_steps() -> Iterator[list[list[dict]]]:
    """The groups of whatever optimiser steps inside, as they are in each step."""
    steps = []
    hook = register_optimizer_step_pre_hook(
        lambda optimiser, *_: steps.append([dict(group) for group in optimiser.param_groups])
    )
    try:
        yield steps
    finally:
        hook.remove()


def settings_by_name(groups: list[dict], final: dict[str, Tensor]) -> dict[str, dict]:
    """Which parameter is which is told by its value after the last step."""
    found = {}
    for group in groups:
        for p in group["params"]:
            (name,) = [n for n, v in final.items() if v.shape == p.shape and torch.equal(v, p)]
            found[name] = group
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], within: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= within * value.norm(), name


# ---- The probe by hand. --------------------------------------------------------------------------


def random_crop(image: Image, seed: int, epoch: int, index: int) -> Image:
    """At least 0.4 of a digit's 8 x 8 pixels, enlarged to 20 x 20; or its mirror image."""
    rng = np.random.default_rng([1, seed, epoch, index])
    width = height = 9
    while max(width, height) > 8:
        area = 64 * rng.uniform(0.4, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    left, top = rng.integers(9 - width), rng.integers(9 - height)
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((20, 20), Resampling.BICUBIC)
    return image.transpose(Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


class Head:
    """Batch norm without weights, a linear layer, and LARS for it."""

    def __init__(self, pooling: str, rates: list[float], seed: int, weight_decay: float):
        self.pooling, self.rates, self.weight_decay = pooling, rates, weight_decay
        width = 48 if pooling == "cls+mean" else 24
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.empty(10, width).normal_(0, 0.01, generator=generator)
        self.bias = torch.zeros(10)
        self.velocities = torch.zeros(10, width), torch.zeros(10)
        self.mean, self.variance = torch.zeros(width).double(), torch.ones(width).double()

    def train(self, features: dict[str, Tensor], labels: Tensor, step: int) -> float:
        """-> the loss before the step"""
        own = features[self.pooling].double()
        self.mean = 0.9 * self.mean + 0.1 * own.mean(dim=0)
        self.variance = 0.9 * self.variance + 0.1 * own.var(dim=0, correction=1)
        deviation = (own.var(dim=0, correction=0) + 1e-6).sqrt()
        normed = ((own - own.mean(dim=0)) / deviation).float()
        logits = normed @ self.weight.T + self.bias
        # The gradient of cross entropy: probabilities less the truth.
        error = (logits.softmax(dim=1) - torch.eye(10)[labels]) / len(labels)
        change = error.T @ normed + self.weight_decay * self.weight
        change = 0.001 * self.weight.norm() / change.norm() * change
        for_weight, for_bias = self.velocities
        self.velocities = 0.9 * for_weight + change, 0.9 * for_bias + error.sum(dim=0)
        self.weight = self.weight - self.rates[step] * self.velocities[0]
        self.bias = self.bias - self.rates[step] * self.velocities[1]
        return -logits.log_softmax(dim=1)[range(len(labels)), labels].mean().item()

    def percent_right(self, features: dict[str, Tensor], labels: Tensor) -> list[float]:
        normed = (features[self.pooling] - self.mean) / (self.variance + 1e-6).sqrt()
        return percent_right(normed.float() @ self.weight.T + self.bias, labels)

    def weights(self, name: str) -> dict[str, Tensor]:
        linear = {f"{name}.linear.weight": self.weight, f"{name}.linear.bias": self.bias}
        norm = {f"{name}.norm.running_mean": self.mean, f"{name}.norm.running_var": self.variance}
        return linear | norm


@contextmanager
def frozen_backbone(encoder: Encoder) -> Iterator[None]:
    """Whatever backbone runs inside is in eval mode, gets no gradient, and stays as it was."""
    seen = []

    def look(module: nn.Module, _) -> None:
        if isinstance(module, OwnBackbone):
            assert not torch.is_grad_enabled()
            assert not any(part.training for part in module.modules())
            assert not any(parameter.requires_grad for parameter in module.parameters())
            seen.append(module)

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
    (backbone,) = set(seen)
    assert_same(backbone.encoder.state_dict(), encoder.state_dict(), within=0)


def compare(
    folder: Path, steps, batches, evaluation, heads: dict[str, Head], evaluated, print_freq
) -> None:
    """The run in folder, and the optimiser's groups in each of its steps, with the same by hand.
    batches, evaluation: features and labels, of each step (two an epoch) and at the end of epochs.
    evaluated: the epochs after which there is an accuracy."""
    losses, right = {name: [] for name in heads}, {}
    for step, batch in enumerate(batches):
        for name, head in heads.items():
            losses[name].append(head.train(*batch, step))
        right[(step + 1) / 2] = {n: head.percent_right(*evaluation) for n, head in heads.items()}
    expected = {}
    for name, head in heads.items():
        expected |= head.weights(name.replace(".", "_"))
    final = final_state(folder / "linear_probe")["state_dict"]

    log = records(folder / "linear_probe")
    assert len(steps) == len(batches)
    found = [settings_by_name(groups, final) for groups in steps]
    for name, head in heads.items():
        for part in ("linear.weight", "linear.bias"):
            rates = [settings[f"{name.replace('.', '_')}.{part}"]["lr"] for settings in found]
            assert rates == pytest.approx(head.rates, rel=1e-12), name
        logged = [record[f"loss/{name}"] for record in log if f"loss/{name}" in record]
        assert logged == pytest.approx(means(losses[name], print_freq), rel=1e-6), name
        logged = {r["epoch"]: r[f"top1/{name}"] for r in log if f"top1/{name}" in r}
        assert logged == pytest.approx({epoch: right[epoch][name][0] for epoch in evaluated}), name
    # The gradient of a bias is a small difference of large sums.
    assert_same(final, expected, within=1e-5)

    found, last = results(folder, "linear_probe"), right[max(evaluated)]
    assert found["images"] == EVAL
    best = max(last, key=lambda name: last[name][0])
    assert found["best_head"] == best
    expected = {"top1": last[best][0], "top5": last[best][1]}
    expected |= {f"top1/{name}": top1 for name, (top1, _) in last.items()}
    assert found["results"] == pytest.approx(expected)
    assert found["top5_by_head"] == pytest.approx({name: top5 for name, (_, top5) in last.items()})


@pytest.mark.slow
def test_augmented_images(tmp_path):
    path = pretrained(tmp_path, colours=TRAINED)
    encoder = load_encoder(path, "target_encoder.", blocks=2, norm=False).requires_grad_(False)
    choice = "poolings=[cls+mean,mean] blrs=[0.5,5] weight_decay=0.3 seed=3".split()
    steps = "batch_size=36 accum_iter=2 epochs=3 warmup_epochs=0.75 eval_freq=2".split()
    images = "min_crop=0.4 dataset.flip=True dataset.crop_ratio=0.77 image_side=20".split()
    part = "which=target layer=1 final_norm=False print_freq=1".split()
    cfg = config("linear_probe", path, tmp_path, *choice, *steps, *images, *part, *DATASET)
    with few_digits(), frozen_backbone(encoder), optimiser_steps() as taken:
        main(cfg)

    digits, batches, heads = build_few_digits("train", None), [], {}
    for step in range(6):
        epoch, indices = images_of_step(step, 72, seed=3)
        crops = [random_crop(digits.load(index), 3, epoch, index) for index in indices]
        features = encode(encoder, torch.stack([normalised(crop, TRAINED) for crop in crops]))
        batches.append((features, torch.from_numpy(digits.labels[indices])))
    for pooling in ("cls+mean", "mean"):
        for blr in (0.5, 5):
            rates = [learning_rate(step / 2, blr * 72 / 256, 0, 0.75, 3) for step in range(6)]
            heads[f"{pooling}/{blr}"] = Head(pooling, rates, seed=3, weight_decay=0.3)
    images, labels = central_images("eval", side=20, shorter=26, colours=TRAINED)
    evaluation = encode(encoder, images), labels
    compare(tmp_path, taken, batches, evaluation, heads, evaluated=[2, 3], print_freq=1)


def test_cached_features(tmp_path):
    """Of a checkpoint that does not say its colours: those of the data set."""
    path = pretrained(tmp_path, colours=None)
    encoder = load_encoder(path, "encoder.", blocks=3, norm=True).requires_grad_(False)
    choice = "poolings=[mean,cls] blrs=[2,0.2] weight_decay=0.2 seed=5".split()
    steps = "batch_size=30 accum_iter=2 epochs=2 warmup_epochs=1.5 eval_freq=0".split()
    images = "cached=True dataset.flip=True dataset.crop_ratio=0.81 print_freq=2".split()
    cfg = config("linear_probe", path, tmp_path, *choice, *steps, *images, *DATASET)
    with few_digits(), frozen_backbone(encoder), optimiser_steps() as taken:
        main(cfg)

    images, labels = central_images("train", side=24, shorter=30, colours=OF_DATASET)
    features, batches, heads = encode(encoder, images), [], {}
    for step in range(4):
        _, indices = images_of_step(step, 60, seed=5)
        batches.append(({k: v[indices] for k, v in features.items()}, labels[indices]))
    for pooling in ("mean", "cls"):
        for blr in (2, 0.2):
            rates = [learning_rate(step / 2, blr * 60 / 256, 0, 1.5, 2) for step in range(4)]
            heads[f"{pooling}/{blr}"] = Head(pooling, rates, seed=5, weight_decay=0.2)
    images, labels = central_images("eval", side=24, shorter=30, colours=OF_DATASET)
    evaluation = encode(encoder, images), labels
    compare(tmp_path, taken, batches, evaluation, heads, evaluated=[2], print_freq=2)
