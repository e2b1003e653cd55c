"""How well segments agree with masks: matched mIoU and ARI per image, mIoU over a data set."""

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from data.masks import IGNORE

CLASSES = 256  # as many values as a mask can hold


def contingency(truth: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """int64 [true labels that occur, segments that occur]: pixels of each pair. Pixels that the
    mask leaves unlabelled are left out."""
    labelled = truth != IGNORE
    _, rows = np.unique(truth[labelled], return_inverse=True)
    _, columns = np.unique(segments[labelled], return_inverse=True)
    shape = (rows.max(initial=-1) + 1, columns.max(initial=-1) + 1)
    counts = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1])
    return counts.reshape(shape)


def matched_miou(counts: np.ndarray) -> float:
    """Each true label gets the segment that makes the mean IoU largest, no segment twice. The mean
    is over the true labels; one that gets no segment has IoU 0."""
    union = counts.sum(axis=1, keepdims=True) + counts.sum(axis=0, keepdims=True) - counts
    iou = counts / union
    rows, columns = linear_sum_assignment(iou, maximize=True)
    return float(iou[rows, columns].sum() / len(iou))


def adjusted_rand_index(truth: np.ndarray, segments: np.ndarray) -> float:
    """Pairs of labelled pixels that mask and segments treat alike, corrected for chance: 1 is the
    same partition, 0 what chance gives."""
    labelled = truth != IGNORE
    return float(adjusted_rand_score(truth[labelled], segments[labelled]))


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """int64 [CLASSES, CLASSES]: pixels of each true class (row) that were taken for each class."""
    labelled = truth != IGNORE
    codes = truth[labelled].astype(np.int64) * CLASSES + predicted[labelled]
    return np.bincount(codes, minlength=CLASSES**2).reshape(CLASSES, CLASSES)


def class_ious(confusion: np.ndarray) -> dict[int, float]:
    """IoU over a whole data set, of each class that its masks hold."""
    hits = np.diag(confusion)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    present = np.flatnonzero(true)
    iou = hits[present] / (true + predicted - hits)[present]
    return dict(zip(present.tolist(), iou.tolist(), strict=True))
