"""Is there anything in the features? Numbers that need no labels.

rankme            exp of the entropy of the normalised singular values of the pooled features: how
                  many directions they use; at most their width
mean_cosine       between the pooled features of two different images; 1: all images look alike
channel_std       of the pooled features of length 1, times the square root of their width, averaged
                  over channels: 1 at most, 0 where all images look alike
token_similarity  s of the training log: cosine of two patch tokens of an image, each with itself
                  included
same_place        cosine of the tokens of two images at the same place; 1: they say nothing about
                  the image
other_places      the same at different places
position_probe    percent of the patch tokens whose place a linear map reads off them, on images
                  that it was not fitted to; chance is position_chance. A network may satisfy the
                  loss by writing positions into its tokens, and nothing else

python launcher.py --config-name=collapse pretrained=checkpoints/lmim-vit_base \\
    data_path=/path/to/imagenet
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.base import DataError
from data.loader import EvalLoader
from eval.common import EvalRun, worker
from eval.features import extract
from launch.command import run_worker
from models.losses import average_similarity
from models.vit import Encoder
from util.build import eval_loader, open_split
from util.distributed import Ranks, all_reduce, gather_objects

ROWS = 65536  # features that are converted at a time: bounds the memory
RIDGE = 1e-4  # of the mean variance of a channel
BATCH = 64
HEALTHY, PARTIAL, COLLAPSED = "healthy", "partial", "collapsed"
TOO_EARLY = "too early to say"
LOST = 0.25  # of the highest value so far: what is below has collapsed
EARLY = 0.15  # of training: until then both numbers fall in runs that do well


def evaluate(run: EvalRun) -> None:
    cfg = run.cfg
    dataset = open_split(cfg, cfg.split, run.ranks)
    if len(dataset) < 4:
        raise DataError(f"split={cfg.split}: expected 4 images or more, it has {len(dataset)}")
    pooled = extract(run, dataset, cfg.split, cfg.pooling).features
    generator = torch.Generator().manual_seed(cfg.seed)
    drawn, left_out = torch.randperm(len(dataset), generator=generator), run.bad_images[dataset]
    readable = (index for index in drawn.tolist() if dataset.describe(index) not in left_out)
    chosen = list(islice(readable, cfg.probe_images))

    @torch.inference_mode()
    def tokens_of(indices: list[int]) -> Iterator[Tensor]:
        for batch in run.batches(run.loader(dataset, indices), "batches probed:"):
            yield run.tokens(batch.images).patches.float()

    fitted, tested = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    places = (run.backbone.image_side // run.backbone.patch_size) ** 2
    shape = (places, run.backbone.embed_dim)
    tokens = measure_tokens(tokens_of(fitted), tokens_of(tested), shape, run.ranks)
    run.finish(
        measure_pooled(pooled) | tokens,
        protocol=f"{cfg.split} split, pooling {cfg.pooling}, tokens of {len(chosen)} images",
        images=len(pooled),
    )


def measure_pooled(features: Tensor) -> dict[str, float]:
    """Measure features [N, D] of images, part by part, so that any number of them fits."""
    count, width = features.shape
    products = torch.zeros(width, width, dtype=torch.float64)
    sums = torch.zeros(2, width, dtype=torch.float64)  # of rows of length 1, and of their squares
    for part in features.split(ROWS):
        part = part.double()
        products += part.T @ part
        unit = F.normalize(part, dim=1)
        sums += torch.stack([unit.sum(dim=0), unit.square().sum(dim=0)])
    # The singular values, from the D x D products.
    singular = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    share = singular / singular.sum()
    mean, square = sums / count
    # The sum over all pairs is the squared length of the sum, less each with itself.
    cosine = (sums[0].square().sum() - count) / (count * (count - 1))
    std = (square - mean**2).clamp_min(0).sqrt().mean() * width**0.5
    return {
        "rankme": torch.special.entr(share).sum().exp().item(),
        "mean_cosine": cosine.item(),
        "channel_std": std.item(),
    }


def measure_tokens(
    fitted: Iterable[Tensor], tested: Iterable[Tensor], shape: tuple[int, int], ranks: Ranks
) -> dict[str, float]:
    """Measure the tokens of two sets of images: this process's tokens, [B, *shape] at a time;
    shape: places, width. A linear map from token to place is fitted to the first set in closed form
    and tested on the second; similarities are those of both."""
    places, width = shape
    zeros = partial(torch.zeros, dtype=torch.float64, device=ranks.device)
    # Of both sets: sums of tokens of length 1, place by place; of cosines inside images; images.
    unit_sums, inside, images = zeros(places, width), zeros(()), zeros(())

    def add(tokens: Tensor) -> Tensor:
        tokens = tokens.double()
        unit_sums.add_(F.normalize(tokens, dim=-1).sum(dim=0))
        inside.add_(average_similarity(tokens) * len(tokens))
        images.add_(len(tokens))
        return tokens

    # Ridge regression of the one-hot place. Each place occurs once per image, so that the sum of
    # tokens over images, place by place, is the product of tokens and one-hot places.
    products, sums, count = zeros(width, width), zeros(places, width), zeros(())
    for tokens in map(add, fitted):
        sums += tokens.sum(dim=0)
        flat = tokens.flatten(0, 1)
        products += flat.T @ flat
        count += len(flat)
    for values in (products, sums, count):
        all_reduce(values)
    mean = sums.sum(dim=0) / count
    covariance = products / count - mean[:, None] * mean
    cross = sums.T / count - mean[:, None] / places  # the mean of a one-hot place is 1 / L
    ridge = RIDGE * covariance.trace() / width + torch.finfo(torch.float64).tiny
    covariance.diagonal().add_(ridge)
    weight = torch.linalg.lstsq(covariance, cross).solution  # [D, L]
    bias = 1 / places - mean @ weight  # [L]

    hits = zeros(())
    for tokens in map(add, tested):
        predicted = (tokens @ weight + bias).argmax(dim=2)
        hits += (predicted == torch.arange(places, device=ranks.device)).sum()
    for values in (hits, unit_sums, inside, images):
        all_reduce(values)
    # All pairs, less those of one image and, of one place, those of a token with itself.
    same = unit_sums.square().sum() - images * places
    everything = unit_sums.sum(dim=0).square().sum() - places**2 * inside
    pairs = images * (images - 1) * places
    found = {
        "token_similarity": inside / images,
        "same_place": same / pairs,
        "other_places": (everything - same) / (pairs * max(places - 1, 1)),
        "position_probe": 100 * hits / (images * places - count),
    }
    return {name: value.item() for name, value in found.items()} | {"position_chance": 100 / places}


# --- the watch over a run that trains -------------------------------------------------------------
#
# Judged from a few images, without labels, by how two numbers change: no threshold does, because a
# network that has learned nothing yet looks nearly collapsed.
#
# rankme    how many directions the features of images use
# content   1 - same_place: what a token says about its image and not about its place. Nothing is
#           left of it where all images look alike, and where tokens become a code of their places


class CollapseWatch:
    """Measure an encoder on a few of the images that a loader has, which are read once."""

    def __init__(self, cfg: DictConfig, ranks: Ranks, images: EvalLoader):
        dataset, transform = images.dataset, images.samples.transform
        count = min(cfg.watch_images, len(dataset))
        chosen = [len(dataset) * place // count for place in range(count)]  # from all parts of it
        smaller = OmegaConf.merge(cfg, {"batch_size": min(cfg.batch_size, BATCH)})
        self.loader = eval_loader(smaller, ranks, dataset, transform, chosen)
        self.loader.bad_images = images.bad_images  # each is named once
        self.ranks = ranks
        self.batches: list[Tensor] | None = None  # uint8, on the device

    @torch.inference_mode()
    def measure(self, encoder: Encoder, normalised: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Measure what --config-name=collapse does, of the tokens before the final norm and of
        their means."""
        if self.batches is None:
            self.batches = [batch.images for batch in self.loader]
            bad_images = self.loader.bad_images
            bad_images.update(*gather_objects(bad_images, self.ranks))
        pooled = [torch.empty(0, encoder.embed_dim)]

        def tokens_of(first: int) -> Iterator[Tensor]:
            for images in self.batches or ():
                tokens = encoder.encode_images(normalised(images[first::2]))[:, 1:].float()
                pooled.append(tokens.mean(dim=1).cpu())
                yield tokens

        shape = (encoder.grid_size**2, encoder.embed_dim)
        numbers = measure_tokens(tokens_of(0), tokens_of(1), shape, self.ranks)
        features = torch.cat(gather_objects(torch.cat(pooled), self.ranks))
        found = measure_pooled(features)
        return {"rankme": found["rankme"], "mean_cosine": found["mean_cosine"], **numbers}


