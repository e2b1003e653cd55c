"""Nearest neighbours in feature space.

protocol=paper: leave-one-out inside the evaluation split, top-1. The published 50.1 is this; it is
not comparable to a k-NN whose bank is the training split.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from data.loader import EvalLoader
from eval.features import pooled_features
from models.vit import Encoder
from util.distributed import Ranks, all_reduce, gather_objects, gather_rows

CHUNK = 2048  # queries at a time: bounds the memory of the similarity matrix


def leave_one_out_accuracy(
    encoder: Encoder, images: EvalLoader, normalise: Callable[[Tensor], Tensor], ranks: Ranks
) -> tuple[float, int]:
    """Percent of the images whose nearest other image has their label, and how many there are.

    Each process encodes its part of the images, and looks for the neighbours of that part.
    """
    features, labels = pooled_features(encoder, images, normalise)
    parts = gather_objects(len(features), ranks)
    first = sum(parts[: ranks.rank])
    last = first + parts[ranks.rank]
    features, labels = gather_rows(features, ranks), gather_rows(labels, ranks)
    hits = torch.tensor(leave_one_out_hits(features, labels, first, last), device=ranks.device)
    return 100 * all_reduce(hits).item() / len(labels), len(labels)


def leave_one_out_hits(features: Tensor, labels: Tensor, first: int, last: int) -> int:
    """How many of the images first .. last - 1 have the label of their nearest other image.

    features [N, D], L2-normalised. Of equally near images the first one counts.
    """
    hits = 0
    for start in range(first, last, CHUNK):
        queries = torch.arange(start, min(start + CHUNK, last), device=features.device)
        similarity = features[queries] @ features.T
        similarity[torch.arange(len(queries), device=features.device), queries] = -torch.inf
        hits += int((labels[similarity.argmax(dim=1)] == labels[queries]).sum())
    return hits
