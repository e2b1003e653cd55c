"""Few-shot classification: ridge regression on k labelled images per class, in closed form.

Features have length 1, targets are one-hot, and the intercept is not regularised. The error of
leave-one-out predictions among the shots chooses the strength of the regulariser, without a look at
the evaluation images.
"""

from collections import ChainMap
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.base import DataError
from eval.common import EvalRun, count_classes, labelled_images, worker
from eval.features import Features, extract_labelled
from launch.command import run_worker
from util.distributed import gather_objects
from util.streams import Stream, generator


def evaluate(run: EvalRun) -> None:
    cfg, ranks = run.cfg, run.ranks
    images = labelled_images(run, "train", "eval")
    check_shots(images["train"].labels, max(cfg.shots))
    found = extract_labelled(run, images, cfg.pooling).values()
    train, evaluation = (part._replace(features=F.normalize(part.features)) for part in found)
    check_shots(train.labels.numpy(), max(cfg.shots))  # some may have been left out
    classes = count_classes(train.labels, evaluation.labels)

    # Each process takes some of the draws; every draw is computed by one process as by any other.
    tasks = [(shots, draw) for shots in cfg.shots for draw in range(cfg.draws)]
    own = {}
    for shots, draw in run.tracked(tasks[ranks.rank :: ranks.world_size], "draws:"):
        chosen = choose_shots(train.labels, shots, cfg.seed, draw)
        support = Features(train.features[chosen], train.labels[chosen])
        own[shots, draw] = ridge_accuracies(support, evaluation, classes, list(cfg.regularisers))
    accuracies = ChainMap(*gather_objects(own, ranks))
    results, details = {}, {}
    for shots in cfg.shots:
        draws = [accuracies[shots, draw] for draw in range(cfg.draws)]
        top1 = [draw["top1"] for draw in draws]
        summary = mean_and_spread(top1)
        results[f"top1/{shots}-shot"] = summary["mean"]
        results[f"spread/{shots}-shot"] = summary["spread"]
        by_strength = map(mean_and_spread, zip(*(draw["all"] for draw in draws), strict=True))
        strengths = [f"{strength:g}" for strength in cfg.regularisers]
        details[f"{shots}-shot"] = {
            "draws": top1,
            "chosen": [draw["chosen"] for draw in draws],
            "by_regulariser": dict(zip(strengths, by_strength, strict=True)),
        }
    run.finish(
        results,
        protocol=f"ridge regression on k images per class, mean and standard deviation over "
        f"{cfg.draws} draws; the regulariser is chosen by leave-one-out among the shots (one "
        f"shot: the middle one of {list(cfg.regularisers)})",
        images=len(evaluation.labels),
        extra={"few_shot": details},
    )


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """The standard deviation over draws, of one of them."""
    return {"mean": fmean(values), "spread": stdev(values) if len(values) > 1 else 0.0}


def check_shots(labels: np.ndarray, shots: int) -> None:
    present, counts = np.unique(labels, return_counts=True)
    fewest, place = counts.min(), counts.argmin()
    if fewest < shots:
        raise DataError(f"shots={shots}: class {present[place]} has only {fewest} training images")


def choose_shots(labels: Tensor, shots: int, seed: int, draw: int) -> Tensor:
    """Positions of `shots` images of each class. More shots contain the fewer."""
    order = generator(Stream.SHOTS, seed, draw).permutation(len(labels))
    shuffled = labels.numpy()[order]
    by_class = np.argsort(shuffled, kind="stable")
    first = np.searchsorted(shuffled[by_class], np.unique(shuffled))
    return torch.from_numpy(order[by_class[first[:, None] + np.arange(shots)]].flatten())


def ridge_accuracies(
    support: Features, evaluation: Features, classes: int, regularisers: list[float]
) -> dict[str, object]:
    """Percent of the evaluation images, for each regulariser and for the one that is chosen."""
    from sklearn.linear_model import Ridge, RidgeCV

    features = support.features.double().numpy()
    targets = F.one_hot(support.labels, classes).double().numpy()
    # Relative to the mean eigenvalue per image, so that a strength means the same for any backbone
    # and number of shots. Features that are all alike have none.
    unit = max(np.square(features - features.mean(axis=0)).sum() / len(features), 1e-12)
    fits = [Ridge(strength * unit).fit(features, targets) for strength in regularisers]
    queries, labels = evaluation.features.double().numpy(), evaluation.labels.numpy()
    predicted = (ridge.predict(queries).argmax(axis=1) for ridge in fits)
    percent = [float(100 * (found == labels).mean()) for found in predicted]
    # Where each class has one image, its class is gone when it is left out, and the middle one of
    # the list is taken.
    if len(targets) == support.labels.unique().numel():
        chosen = regularisers.index(sorted(regularisers)[len(regularisers) // 2])
    else:
        strengths = [ridge.alpha for ridge in fits]
        chosen = strengths.index(RidgeCV(strengths).fit(features, targets).alpha_)
    return {"top1": percent[chosen], "chosen": regularisers[chosen], "all": percent}


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="few_shot")
