"""Nearest neighbours in feature space.

protocol=paper: leave-one-out inside the evaluation split, top-1. The published 50.1 is this; it is
not comparable to a k-NN whose bank is the training split.
protocol=knn: the bank is the training split; the k nearest vote with exp(cosine / temperature).

python launcher.py --config-name=nn pretrained=checkpoints/lmim-vit_base data_path=/path/to/imagenet
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import EvalLoader, share_of
from eval.common import EvalRun, labelled_images, worker
from eval.features import Features, encode, extract_labelled, labels_of
from launch.command import run_worker
from launch.config import ConfigError
from models.vit import Encoder
from util.distributed import Ranks, all_reduce

QUERIES = 1024  # at a time, the same pieces however many processes share them
BANK_ROWS = 65536  # bank rows at a time
SPARE = 32  # candidates beyond k
MORE = 8  # times as many candidates where a doubt is left
PAIR_VALUES = 2**24  # float64 values at a time when pairs are computed again


class Neighbours(NamedTuple):
    """Nearest first, on the CPU."""

    similarities: Tensor  # float64 [Q, k]
    indices: Tensor  # int64 [Q, k]


def evaluate(run: EvalRun) -> None:
    cfg, is_knn = run.cfg, run.cfg.protocol == "knn"
    images = labelled_images(run, "eval", *(["train"] if is_knn else []))
    found = extract_labelled(run, images, cfg.pooling)
    queries = found["eval"]
    count = len(queries.labels)
    if is_knn:
        bank, size = found["train"], len(found["train"].labels)
        check_bank(max(cfg.neighbours), size, "labelled training images")
        results = knn(bank, queries, cfg.neighbours, cfg.temperature, run.ranks, run)
        votes = f"votes of exp(cosine / {cfg.temperature})"
        protocol, extra = f"k-NN, bank of {size} training images, {votes}", {"bank": size}
    else:
        check_bank(1, count - 1, "evaluation images other than the query")
        results = {"top1": leave_one_out(queries, run.ranks, run)}
        protocol, extra = "nearest neighbour, leave-one-out inside the evaluation images", {}
    norm = "with" if cfg.final_norm else "without"
    protocol += f", pooling {cfg.pooling}, {norm} final norm, percent"
    run.finish(results, protocol=protocol, images=count, extra=extra)


def check_bank(wanted: int, present: int, what: str) -> None:
    if wanted > present:
        raise ConfigError(f"neighbours={wanted}: expected 1 to {present}, as many {what} there are")


def leave_one_out(images: Features, ranks: Ranks, run: EvalRun | None = None) -> float:
    """Percent of the images whose nearest other image has their label. Of equally near images the
    first one counts."""
    # Classes numbered from 0, for the vote: an image without label (-1) is of a class, too.
    images = images._replace(labels=images.labels.unique(return_inverse=True)[1])
    return knn(images, images, [1], 1.0, ranks, run)["k1_top1"]


def knn(
    bank: Features,
    queries: Features,
    neighbours: list[int],
    temperature: float,
    ranks: Ranks,
    run: EvalRun | None = None,
) -> dict[str, float]:
    """Percent of the queries whose class is the first, and among the first five, of the vote; each
    process searches its part of them. Where the queries are the bank, none is a neighbour of
    itself."""
    vectors = F.normalize(queries.features)
    searched = vectors if queries is bank else F.normalize(bank.features)
    classes = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    hits = torch.zeros(len(neighbours), 2, dtype=torch.int64)
    pieces = torch.arange(len(queries.labels)).split(QUERIES)
    pieces = pieces[share_of(len(pieces), ranks.rank, ranks.world_size)]
    for rows in pieces if run is None else run.tracked(pieces, "pieces of the queries:"):
        itself = rows if queries is bank else None
        found = nearest(searched, vectors[rows], max(neighbours), ranks.device, leave_out=itself)
        for row, k in enumerate(neighbours):
            ranking = vote(found, bank.labels, k, temperature, classes)[:, :5]
            is_hit = ranking == queries.labels[rows, None]
            hits[row] += torch.stack([is_hit[:, 0].sum(), is_hit.sum()])
    shares = 100 * all_reduce(hits.to(ranks.device)).cpu().double() / len(queries.labels)
    names = [f"k{k}_top{top}" for k in neighbours for top in (1, 5)]
    return dict(zip(names, shares.flatten().tolist(), strict=True))


def vote(found: Neighbours, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Classes by their votes, most first; of equal votes the lower class; -1 for those that no
    neighbour has. -> [Q, classes]"""
    similarities = found.similarities[:, :k]
    # Relative to the nearest one: a common factor, and no temperature is too low for exp.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    voters = labels[found.indices[:, :k]]
    votes = torch.zeros(len(weights), classes, dtype=torch.float64).scatter_add_(1, voters, weights)
    has_votes = torch.zeros(votes.shape, dtype=torch.bool).scatter_(1, voters, True)
    votes, ranking = votes.where(has_votes, -1).sort(dim=1, descending=True, stable=True)
    return ranking.where(votes >= 0, -1)


