"""How well segments agree with masks: matched mIoU per image. And the measures of DAVIS: region
similarity J and boundary accuracy F of one object in one frame, and their means over frames,
objects and sequences."""

import math
from statistics import fmean  # rounded once: the order of the values changes nothing

import numpy as np

BOUNDARY_SHARE = 0.008  # boundaries match within this part of the image's diagonal


def matched_miou(truth: np.ndarray, segments: np.ndarray) -> float:
    """Match each true label with the segment that makes the mean IoU largest, no segment twice. The
    mean is over the true labels; one that gets no segment has IoU 0. Both [N]: of labelled pixels.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(truth, segments)
    union = counts.sum(axis=1, keepdims=True) + counts.sum(axis=0, keepdims=True) - counts
    iou = counts / union
    rows, columns = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, columns].sum() / len(iou))


def region_similarity(truth: np.ndarray, predicted: np.ndarray) -> float:
    """J: intersection over union of two bool masks [H, W]; 1 where both are empty."""
    union = int((truth | predicted).sum())
    return int((truth & predicted).sum()) / union if union else 1.0


def boundary_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """F: harmonic mean of precision and recall of the boundary pixels of two bool masks [H, W].

    A boundary pixel is a hit if the other boundary passes within a disk of ceil(0.008 diagonals).
    """
    radius = math.ceil(BOUNDARY_SHARE * math.hypot(*truth.shape))
    true_boundary, predicted_boundary = boundary(truth), boundary(predicted)
    if not true_boundary.any() or not predicted_boundary.any():
        # Where one has no boundary, either its precision or its recall is 0.
        return float(not true_boundary.any() and not predicted_boundary.any())
    precision = share_within(predicted_boundary, true_boundary, radius)
    recall = share_within(true_boundary, predicted_boundary, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Mark the pixels of a bool mask that differ from the one to the right, below, or below and
    right of them; at the last row and column from those of these that exist."""
    extended = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = extended[:-1, 1:], extended[1:, :-1], extended[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def share_within(pixels: np.ndarray, others: np.ndarray, radius: int) -> float:
    """Return the share of the pixels that lie within a disk around one of the others."""
    from scipy.ndimage import distance_transform_edt

    # Only the surroundings of both matter.
    rows, columns = np.nonzero(pixels | others)
    window = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    distance = distance_transform_edt(~others[window])
    return int((distance[pixels[window]] <= radius).sum()) / int(pixels.sum())


def score_object(truth: np.ndarray, predicted: np.ndarray, void: np.ndarray) -> dict[str, float]:
    """Average J and F of an object over frames. All bool [T, H, W]; pixels of `void` count for
    neither mask.

    The caller leaves out the first frame, which is given, and the last, as the benchmark does."""
    truth, predicted = truth & ~void, predicted & ~void
    regions = list(map(region_similarity, truth, predicted))
    boundaries = list(map(boundary_accuracy, truth, predicted))
    return {
        "J": fmean(regions),
        "J_recall": fmean([value > 0.5 for value in regions]),
        "F": fmean(boundaries),
        "F_recall": fmean([value > 0.5 for value in boundaries]),
    }


def score_sequence(truth: np.ndarray, predicted: np.ndarray, void: int) -> dict[int, dict]:
    """Score each object of the first annotation: uint8 [T, H, W], of all frames."""
    objects = [n for n in np.unique(truth[0]).tolist() if n not in (0, void)]
    truth, predicted = truth[1:-1], predicted[1:-1]
    return {n: score_object(truth == n, predicted == n, truth == void) for n in objects}


def summarise(sequences: dict[str, dict[int, dict]]) -> dict[str, float]:
    """Compute the benchmark's numbers: means over all objects of all sequences; J&F is the mean of
    two."""
    objects = [scores for sequence in sequences.values() for scores in sequence.values()]
    summary = {name: fmean([scores[name] for scores in objects]) for name in objects[0]}
    return {"J&F": (summary["J"] + summary["F"]) / 2} | summary
