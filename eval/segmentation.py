"""Do patch tokens tell the parts of an image apart? On data sets with masks.

method=unsupervised: the patches of each image are clustered into n segments; mIoU after the best
assignment of segments to the labels of the mask, and ARI, both averaged over images.
method=linear: a linear classifier of single patches, trained on the frozen tokens; mIoU over the
data set.
method=knn: the nearest patches of the training images vote on each patch that shows one class.

python launcher.py --config-name=segmentation pretrained=checkpoints/demo dataset=textures
"""

from collections.abc import Iterator
from statistics import fmean  # rounded once: the order of the values changes nothing

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW

from data.base import DataError
from data.loader import epoch_order
from data.masks import IGNORE, MaskedImages, WithMasks
from data.transforms import MaskTransform
from eval.backbone import Tokens
from eval.common import EvalRun, worker
from eval.features import Features
from eval.nn import QUERIES, check_bank, nearest, vote
from launch.command import run_worker
from launch.config import ConfigError
from models.views import extract_patches
from util.build import eval_loader, open_split
from util.distributed import Ranks, all_reduce, gather_objects, on_main
from util.optim import half_cosine
from util.streams import Stream, generator

Batch = tuple[Tokens, Tensor]  # on the device, and masks uint8 [B, H, W] on the CPU
Grid = tuple[int, int]  # rows, columns
CLASSES = 256  # as many values as a mask can hold
SEEN = {"tokens": "patch tokens", "pixels": "raw pixels of patches"}


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
    """Yield the tokens and masks of this process's part of the data set, in order."""
    backbone = run.backbone
    transform = MaskTransform(backbone.image_side, run.cfg.dataset.crop_ratio)
    most = run.cfg.max_bad_images
    loader = eval_loader(run.cfg, run.ranks, WithMasks(dataset), transform, max_bad_images=most)
    loader.bad_images = run.bad_images[dataset]
    for batch in run.batches(loader, what):
        images, masks = batch.images[:, :3], batch.images[:, 3].cpu()
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
        for vectors, mask in zip(patches, masks.numpy(), strict=True):
            scores.append(score_image(cfg, vectors, tokens.grid, mask))
    scores = [score for part in gather_objects(scores, run.ranks) for score in part]
    # One class is one segment, which is no achievement.
    least = 2 if "truth" in cfg.segments else 1
    scored = [score for score in scores if score[0] >= least]
    if not any(score[0] > 1 for score in scored):
        found = f"none of the {len(scores)} masks holds two classes"
        raise DataError(f"{found}: expected 0, 1, ... ({IGNORE} marks pixels without a class)")
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
    """Score the clusters of the patches of an image. vectors [L, D], mask [H, W]

    -> the number of classes in the mask; mIoU and ARI of each number of segments"""
    from sklearn.metrics import adjusted_rand_score

    labelled = mask != IGNORE
    truth = mask[labelled]
    classes = len(np.unique(truth))
    if classes == 0:
        return [0]
    scores: list[float] = [classes]
    for count in cfg.segments:
        segments = cluster(cfg, vectors, grid, classes if count == "truth" else count)
        picture = Image.fromarray(segments.reshape(grid).astype(np.int32))
        found = np.array(picture.resize(mask.shape[::-1], Image.Resampling.NEAREST))[labelled]
        scores += [matched_miou(truth, found), adjusted_rand_score(truth, found)]
    return scores


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


def cluster(cfg: DictConfig, vectors: np.ndarray, grid: Grid, count: int) -> np.ndarray:
    """Cluster the patches of an image: vectors [L, D] of length 1 -> the segment of each, [L]."""
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.feature_extraction.image import grid_to_graph

    if count > len(vectors):
        raise ConfigError(f"segments: {count} of {len(vectors)} patches; expected 1 to that number")
    # Blank patches of raw pixels may be all zero, which has no direction: they get a common one.
    blank = ~vectors.any(axis=1)
    vectors = np.where(blank[:, None], vectors.shape[1] ** -0.5, vectors)
    own = cfg.clustering
    near = grid_to_graph(*grid) if own.connected else None
    options = {"metric": own.metric, "linkage": own.linkage, "connectivity": near}
    return AgglomerativeClustering(count, **options).fit_predict(vectors)


def vote_on_patches(run: EvalRun, dataset: MaskedImages) -> None:
    cfg, ranks = run.cfg, run.ranks
    batches = token_batches(run, training_images(cfg, dataset), "training batches encoded:")
    parts = gather_to_first([pure_patches(*batch) for batch in batches], ranks)
    bank, centre = on_main(lambda: build_bank(cfg, parts), ranks)
    check_bank(max(cfg.neighbours), len(bank.labels), "training patches of one class")
    classes = int(bank.labels.max()) + 1
    hits = torch.zeros(1 + len(cfg.neighbours), dtype=torch.int64)  # patches, then hits of each k
    for batch in token_batches(run, dataset, "batches searched:"):
        vectors, labels = pure_patches(*batch)
        vectors = F.normalize(vectors - centre)
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


