"""Do patch tokens tell the parts of an image apart? On data sets with masks.

method=unsupervised: the patches of each image are clustered into n segments; mIoU after the best
assignment of segments to the labels of the mask, and ARI, both averaged over images.
method=linear: a linear classifier of single patches, trained on the frozen tokens; mIoU over the
data set.
method=knn: the nearest patches of the training images vote on each patch that shows one class.

python launcher.py --config-name=segmentation pretrained=checkpoints/demo dataset=textures
"""

import math
from collections.abc import Iterator
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import AdamW

from data.base import DataError
from data.loader import epoch_order
from data.masks import IGNORE, MaskedImages, WithMasks
from data.transforms import MaskTransform
from eval import metrics
from eval.backbone import Tokens
from eval.common import EvalRun, run_evaluation
from eval.features import Features, unit_length
from eval.metrics import CLASSES
from eval.nn import QUERIES, check_bank, nearest, vote
from launch.command import run_worker
from launch.config import ConfigError
from models.views import extract_patches
from util.distributed import Ranks, all_reduce, broadcast_object, gather_objects, on_main
from util.loaders import eval_loader, open_split
from util.streams import Stream, generator

Batch = tuple[Tokens, np.ndarray]  # on the device, and masks uint8 [B, H, W]
Grid = tuple[int, int]
SEEN = {"tokens": "patch tokens", "pixels": "raw pixels of patches"}


def main(cfg: DictConfig) -> None:
    run_evaluation(cfg, "segmentation", evaluate)


def evaluate(run: EvalRun) -> None:
    methods = {"unsupervised": cluster_images, "linear": linear_head, "knn": vote_on_patches}
    methods[run.cfg.method](run, masked_data(run.cfg, "eval"))


def masked_data(cfg: DictConfig, split: str) -> MaskedImages:
    dataset = open_split(cfg, split)
    if not isinstance(dataset, MaskedImages):
        raise DataError(f"dataset={cfg.dataset.name} has no masks: expected textures, masks, voc")
    return dataset


@torch.inference_mode()
def token_batches(run: EvalRun, dataset: MaskedImages, what: str) -> Iterator[Batch]:
    """This process's part, in order."""
    backbone = run.backbone
    transform = MaskTransform(backbone.image_side, run.cfg.dataset.crop_ratio)
    most = run.cfg.max_bad_images
    loader = eval_loader(run.cfg, run.ranks, WithMasks(dataset), transform, max_bad_images=most)
    loader.bad_images = run.bad_images[dataset]
    for batch in run.batches(loader, what):
        images, masks = batch.images[:, :3], batch.images[:, 3].cpu().numpy()
        if run.cfg.features == "pixels":
            patches = extract_patches(run.normalised(images), backbone.patch_size)
            tokens = Tokens(None, patches, backbone.grid_of(images))
        else:
            tokens = run.tokens(images)
        yield tokens._replace(patches=tokens.patches.float()), masks


def cluster_images(run: EvalRun, dataset: MaskedImages) -> None:
    cfg = run.cfg
    scores = []  # of each image: [number of labels in its mask, mIoU, ARI, mIoU, ARI, ...]
    for tokens, masks in token_batches(run, dataset, "batches clustered:"):
        centre = tokens.patches.mean(dim=1, keepdim=True) if cfg.centre else 0
        patches = F.normalize(tokens.patches - centre, dim=-1).cpu().numpy()
        for vectors, mask in zip(patches, masks, strict=True):
            scores.append(score_image(cfg, vectors, tokens.grid, mask))
    scores = [score for part in gather_objects(scores, run.ranks) for score in part]
    # One class is one segment, which is no achievement.
    least = 2 if "truth" in cfg.segments else 1
    scored = [score for score in scores if score[0] >= least]
    if not any(score[0] > 1 for score in scored):
        valid = f"values such as 0 and 1 ({IGNORE} marks pixels without a class)"
        raise DataError(f"none of the {len(scores)} masks holds two classes: expected {valid}")
    names = [f"{measure}_{count}" for count in cfg.segments for measure in ("miou", "ari")]
    _, *columns = zip(*scored, strict=True)
    results = {name: 100 * fmean(values) for name, values in zip(names, columns, strict=True)}
    where = "neighbouring" if cfg.clustering.connected else "any"
    centred = "minus their mean in the image, " if cfg.centre else ""
    run.finish(
        results,
        protocol=f"unsupervised, {SEEN[cfg.features]}, {centred}agglomerative clustering of "
        f"{where} patches of one image ({cfg.clustering.linkage} linkage, {cfg.clustering.metric} "
        f"distance), n segments in miou_n and ari_n (truth: as many as the mask has classes), "
        f"means over images with {least} or more classes, percent",
        images=len(scored),
    )