class Judgement(NamedTuple):
    verdict: str
    since: int  # step
    reason: str

    def __str__(self) -> str:
        since = "" if self.verdict == TOO_EARLY else f" since step {self.since}"
        return f"{self.verdict}{since} ({self.reason})"


def judge(history: dict[int, dict[str, float]], planned_steps: int) -> Judgement | None:
    """Say what the measurements so far, by step, come to at the last of them."""
    judged = None
    values: dict[str, list[float]] = {"rankme": [], "content": []}
    for step, numbers in sorted(history.items()):
        values["rankme"].append(numbers["rankme"])
        values["content"].append(1 - numbers["same_place"])
        # "not >=" is also true of what is not a number any more.
        lost = [name for name, found in values.items() if not found[-1] >= LOST * max(found)]
        less = [name for name, found in values.items() if not found[-1] >= found[0]]
        verdict = PARTIAL if less else HEALTHY
        if lost:
            verdict = COLLAPSED
        elif step < EARLY * planned_steps:
            verdict = TOO_EARLY
        since = judged.since if judged and judged.verdict == verdict else step
        reason = ", ".join(
            f"{name} {found[0]:.3g} -> {found[-1]:.3g}"
            + (f", once {max(found):.3g}" if name in lost and max(found) > found[0] else "")
            for name, found in values.items()
            if name in (lost or less or values)
        )
        judged = Judgement(verdict, since, reason)
    return judged


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="collapse")
