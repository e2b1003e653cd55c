"""Exact nearest neighbours by inner product, in chunks that bound the memory.

Candidates come from ordinary matrix products. Their similarities are then computed again, each as a
float64 sum over one pair of vectors: it depends on nothing but these two vectors, so that equal
ones tie exactly, and of equal similarities the lower index comes first. Where rounding in the
matrix product could have hidden a neighbour among those that were left out, the query is searched
again: with more digits, then with more candidates, in the end with every row. The answer is
therefore the same for all chunk sizes, processes and devices.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BANK_ROWS = 65536  # bank rows at a time
SPARE = 32  # candidates beyond k
MORE = 8  # times as many candidates where more digits leave a doubt
PAIR_VALUES = 2**24  # float64 values at a time when pairs are computed again


class Neighbours(NamedTuple):
    """Nearest first, on the CPU."""

    similarities: Tensor  # float64 [Q, k]
    indices: Tensor  # int64 [Q, k]


@torch.inference_mode()
def nearest(
    bank: Tensor, queries: Tensor, k: int, device: torch.device, leave_out: Tensor | None = None
) -> Neighbours:
    """The k rows of bank [N, D] of largest inner product with each query [Q, D].

    leave_out [Q]: one row of the bank per query that does not count, such as the query itself.
    Rows and queries are of length 1 at most; k is at most the number of rows that count.
    """
    similarities = torch.empty(len(queries), k, dtype=torch.float64)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    available = len(bank) - (leave_out is not None)
    waiting = torch.arange(len(queries))
    kept, dtype = min(k + SPARE, available), torch.float32
    while len(waiting):
        in_doubt = []
        for own in waiting.split(max(1, PAIR_VALUES // kept)):
            hidden = None if leave_out is None else leave_out[own]
            approximate, candidates = top_candidates(
                bank, queries[own], kept, device, hidden, dtype
            )
            found = sort_exactly(bank, queries[own], candidates)
            similarities[own], indices[own] = (part[:, :k] for part in found)
            # A product of D pairs of numbers errs by at most D times the precision; so does what
            # was left out, which was at most the least of the approximate ones.
            error = 2 * bank.shape[1] * torch.finfo(dtype).eps
            is_certain = found.similarities[:, k - 1] > approximate[:, -1].double() + error
            in_doubt.append(own[~is_certain & (kept < available)])
        waiting = torch.cat(in_doubt)
        more = MORE if dtype == torch.float64 else 1
        kept, dtype = min(more * kept, available), torch.float64
    return Neighbours(similarities, indices)


def sort_exactly(bank: Tensor, queries: Tensor, candidates: Tensor) -> Neighbours:
    """By index first, then a stable sort by similarity: of equals the lower index comes first."""
    candidates = candidates.sort(dim=1).values
    exact = pair_similarities(queries, bank, candidates)
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    return Neighbours(exact, candidates.gather(1, order))


def top_candidates(
    bank: Tensor,
    queries: Tensor,
    kept: int,
    device: torch.device,
    leave_out: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The largest inner products and their rows, on the CPU, both [Q, kept]."""
    queries = queries.to(device, dtype)
    values = torch.empty(len(queries), 0, dtype=dtype, device=device)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(bank), BANK_ROWS):
        part = bank[start : start + BANK_ROWS].to(device, dtype)
        product = queries @ part.T
        if leave_out is not None:
            inside = ((leave_out >= start) & (leave_out < start + len(part))).nonzero()[:, 0]
            product[inside.to(device), (leave_out[inside] - start).to(device)] = -torch.inf
        part_values, part_rows = product.topk(min(kept, len(part)), dim=1)
        values = torch.cat([values, part_values], dim=1)
        rows = torch.cat([rows, part_rows + start], dim=1)
        values, order = values.topk(min(kept, values.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return values.cpu(), rows.cpu()


def pair_similarities(queries: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
    """float64 [Q, kept]: one sum per pair, on the CPU."""
    queries = queries.cpu().double()
    result = torch.empty(candidates.shape, dtype=torch.float64)
    pairs = max(1, PAIR_VALUES // bank.shape[1])  # at a time
    for columns in torch.arange(candidates.shape[1]).split(pairs):
        for rows in torch.arange(len(queries)).split(max(1, pairs // len(columns))):
            vectors = bank[candidates[rows][:, columns].to(bank.device)].cpu().double()
            result[rows[:, None], columns] = (queries[rows, None] * vectors).sum(dim=2)
    return result
