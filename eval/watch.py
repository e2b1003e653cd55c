"""Is the run alive? Judged while it trains from a few images, without labels, by how two numbers
change: no threshold does, because a network that has learned nothing yet looks nearly collapsed.

rankme    how many directions the features of images use (eval/collapse.py)
content   1 - same_place: what a token says about its image and not about its place. Nothing is
          left of it where all images look alike, and where tokens become a code of their places
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.loader import EvalLoader
from eval.collapse import measure_pooled, measure_tokens
from models.vit import Encoder
from util.distributed import Ranks, gather_objects
from util.loaders import eval_loader

BATCH = 64
HEALTHY, PARTIAL, COLLAPSED = "healthy", "partial", "collapsed"
TOO_EARLY = "too early to say"
LOST = 0.25  # of the highest value so far: what is below has collapsed
EARLY = 0.15  # of training: until then both numbers fall in runs that do well


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
