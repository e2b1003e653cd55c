"""Fine-tuning as a whole, against a loop written by hand: every key is away from its default, so
that one which does not arrive where it belongs is noticed."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data import Mixup, create_transform
from timm.layers import DropPath
from torch import Tensor, nn

from eval.finetune import main
from models.vit import Encoder
from tests.evaluations import build_few_digits, config, few_digits, results
from tests.runs import final_state, records
from tests.test_probe_by_hand import (
    DATASET,
    OF_DATASET,
    ON_CPU,
    TRAINED,
    central_images,
    encode,
    images_of_step,
    learning_rate,
    load_encoder,
    means,
    optimiser_steps,
    percent_right,
    pretrained,
    settings_by_name,
)

pytestmark = ON_CPU

MATRICES = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight")
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "maximize": False}


def seeds(*counter: int) -> list[int]:
    return np.random.SeedSequence(counter).generate_state(3).tolist()


def seed_all(*counter: int) -> None:
    for_python, for_numpy, for_torch = seeds(*counter)
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.default_generator.manual_seed(for_torch)


class Network(nn.Module):
    """Names of parameters as in checkpoints. drop_path: of each block."""

    def __init__(self, encoder: Encoder, drop_path: list[float], pooling: str, seed: int):
        super().__init__()
        self.backbone, self.pooling = nn.ModuleDict({"encoder": encoder}), pooling
        for block, rate in zip(encoder.blocks, drop_path, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
        width = 48 if pooling == "cls+mean" else 24
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 10)
        torch.manual_seed(seeds(7, seed)[0])
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(encode(self.backbone["encoder"], images)[self.pooling]))


@dataclass
class ByHand:
    """What the overrides of a run mean: two epochs of three steps."""

    network: Network
    seed: int
    batch_size: int
    accum_iter: int
    rates: list[float]  # of the head, by step
    shares: dict[str, float]  # of that rate, by the beginning of parameter names
    weight_decay: float
    augment: Callable
    mixup: Mixup | None
    smoothing: float
    evaluation: tuple[Tensor, Tensor]

    def settings(self, name: str, step: int) -> tuple[float, float]:
        """-> learning rate, weight decay"""
        (share,) = [share for start, share in self.shares.items() if name.startswith(start)]
        return share * self.rates[step], self.weight_decay if name.endswith(MATRICES) else 0.0

    def train(self) -> tuple[list[float], dict[int, list[float]]]:
        """-> the loss of each step; after each epoch the percentages of right answers"""
        names, parameters = zip(*self.network.named_parameters(), strict=True)
        groups = [{"params": [parameter]} for parameter in parameters]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
        losses, right = [], {}
        for step in range(6):
            for name, group in zip(names, optimizer.param_groups, strict=True):
                group["lr"], group["weight_decay"] = self.settings(name, step)
            epoch, indices = images_of_step(step, self.batch_size * self.accum_iter, self.seed)
            self.network.train()
            parts = []
            for position in range(self.accum_iter):
                own = indices[position * self.batch_size : (position + 1) * self.batch_size]
                loss = self.loss(step, epoch, position, own)
                (loss / self.accum_iter).backward()
                parts.append(loss.item())
            losses.append(sum(parts) / self.accum_iter)
            optimizer.step()
            optimizer.zero_grad()
            if step in (2, 5):
                self.network.eval()
                with torch.no_grad():
                    images, labels = self.evaluation
                    right[epoch + 1] = percent_right(self.network(images), labels)
        return losses, right

    def loss(self, step: int, epoch: int, position: int, indices: list[int]) -> Tensor:
        digits, images = build_few_digits("train", None), []
        for index in indices:
            seed_all(4, self.seed, epoch, index)
            images.append(self.augment(digits.load(index)))
        images, labels = torch.stack(images), torch.from_numpy(digits.labels[indices])
        if self.mixup is not None:
            seed_all(5, self.seed, step, position)
            images, targets = self.mixup(images, labels)
        torch.manual_seed(seeds(6, self.seed, step, position)[0])
        logs = self.network(images).log_softmax(dim=1)
        if self.mixup is not None:
            return -(logs * targets).sum() / len(images)
        of_labels = -logs[range(len(labels)), labels].mean()
        return (1 - self.smoothing) * of_labels + -logs.sum(dim=1).mean() * (self.smoothing / 10)


def as_one(weights: dict[str, Tensor]) -> Tensor:
    """Without biases of keys: their gradient is rounding noise, of which Adam makes whole steps."""
    parts = [
        value.unflatten(0, (3, 24))[::2] if name.endswith("qkv.bias") else value
        for name, value in sorted(weights.items())
    ]
    return torch.cat([part.flatten() for part in parts])


def compare(folder: Path, steps: list[list[dict]], by_hand: ByHand, evaluated, print_freq) -> None:
    """The run in folder, and the optimiser's groups in each of its steps, with the same by hand.
    evaluated: the epochs after which there is an accuracy."""
    losses, right = by_hand.train()
    names = dict(by_hand.network.named_parameters())
    final, expected = final_state(folder / "finetune")["state_dict"], by_hand.network.state_dict()
    assert len(steps) == 6
    for step, groups in enumerate(steps):
        found = settings_by_name(groups, final)
        assert found.keys() == names.keys()
        for name, group in found.items():
            settings = group["lr"], group["weight_decay"]
            assert settings == pytest.approx(by_hand.settings(name, step), rel=1e-12), name
            assert {key: group[key] for key in ADAMW} == ADAMW, name

    log = records(folder / "finetune")
    losses, rates = means(losses, print_freq), by_hand.rates[print_freq - 1 :: print_freq]
    assert [r["loss"] for r in log if "loss" in r] == pytest.approx(losses, rel=1e-6)
    assert [r["lr"] for r in log if "lr" in r] == pytest.approx(rates, rel=1e-12)
    logged = {r["epoch"]: [r["top1"], r["top5"]] for r in log if "top1" in r}
    assert logged == {epoch: pytest.approx(right[epoch]) for epoch in evaluated}
    expected_results = pytest.approx(dict(zip(("top1", "top5"), right[2], strict=True)))
    assert results(folder, "finetune")["results"] == expected_results
    assert final.keys() == expected.keys()
    ours, theirs = as_one(final), as_one(expected)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.slow
def test_mixed_images(tmp_path):
    path = pretrained(tmp_path, "freeze_pe=False", colours=TRAINED)
    encoder = load_encoder(path, "encoder.", blocks=3, norm=False)
    steps = "batch_size=24 accum_iter=2 epochs=2 warmup_epochs=0.75 eval_freq=0 seed=3".split()
    adamw = "blr=0.015 min_lr=1e-3 layer_decay=0.7 weight_decay=0.2 drop_path=0.4".split()
    images = "min_crop=0.5 dataset.flip=True dataset.crop_ratio=0.81 erase=0.4".split()
    mixing = "mixup=0.5 cutmix=0.7 label_smoothing=0.15".split()
    other = "auto_augment=rand-m6-n3-mstd0.4 pooling=mean print_freq=1".split()
    cfg = config("finetune", path, tmp_path, *steps, *adamw, *images, *mixing, *other, *DATASET)
    with few_digits(), optimiser_steps() as taken:
        main(cfg)

    peak, encoders = 0.015 * 48 / 256, "backbone.encoder."
    by_hand = ByHand(
        network=Network(encoder, [0.0, 0.2, 0.4], "mean", seed=3),
        seed=3,
        batch_size=24,
        accum_iter=2,
        rates=[learning_rate(step / 3, peak, 1e-3, 0.75, 2) for step in range(6)],
        shares={"norm.": 1, "head.": 1}
        | {f"{encoders}blocks.{block}.": share for block, share in enumerate((0.343, 0.49, 0.7))}
        | {encoders + name: 0.7**4 for name in ("embed.", "pos_embed.", "cls_token")},
        weight_decay=0.2,
        augment=create_transform(
            input_size=24,
            is_training=True,
            scale=(0.5, 1.0),
            hflip=0.5,
            color_jitter=None,
            auto_augment="rand-m6-n3-mstd0.4",
            interpolation="bicubic",
            mean=TRAINED[0],
            std=TRAINED[1],
            re_prob=0.4,
            re_mode="pixel",
        ),
        mixup=Mixup(mixup_alpha=0.5, cutmix_alpha=0.7, label_smoothing=0.15, num_classes=10),
        smoothing=0.15,
        evaluation=central_images("eval", side=24, shorter=30, colours=TRAINED),
    )
    compare(tmp_path, taken, by_hand, evaluated=[2], print_freq=1)


@pytest.mark.slow
def test_unmixed_images(tmp_path):
    """Of a checkpoint that does not say its colours: those of the data set."""
    path = pretrained(tmp_path, colours=None)
    encoder = load_encoder(path, "target_encoder.", blocks=2, norm=True)
    steps = "batch_size=50 accum_iter=1 epochs=2 warmup_epochs=0.5 eval_freq=1 seed=8".split()
    adamw = "blr=0.02 min_lr=0 layer_decay=0.6 weight_decay=0.1 drop_path=0.3".split()
    images = "min_crop=0.6 dataset.crop_ratio=0.77 image_side=20 erase=0.6 auto_augment=null"
    mixing = "mixup=0 cutmix=0 label_smoothing=0.2 pooling=cls+mean print_freq=2".split()
    part = "which=target layer=1 final_norm=True".split()
    changes = [*steps, *adamw, *images.split(), *mixing, *part, *DATASET]
    with few_digits(), optimiser_steps() as taken:
        main(config("finetune", path, tmp_path, *changes))

    peak, encoders = 0.02 * 50 / 256, "backbone.encoder."
    by_hand = ByHand(
        network=Network(encoder, [0.0, 0.3], "cls+mean", seed=8),
        seed=8,
        batch_size=50,
        accum_iter=1,
        rates=[learning_rate(step / 3, peak, 0, 0.5, 2) for step in range(6)],
        shares={"norm.": 1, "head.": 1, encoders + "norm.": 1}
        | {f"{encoders}blocks.{block}.": share for block, share in enumerate((0.36, 0.6))}
        | {encoders + name: 0.6**3 for name in ("embed.", "cls_token")},
        weight_decay=0.1,
        augment=create_transform(
            input_size=20,
            is_training=True,
            scale=(0.6, 1.0),
            hflip=0,
            color_jitter=None,
            interpolation="bicubic",
            mean=OF_DATASET[0],
            std=OF_DATASET[1],
            re_prob=0.6,
            re_mode="pixel",
        ),
        mixup=None,
        smoothing=0.2,
        evaluation=central_images("eval", side=20, shorter=26, colours=OF_DATASET),
    )
    compare(tmp_path, taken, by_hand, evaluated=[1, 2], print_freq=2)
