"""The exact nearest-neighbour search of the evaluations (eval/search.py) at ImageNet's size:

python -m bench.neighbours     # 1.28 M x 768 features, 5,000 queries, the 200 nearest of each

Time, peak memory, and whether some of the answers equal those of a float64 comparison with every
row.
"""

import argparse
import time

import numpy as np
import torch

from bench.step import device_name
from eval.search import nearest
from util.metrics import memory_in_use

ROWS_AT_A_TIME = 65536


def random_features(count: int, dim: int, seed: int) -> torch.Tensor:
    """float32 [count, dim], of length 1."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.empty(count, dim)
    for part in features.split(ROWS_AT_A_TIME):
        part.normal_(generator=generator)
        part /= part.norm(dim=1, keepdim=True)
    return features


def brute_force(bank: torch.Tensor, query: torch.Tensor, k: int) -> np.ndarray:
    """Rows of the k largest inner products, in float64."""
    query = query.double().numpy()
    products = [part.double().numpy() @ query for part in bank.split(ROWS_AT_A_TIME)]
    return np.argsort(-np.concatenate(products), kind="stable")[:k]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=int, default=1_280_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--neighbours", type=int, default=200)
    parser.add_argument("--checked", type=int, default=10, help="queries compared with every row")
    parser.add_argument("--threads", type=int, help="of the CPU")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    bank = random_features(options.bank, options.dim, seed=0)
    queries = random_features(options.queries, options.dim, seed=1)
    start = time.perf_counter()
    found = nearest(bank, queries, options.neighbours, device)
    seconds = time.perf_counter() - start
    memory = memory_in_use(device)
    equal = sum(
        np.array_equal(
            found.indices[number], brute_force(bank, queries[number], options.neighbours)
        )
        for number in range(options.checked)
    )
    print(
        f"{options.bank} x {options.dim} features, {options.queries} queries, "
        f"{options.neighbours} neighbours, {torch.get_num_threads()} threads of "
        f"{device_name(device)}: {seconds:.0f} s, {memory:.2f} GB at most, "
        f"{equal} of {options.checked} answers equal to brute force"
    )
    raise SystemExit(equal != options.checked)


if __name__ == "__main__":
    main()