def score_image(cfg: DictConfig, vectors: np.ndarray, grid: Grid, mask: np.ndarray) -> list[float]:
    """vectors [L, D], mask [H, W]"""
    classes = len(np.unique(mask[mask != IGNORE]))
    if classes == 0:
        return [0]
    scores = []
    for count in cfg.segments:
        count = classes if count == "truth" else count
        segments = cluster(cfg, vectors, grid, count).reshape(grid)
        segments = to_pixels(segments, mask.shape)
        scores.append(metrics.matched_miou(mask, segments))
        scores.append(metrics.adjusted_rand_index(mask, segments))
    return [classes, *scores]


def cluster(cfg: DictConfig, vectors: np.ndarray, grid: Grid, count: int) -> np.ndarray:
    """vectors [L, D] of length 1 -> the segment of each, int64 [L]"""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.feature_extraction.image import grid_to_graph

    if count > len(vectors):
        raise ConfigError(f"segments: {count} of {len(vectors)} patches; expected 1 to that number")
    # Blank patches of raw pixels may be all zero, which has no direction: they get a common one.
    blank = ~vectors.any(axis=1)
    vectors = np.where(blank[:, None], vectors.shape[1] ** -0.5, vectors)
    how = {"metric": cfg.clustering.metric, "linkage": cfg.clustering.linkage}
    neighbours = grid_to_graph(*grid) if cfg.clustering.connected else None
    return AgglomerativeClustering(count, connectivity=neighbours, **how).fit_predict(vectors)