def leave_one_out_accuracy(
    encoder: Encoder, images: EvalLoader, normalise: Callable[[Tensor], Tensor], ranks: Ranks
) -> tuple[float, int]:
    """While pre-training: of the mean of the patch tokens before the final norm, and how many
    images could be read."""

    def vectors(batch: Tensor) -> Tensor:
        return encoder.encode_images(normalise(batch))[:, 1:].mean(dim=1)

    was_training = encoder.training
    encoder.eval()
    shape = (len(images.dataset), encoder.embed_dim)
    features, is_read = encode(images, vectors, shape, ranks)
    encoder.train(was_training)
    found = Features(features[is_read], labels_of(images.dataset)[is_read])
    count = len(found.labels)
    return leave_one_out(found, ranks) if count > 1 else math.nan, count


# --- exact search: largest inner products, in chunks that bound the memory ----------------------
#
# Candidates come from ordinary matrix products. Their similarities are then computed again, each as
# a float64 sum over one pair of vectors: it depends on nothing but these two vectors, so that equal
# ones tie exactly, and of equal similarities the lower index comes first. Where rounding in the
# matrix product could have hidden a neighbour among those that were left out, the query is searched
# again with more digits and more candidates, in the end with every row. The answer is therefore the
# same for all chunk sizes, processes and devices.


@torch.inference_mode()
def nearest(
    bank: Tensor, queries: Tensor, k: int, device: torch.device, leave_out: Tensor | None = None
) -> Neighbours:
    """The k rows of bank [N, D] of largest inner product with each query [Q, D], all on the CPU;
    device: of the matrix products.

    leave_out [Q]: one row of the bank per query that does not count, such as the query itself.
    Rows and queries are of length 1 at most; k is at most the number of rows that count."""
    similarities = torch.empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    available = len(bank) - (leave_out is not None)
    waiting = torch.arange(len(queries))
    kept, dtype = min(k + SPARE, available), torch.float32
    while len(waiting):
        in_doubt = []
        for own in waiting.split(max(1, PAIR_VALUES // kept)):
            hidden = None if leave_out is None else leave_out[own]
            asked = queries[own].to(device, dtype)  # the bank follows
            approximate, candidates = top_candidates(bank, asked, kept, hidden)
            # By index first, then a stable sort: of equals the lower index comes first.
            candidates = candidates.sort(dim=1).values
            exact = pair_similarities(queries[own], bank, candidates)
            exact, order = exact.sort(dim=1, descending=True, stable=True)
            similarities[own], indices[own] = exact[:, :k], candidates.gather(1, order)[:, :k]
            # A product of D pairs of numbers errs by at most D times the precision; so does what
            # was left out, which was at most the least of the approximate ones.
            error = 2 * bank.shape[1] * torch.finfo(dtype).eps
            is_certain = exact[:, k - 1] > approximate[:, -1].double() + error
            in_doubt.append(own[~is_certain & (kept < available)])
        waiting = torch.cat(in_doubt)
        kept, dtype = min(MORE * kept, available), torch.float64
    return Neighbours(similarities, indices)


def top_candidates(
    bank: Tensor, queries: Tensor, kept: int, leave_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The largest inner products and their rows, on the CPU, both [Q, kept]."""
    found = []
    for start in range(0, len(bank), BANK_ROWS):
        part = bank[start : start + BANK_ROWS].to(queries)
        product = queries @ part.T
        if leave_out is not None:
            inside = ((leave_out >= start) & (leave_out < start + len(part))).nonzero()[:, 0]
            product[inside, leave_out[inside] - start] = -torch.inf
        values, rows = product.topk(min(kept, len(part)), dim=1)
        found.append((values, rows + start))
    values, rows = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    values, order = values.topk(kept, dim=1)
    return values.cpu(), rows.gather(1, order).cpu()


def pair_similarities(queries: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
    """float64 [Q, kept]: one sum per pair."""
    rows = torch.arange(len(queries)).repeat_interleave(candidates.shape[1])
    at_a_time = max(1, PAIR_VALUES // bank.shape[1])
    pairs = zip(rows.split(at_a_time), candidates.flatten().split(at_a_time), strict=True)
    parts = [(queries[own].double() * bank[other].double()).sum(dim=1) for own, other in pairs]
    return torch.cat(parts).view(candidates.shape)


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="nn")
