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
    pooled = extract(run, dataset, cfg.split, cfg.pooling, normalised=False).features
    generator = torch.Generator().manual_seed(cfg.seed)
    chosen = torch.randperm(len(dataset), generator=generator)[: cfg.probe_images].tolist()
    run.finish(
        {
            "rankme": rank_me(pooled),
            **cosine_and_std(pooled),
            **probe_tokens(run, dataset, chosen),
        },
        protocol=f"{cfg.split} split, pooling {cfg.pooling}, tokens of {len(chosen)} images",
        images=len(dataset),
    )


def rank_me(features: Tensor) -> float:
    """Singular values from the D x D products, so that any number of images fits."""
    products = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):
        part = part.double()
        products += part.T @ part
    singular = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    share = singular / singular.sum()
    return torch.special.entr(share).sum().exp().item()


def cosine_and_std(features: Tensor) -> dict[str, float]:
    """Of all rows, brought to length 1, from the sum of each channel and that of its square."""
    count, width = features.shape
    sums = torch.zeros(2, width, dtype=torch.float64)
    for part in features.split(ROWS):
        unit = F.normalize(part.double(), dim=1)
        sums += torch.stack([unit.sum(dim=0), unit.square().sum(dim=0)])
    mean, square = sums / count
    # The sum over all pairs is the squared length of the sum, less each with itself.
    cosine = (sums[0].square().sum() - count) / (count * (count - 1))
    std = (square - mean**2).clamp_min(0).sqrt().mean() * width**0.5
    return {"mean_cosine": cosine.item(), "channel_std": std.item()}


def probe_tokens(run: EvalRun, dataset: ImageDataset, chosen: list[int]) -> dict[str, float]:
    """A linear map from token to place, fitted in closed form on half of the chosen images and
    tested on the other half; and the similarity of the tokens of all of them."""
    device, width = run.ranks.device, run.backbone.embed_dim
    places = (run.backbone.image_side // run.backbone.patch_size) ** 2
    similarity = torch.zeros((), dtype=torch.float64, device=device)

    @torch.inference_mode()
    def tokens_of(indices: list[int]) -> Iterator[Tensor]:
        """float32 [B, L, D], of this process's part of the images."""
        for batch in run.tracked(run.loader(dataset, indices), "batches probed:"):
            tokens = run.tokens(batch.images).patches.float()
            similarity.add_(average_similarity(tokens).double() * len(tokens))
            yield tokens

    # Ridge regression of the one-hot place. Each place occurs once per image, so that the sum of
    # tokens over images, place by place, is the product of tokens and one-hot places.
    fitted, tested = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    products = torch.zeros(width, width, dtype=torch.float64, device=device)
    by_place = torch.zeros(places, width, dtype=torch.float64, device=device)
    for tokens in tokens_of(fitted):
        by_place += tokens.double().sum(dim=0)
        flat = tokens.flatten(0, 1).double()
        products += flat.T @ flat
    all_reduce(products)
    all_reduce(by_place)
    count = len(fitted) * places
    mean = by_place.sum(dim=0) / count
    covariance = products / count - mean[:, None] * mean
    cross = by_place.T / count - mean[:, None] / places  # the mean of a one-hot place is 1 / L
    ridge = RIDGE * covariance.trace() / width + torch.finfo(torch.float64).tiny
    covariance.diagonal().add_(ridge)
    weight = torch.linalg.lstsq(covariance, cross).solution  # [D, L]
    bias = 1 / places - mean @ weight  # [L]

    hits = torch.zeros((), dtype=torch.int64, device=device)
    for tokens in tokens_of(tested):
        predicted = (tokens.double() @ weight + bias).argmax(dim=2)
        hits += (predicted == torch.arange(places, device=device)).sum()
    return {
        "token_similarity": all_reduce(similarity).item() / len(chosen),
        "position_probe": 100 * (all_reduce(hits).item() / (len(tested) * places)),
        "position_chance": 100 / places,
    }


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="collapse")