def to_pixels(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[rows, columns] -> [H, W]: each pixel takes the value of its patch."""
    rows = np.arange(size[0]) * values.shape[0] // size[0]
    columns = np.arange(size[1]) * values.shape[1] // size[1]
    return values[rows[:, None], columns]


def vote_on_patches(run: EvalRun, dataset: MaskedImages) -> None:
    cfg, ranks = run.cfg, run.ranks
    batches = token_batches(run, training_images(cfg, dataset), "training batches encoded:")
    parts = gather_to_first([pure_patches(*batch) for batch in batches], ranks)
    bank, centre = broadcast_object(build_bank(cfg, parts) if ranks.is_main else None, ranks)
    check_bank(max(cfg.neighbours), len(bank.labels), "training patches of one class")
    classes = int(bank.labels.max()) + 1
    hits = torch.zeros(1 + len(cfg.neighbours), dtype=torch.int64)  # of each k; first, of all
    for batch in token_batches(run, dataset, "batches searched:"):
        vectors, labels = pure_patches(*batch)
        vectors = unit_length(vectors - centre)
        for rows in torch.arange(len(labels)).split(QUERIES):
            found = nearest(bank.features, vectors[rows], max(cfg.neighbours), ranks.device)
            hits[0] += len(rows)
            for column, k in enumerate(cfg.neighbours, start=1):
                voted = vote(found, bank.labels, k, cfg.temperature, classes)[:, 0]
                hits[column] += (voted == labels[rows]).sum()
    patches, *hits = all_reduce(hits.to(ranks.device)).tolist()
    if patches == 0:
        raise DataError(f"dataset={cfg.dataset.name}: no evaluation patch shows one class")
    run.finish(
        {f"accuracy_{k}": 100 * n / patches for k, n in zip(cfg.neighbours, hits, strict=True)},
        protocol=f"k-NN of {SEEN[cfg.features]} minus their mean in the bank, k neighbours in "
        f"accuracy_k, votes of exp(cosine / {cfg.temperature}), bank of {len(bank.labels)} "
        f"training patches; of {patches} patches with 90 % of their pixels of one class, percent",
        images=len(dataset) - len(run.bad_images[dataset]),
        extra={"bank": len(bank.labels), "patches": patches},
    )


def training_images(cfg: DictConfig, evaluated: MaskedImages) -> MaskedImages:
    dataset = masked_data(cfg, "train")
    if dataset.describe(0) == evaluated.describe(0):
        valid = "expected images/train/ and images/val/, but both splits are the same images"
        raise DataError(f"method={cfg.method}: {valid}")
    return dataset


def pure_patches(tokens: Tokens, masks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Those with 90 % of their pixels of one class, [N, D], and that class, [N]; on the CPU."""
    pixels, labels = class_counts(torch.from_numpy(masks), tokens.grid, CLASSES).max(dim=-1)
    pure = 10 * pixels >= 9 * (masks[0].size // pixels.shape[1])
    return tokens.patches.cpu()[pure], labels[pure]


def build_bank(cfg: DictConfig, parts: list[tuple[Tensor, Tensor]]) -> tuple[Features, Tensor]:
    """What votes, of length 1 after the mean is taken off; and the mean."""
    vectors, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if cfg.bank_patches is not None and cfg.bank_patches < len(labels):
        drawn = generator(Stream.BANK, cfg.seed).permutation(len(labels))[: cfg.bank_patches]
        vectors, labels = vectors[np.sort(drawn)], labels[np.sort(drawn)]
    centre = vectors.mean(dim=0, dtype=torch.float64).float()
    return Features(unit_length(vectors - centre), labels), centre


def linear_head(run: EvalRun, dataset: MaskedImages) -> None:
    cfg = run.cfg
    train_set = training_images(cfg, dataset)
    batches = token_batches(run, train_set, "training batches encoded:")
    # What waits for its turn waits in the memory of the host.
    parts = [(tokens._replace(patches=tokens.patches.cpu()), masks) for tokens, masks in batches]
    trained = len(train_set) - len(run.bad_images[train_set])
    head = train_patch_head(run, parts)
    confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for tokens, masks in token_batches(run, dataset, "batches classified:"):
        for vectors, mask in zip(tokens.patches, masks, strict=True):
            with torch.inference_mode():  # the logits of the patches, interpolated
                logits = head(vectors).T.unflatten(1, tokens.grid)[None]
                logits = F.interpolate(logits, size=mask.shape, mode="bilinear")
            predicted = logits[0].argmax(dim=0).cpu().numpy()
            confusion += torch.from_numpy(metrics.confusion_matrix(mask, predicted))
    confusion = all_reduce(confusion.to(run.ranks.device)).cpu().numpy()
    if not confusion.any():
        raise DataError(f"dataset={cfg.dataset.name}: no pixel of the evaluation masks has a class")
    ious = metrics.class_ious(confusion)
    accuracy = np.trace(confusion) / confusion.sum()
    run.finish(
        {"miou": 100 * fmean(ious.values()), "pixel_accuracy": 100 * float(accuracy)},
        protocol=f"frozen linear head on {SEEN[cfg.features]}, {cfg.patch_head.epochs} epochs, "
        f"{trained} training images; mIoU over the classes of the evaluation masks, percent",
        images=len(dataset) - len(run.bad_images[dataset]),
        extra={"iou_of_class": {str(number): 100 * iou for number, iou in ious.items()}},
    )


class PatchHead(nn.Module):
    """Standardise each channel, then a linear layer that starts at zero."""

    def __init__(self, mean: Tensor, std: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(len(mean), classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., D] -> logits [..., classes]"""
        return self.linear((vectors - self.mean) / self.std)


def train_patch_head(run: EvalRun, parts: list[Batch]) -> PatchHead:
    """parts: the training tokens and masks of this process. -> the same head on all processes

    The first process trains it, on the tokens of all: the others wait, so that the number of
    processes changes nothing."""
    cfg, ranks = run.cfg, run.ranks
    parts = gather_to_first(parts, ranks)

    def train() -> PatchHead:
        patches = torch.cat([tokens.patches for tokens, _ in parts])
        masks = torch.cat([torch.from_numpy(masks) for _, masks in parts])
        tokens = Tokens(None, patches, parts[0][0].grid)
        parts.clear()
        labelled = masks[masks != IGNORE]
        if len(labelled) == 0:
            raise DataError("no pixel of the training masks has a class")
        head, optimizer = start(cfg, ranks, patches, classes=int(labelled.max()) + 1)
        for epoch in run.tracked(range(cfg.patch_head.epochs), "epochs of the head:"):
            train_epoch(cfg, head, optimizer, tokens, masks, epoch)
        return head.cpu()

    return on_main(train, ranks).to(ranks.device)


def start(cfg: DictConfig, ranks: Ranks, tokens: Tensor, classes: int) -> tuple[PatchHead, AdamW]:
    count = tokens.shape[0] * tokens.shape[1]
    total, squares = torch.zeros(2, tokens.shape[-1], dtype=torch.float64)
    for image in tokens:
        total += image.double().sum(dim=0)
        squares += image.double().square().sum(dim=0)
    average = total / count
    deviation = (squares / count - average.square()).clamp(min=0).sqrt()
    # A channel that never changes says nothing: leave it at zero.
    deviation = torch.where(deviation > 1e-6, deviation, 1)
    head = PatchHead(average.float(), deviation.float(), classes).to(ranks.device)
    # Each step sets its learning rate.
    return head, AdamW(head.parameters(), weight_decay=cfg.patch_head.weight_decay)


def train_epoch(
    cfg: DictConfig, head: PatchHead, optimizer: AdamW, tokens: Tokens, masks: Tensor, epoch: int
) -> None:
    """masks uint8 [N, H, W]"""
    device, classes = head.linear.weight.device, head.linear.out_features
    batches = epoch_order(len(masks), cfg.seed, epoch).split(cfg.patch_head.batch_images)
    for step, rows in enumerate(batches):
        done = (epoch + step / len(batches)) / cfg.patch_head.epochs
        for group in optimizer.param_groups:
            group["lr"] = cfg.patch_head.lr * 0.5 * (1 + math.cos(math.pi * done))
        counts = class_counts(masks[rows].to(device), tokens.grid, classes)
        logits = head(tokens.patches[rows].to(device))
        # Each pixel counts the same, whichever patch it lies in.
        loss = -(counts * F.log_softmax(logits, dim=-1)).sum() / counts.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def class_counts(masks: Tensor, grid: Grid, classes: int) -> Tensor:
    """uint8 [B, H, W] -> float [B, L, classes]: pixels of each class in each patch."""
    batch, height, width = masks.shape
    rows, columns = grid
    cells = masks.reshape(batch, rows, height // rows, columns, width // columns)
    cells = cells.transpose(2, 3).reshape(batch, rows * columns, -1).long()
    labelled = cells != IGNORE
    counts = torch.zeros(batch, rows * columns, classes, device=masks.device)
    return counts.scatter_add_(2, cells * labelled, labelled.float())


def gather_to_first(parts: list, ranks: Ranks) -> list:
    """The parts of all processes in the order of ranks, on the first one; none on the others. One
    part of each at a time, because what is sent is in memory several times. Empties `parts`."""
    if ranks.world_size == 1:
        return parts
    gathered = []
    for number in range(max(gather_objects(len(parts), ranks))):
        boxes = [None] * ranks.world_size if ranks.is_main else None
        dist.gather_object(parts[number] if number < len(parts) else None, boxes)
        gathered.append(boxes or [])
    parts.clear()
    return [part for own in zip(*gathered, strict=True) for part in own if part is not None]


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="segmentation")
