"""Is there anything in the features? Numbers that need no labels.

rankme            exp of the entropy of the normalised singular values of the pooled features: how
                  many directions they use; at most their width
mean_cosine       between the pooled features of two different images; 1: all images look alike
channel_std       of the pooled features of length 1, times the square root of their width, averaged
                  over channels: 1 at most, 0 where all images look alike
token_similarity  s of the training log: cosine of two patch tokens of an image, each with itself
                  included
position_probe    percent of the patch tokens whose place a linear map reads off them, on images
                  that it was not fitted to; chance is position_chance. A network may satisfy the
                  loss by writing positions into its tokens, and nothing else

python launcher.py --config-name=collapse pretrained=checkpoints/lmim-vit_base \\
    data_path=/path/to/imagenet
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from data.base import DataError, ImageDataset
from eval.common import EvalRun, run_evaluation
from eval.features import ROWS, extract
from models.losses import average_similarity
from util.command import run_worker
from util.distributed import all_reduce
from util.loaders import open_split

RIDGE = 1e-4  # of the mean variance of a channel


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "collapse", evaluate)


def evaluate(run: EvalRun) -> None:
    cfg = run.cfg
    dataset = open_split(cfg, cfg.split)
    if len(dataset) < 4:
        raise DataError(f"split={cfg.split}: expected 4 images or more, it has {len(dataset)}")
    found = extract(run, dataset, cfg.split, cfg.pooling, normalised=False)
    probe = TokenProbe(run, dataset)
    results = {
        "rankme": rank_me(found.features),
        "mean_cosine": mean_cosine(found.features),
        "channel_std": channel_std(found.features),
        "token_similarity": probe.similarity,
        "position_probe": probe.accuracy,
        "position_chance": 100 / probe.places,
    }
    run.finish(
        results,
        protocol=f"{cfg.split} split, pooling {cfg.pooling}, tokens of {probe.images} images",
        images=len(dataset),
    )


# --- pooled features [N, D] ---------------------------------------------------------------------


def rank_me(features: Tensor) -> float:
    """Singular values from the D x D products, so that any number of images fits."""
    products = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):
        part = part.double()
        products += part.T @ part
    singular = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()


def unit_sums(features: Tensor) -> Tensor:
    """Over all rows, brought to length 1: the sum of each channel, and of its square. [2, D]"""
    sums = torch.zeros(2, features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):
        unit = F.normalize(part.double(), dim=1)
        sums += torch.stack([unit.sum(dim=0), unit.square().sum(dim=0)])
    return sums


def mean_cosine(features: Tensor) -> float:
    """All pairs at once: their sum is the squared length of the sum, less each with itself."""
    count = len(features)
    return ((unit_sums(features)[0].square().sum() - count) / (count * (count - 1))).item()


def channel_std(features: Tensor) -> float:
    mean, square = unit_sums(features) / len(features)
    return ((square - mean**2).clamp_min(0).sqrt().mean() * features.shape[1] ** 0.5).item()


# --- patch tokens -------------------------------------------------------------------------------


class TokenProbe:
    """A linear map from token to place, fitted in closed form on half of a sample of images and
    tested on the other half."""

    def __init__(self, run: EvalRun, dataset: ImageDataset):
        cfg, backbone = run.cfg, run.backbone
        self.run, self.dataset, self.device = run, dataset, run.ranks.device
        generator = torch.Generator().manual_seed(cfg.seed)
        chosen = torch.randperm(len(dataset), generator=generator)[: cfg.probe_images].tolist()
        half = len(chosen) // 2
        self.images = len(chosen)
        self.similarity_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.places = (backbone.image_side // backbone.patch_size) ** 2
        weight, bias = self.fit(chosen[:half])
        self.accuracy = 100 * self.test(chosen[half:], weight, bias)
        self.similarity = all_reduce(self.similarity_sum).item() / len(chosen)

    @torch.inference_mode()
    def tokens(self, indices: list[int]) -> Iterator[Tensor]:
        """float32 [B, L, D], of this process's part of the images."""
        loader = self.run.loader(self.dataset, indices)
        for batch in self.run.tracked(loader, "batches probed:"):
            tokens = self.run.tokens(batch.images).patches.float()
            self.similarity_sum += average_similarity(tokens).double() * len(tokens)
            yield tokens

    def fit(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Ridge regression of the one-hot place -> weight [D, L], bias [L]

        Each place occurs once per image, so that the sum of tokens over images, place by place, is
        the product of tokens and one-hot places.
        """
        width = self.run.backbone.embed_dim
        products = torch.zeros(width, width, dtype=torch.float64, device=self.device)
        by_place = torch.zeros(self.places, width, dtype=torch.float64, device=self.device)
        for tokens in self.tokens(indices):
            by_place += tokens.double().sum(dim=0)
            flat = tokens.flatten(0, 1).double()
            products += flat.T @ flat
        all_reduce(products)
        all_reduce(by_place)
        count = len(indices) * self.places
        mean = by_place.sum(dim=0) / count
        covariance = products / count - mean[:, None] * mean
        # The mean of a one-hot place is 1 / L.
        cross = by_place.T / count - mean[:, None] / self.places
        ridge = RIDGE * covariance.trace() / width + torch.finfo(torch.float64).tiny
        covariance.diagonal().add_(ridge)
        weight = torch.linalg.lstsq(covariance, cross).solution
        return weight, 1 / self.places - mean @ weight

    def test(self, indices: list[int], weight: Tensor, bias: Tensor) -> float:
        hits = torch.zeros((), dtype=torch.int64, device=self.device)
        place = torch.arange(self.places, device=self.device)
        for tokens in self.tokens(indices):
            hits += ((tokens.double() @ weight + bias).argmax(dim=2) == place).sum()
        return all_reduce(hits).item() / (len(indices) * self.places)


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="collapse")