def pure_patches(tokens: Tokens, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Find the patches with 90 % of their pixels of one class: their vectors [N, D] and classes
    [N], on the CPU."""
    pixels, labels = class_counts(masks, tokens.grid, CLASSES).max(dim=-1)
    pure = 10 * pixels >= 9 * (masks[0].numel() // pixels.shape[1])
    return tokens.patches.cpu()[pure], labels[pure]


def build_bank(cfg: DictConfig, parts: list[tuple[Tensor, Tensor]]) -> tuple[Features, Tensor]:
    """Make the patches that vote, of length 1 after their mean is taken off; and that mean."""
    vectors, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if cfg.bank_patches is not None and cfg.bank_patches < len(labels):
        drawn = generator(Stream.BANK, cfg.seed).permutation(len(labels))[: cfg.bank_patches]
        vectors, labels = vectors[np.sort(drawn)], labels[np.sort(drawn)]
    centre = vectors.mean(dim=0, dtype=torch.float64).float()
    return Features(F.normalize(vectors - centre), labels), centre


def linear_head(run: EvalRun, dataset: MaskedImages) -> None:
    cfg, ranks = run.cfg, run.ranks
    train_set = training_images(cfg, dataset)
    batches = token_batches(run, train_set, "training batches encoded:")
    # What waits for its turn waits in the memory of the host.
    parts = [(tokens._replace(patches=tokens.patches.cpu()), masks) for tokens, masks in batches]
    trained = len(train_set) - len(run.bad_images[train_set])
    # The first process trains, on the tokens of all, and the others wait: so the number of
    # processes changes nothing.
    parts = gather_to_first(parts, ranks)
    head = on_main(lambda: train_patch_head(run, parts), ranks).to(ranks.device)
    pixels = torch.zeros(CLASSES**2, dtype=torch.int64)  # of each pair: true class, predicted one
    for tokens, masks in token_batches(run, dataset, "batches classified:"):
        for vectors, mask in zip(tokens.patches, masks, strict=True):
            with torch.inference_mode():  # the logits of the patches, interpolated
                logits = head(vectors).T.unflatten(1, tokens.grid)[None]
                logits = F.interpolate(logits, size=mask.shape, mode="bilinear")
            pairs = CLASSES * mask.long() + logits[0].argmax(dim=0).cpu()
            pixels += pairs[mask != IGNORE].bincount(minlength=len(pixels))
    confusion = all_reduce(pixels.to(ranks.device)).cpu().double().reshape(CLASSES, CLASSES)
    true, taken, hits = confusion.sum(dim=1), confusion.sum(dim=0), confusion.diagonal()
    if not true.any():
        raise DataError(f"dataset={cfg.dataset.name}: no pixel of the evaluation masks has a class")
    percent = 100 * hits / (true + taken - hits)
    ious = {str(n): percent[n].item() for n in true.nonzero().flatten().tolist()}
    accuracy = (hits.sum() / true.sum()).item()
    run.finish(
        {"miou": fmean(ious.values()), "pixel_accuracy": 100 * accuracy},
        protocol=f"frozen linear head on {SEEN[cfg.features]}, {cfg.patch_head.epochs} epochs, "
        f"{trained} training images; mIoU over the classes of the evaluation masks, percent",
        images=len(dataset) - len(run.bad_images[dataset]),
        extra={"iou_of_class": ious},
    )


class PatchHead(nn.Linear):
    """Standardise each channel, then a linear layer that starts at zero."""

    def __init__(self, patches: Tensor, classes: int) -> None:
        """Take mean and deviation from patches [N, L, D]."""
        std, mean = torch.std_mean(patches, dim=(0, 1), correction=0)
        super().__init__(len(mean), classes)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.register_buffer("mean", mean)
        # A channel that never changes says nothing: leave it at zero.
        self.register_buffer("std", torch.where(std > 1e-6, std, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        """[..., D] -> logits [..., classes]"""
        return super().forward((vectors - self.mean) / self.std)


def train_patch_head(run: EvalRun, parts: list[Batch]) -> PatchHead:
    """Train a head on the tokens and masks of all training images. Empties `parts`."""
    cfg, device = run.cfg, run.ranks.device
    patches = torch.cat([tokens.patches for tokens, _ in parts])  # [N, L, D]
    masks = torch.cat([masks for _, masks in parts])  # [N, H, W]
    grid = parts[0][0].grid
    parts.clear()
    labelled = masks[masks != IGNORE]
    if len(labelled) == 0:
        raise DataError("no pixel of the training masks has a class")
    classes, epochs = int(labelled.max()) + 1, cfg.patch_head.epochs
    head = PatchHead(patches, classes).to(device)
    optimizer = AdamW(head.parameters(), weight_decay=cfg.patch_head.weight_decay)
    for epoch in run.tracked(range(epochs), "epochs of the head:"):
        batches = epoch_order(len(masks), cfg.seed, epoch).split(cfg.patch_head.batch_images)
        for step, rows in enumerate(batches):
            height = half_cosine((epoch + step / len(batches)) / epochs)
            optimizer.param_groups[0]["lr"] = cfg.patch_head.lr * height
            counts = class_counts(masks[rows].to(device), grid, classes)
            logits = head(patches[rows].to(device))
            # Each pixel counts the same, whichever patch it lies in.
            loss = -(counts * F.log_softmax(logits, dim=-1)).sum() / counts.sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return head.cpu()


def class_counts(masks: Tensor, grid: Grid, classes: int) -> Tensor:
    """Count the pixels of each class in each patch: uint8 [B, H, W] -> float [B, L, classes]."""
    batch, height, width = masks.shape
    rows, columns = grid
    cells = masks.reshape(batch, rows, height // rows, columns, width // columns)
    cells = cells.transpose(2, 3).reshape(batch, rows * columns, -1).long()
    labelled = cells != IGNORE
    counts = torch.zeros(batch, rows * columns, classes, device=masks.device)
    return counts.scatter_add_(2, cells * labelled, labelled.float())


def gather_to_first(parts: list, ranks: Ranks) -> list:
    """Gather the parts of all processes, in the order of ranks, on the first one; none on the
    others. One part of each at a time, because what is sent is in memory several times."""
    own, gathered = iter(parts), []
    for _ in range(max(gather_objects(len(parts), ranks))):
        found = gather_objects(next(own, None), ranks)
        gathered.append(found if ranks.is_main else [])
    return [part for of_rank in zip(*gathered, strict=True) for part in of_rank if part is not None]


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="segmentation")
