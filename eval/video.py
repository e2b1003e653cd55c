"""Label propagation through videos: DAVIS-2017, semi-supervised, without any training.

The objects of the first frame are given. Each patch of a later frame takes the labels of the
patches most similar to it in the first and in the last few frames. The measures are those of the
benchmark: region similarity J and boundary accuracy F of one object in one frame, and their means
over frames, objects and sequences.

python launcher.py --config-name=video pretrained=checkpoints/lmim-vit_base data_path=/path/to/DAVIS
"""

import math
from collections import ChainMap, deque
from collections.abc import Iterator
from statistics import fmean  # rounded once: the order of the values changes nothing

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from data.masks import IGNORE, Video, read_videos
from data.picture import to_tensor
from eval.common import EvalRun, worker
from launch.command import run_worker
from util.distributed import gather_objects

Size = tuple[int, int]
BOUNDARY_SHARE = 0.008  # boundaries match within this part of the image's diagonal


def evaluate(run: EvalRun) -> None:
    cfg, ranks = run.cfg, run.ranks
    videos = read_videos(cfg.data_path, cfg.video_split)
    mine = run.tracked(videos[ranks.rank :: ranks.world_size], "videos:")
    own = {video.name: evaluate_video(run, video) for video in mine}
    gathered = ChainMap(*gather_objects(own, ranks))
    scores = {video.name: gathered[video.name] for video in videos}
    run.finish(
        {name: 100 * value for name, value in summarise(scores).items()},
        protocol=f"label propagation, shorter side {cfg.frame_side}, first and "
        f"{cfg.previous_frames} previous frames, neighbourhood {cfg.neighbourhood}, top "
        f"{cfg.top_k}, temperature {cfg.temperature}; means over objects, percent",
        images=sum(len(video.frames) for video in videos),
        extra={
            "dataset": f"DAVIS-2017 {cfg.video_split}",
            "sequences": {name: summarise({name: score}) for name, score in scores.items()},
            "objects": scores,
        },
    )


def evaluate_video(run: EvalRun, video: Video) -> dict[int, dict]:
    """Follow the objects of a video. -> the scores of each"""
    # All annotations first: what is wrong with them is said before the long work.
    truth = video.objects()
    predicted = [truth[0], *propagate(run, video, truth[0])]
    if run.cfg.save_masks:
        folder = run.job / "results" / "masks" / video.name
        folder.mkdir(parents=True, exist_ok=True)
        for annotation, objects in zip(video.annotations, predicted, strict=True):
            image = Image.fromarray(objects)
            if palette := video.palette():
                image.putpalette(palette)
            image.save(folder / annotation.name)
    return score_sequence(truth, np.stack(predicted), IGNORE)


@torch.inference_mode()
def propagate(run: EvalRun, video: Video, given: np.ndarray) -> Iterator[np.ndarray]:
    """Follow the objects of the first frame, uint8 [H, W]: yield those of each later frame."""
    numbers = [0, *sorted(set(np.unique(given).tolist()) - {0, IGNORE})]
    frames = frame_tokens(run, video)
    first_tokens = next(frames)
    rows, columns = first_tokens.shape[:2]
    # The object at the middle of each patch, one-hot: [rows, columns, C].
    image = Image.fromarray(np.where(given == IGNORE, 0, given).astype(np.uint8))
    small = np.array(image.resize((columns, rows), Image.Resampling.NEAREST))
    first_labels = torch.from_numpy(small[..., None] == np.array(numbers)).to(first_tokens)
    previous = deque(maxlen=run.cfg.previous_frames)
    for tokens in frames:
        context = zip((first_tokens, first_labels), *previous, strict=True)
        contexts, known = map(torch.stack, context)
        labels = propagate_labels(tokens, contexts, known, run.cfg)
        previous.append((tokens, labels))
        yield pixel_objects(labels, numbers, run.backbone.patch_size, given.shape)


def frame_tokens(run: EvalRun, video: Video) -> Iterator[Tensor]:
    """Yield the tokens of one frame after the other: [rows, columns, D], of length 1 each, on the
    device."""
    cfg, max_value = run.cfg, run.cfg.dataset.options.get("max_value")
    batches = torch.arange(len(video.frames)).split(cfg.batch_size)
    for batch in run.tracked(batches, f"{video.name}, batches of frames:"):
        images = [video.frame(index, max_value) for index in batch.tolist()]
        size = frame_size(images[0].size, cfg.frame_side, run.backbone.patch_size)
        images = [to_tensor(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
        tokens = run.tokens(torch.stack(images).to(run.ranks.device))
        yield from F.normalize(tokens.patches.float(), dim=-1).unflatten(1, tokens.grid)


def frame_size(size: Size, shorter: int, patch_size: int) -> Size:
    """Choose width and height: the shorter side becomes `shorter`; then each the nearest multiple
    of the patch size."""
    scale = shorter / min(size)
    width, height = (max(1, round(side * scale / patch_size)) * patch_size for side in size)
    return width, height


def propagate_labels(tokens: Tensor, contexts: Tensor, known: Tensor, cfg: DictConfig) -> Tensor:
    """Label the patches of a frame: tokens [R, S, D], contexts [n, R, S, D] with their labels
    [n, R, S, C] -> [R, S, C].

    Each patch looks at the patches of all context frames at most `neighbourhood` rows and columns
    away; the top_k most similar ones (with all that equal the last of them) are averaged with
    weights exp(cosine / temperature)."""
    rows, columns = tokens.shape[:2]
    channels = known.shape[-1]
    place = torch.arange(columns, device=tokens.device)
    too_far = (place[:, None] - place).abs() > cfg.neighbourhood  # [S, S]
    result = torch.empty(rows, columns, channels, device=tokens.device)
    for row in range(rows):  # bounds the memory, and most rows are out of reach anyway
        reach = slice(max(0, row - cfg.neighbourhood), row + cfg.neighbourhood + 1)
        cosine = torch.einsum("sd,nrtd->snrt", tokens[row], contexts[:, reach])
        cosine = cosine.masked_fill(too_far[:, None, None, :], -torch.inf).flatten(1)
        nearest = cosine.topk(min(cfg.top_k, cosine.shape[1]), dim=1).values
        # Relative to the nearest one: a common factor, and no temperature is too low for exp.
        weights = ((cosine - nearest[:, :1]) / cfg.temperature).exp()
        weights = weights.where(cosine >= nearest[:, -1:], 0)
        weights = weights / weights.sum(dim=1, keepdim=True)
        result[row] = weights @ known[:, reach].reshape(-1, channels)
    return result


def pixel_objects(labels: Tensor, numbers: list[int], patch_size: int, size: Size) -> np.ndarray:
    """Find the object of each pixel of the original frame: labels [R, S, C] -> uint8 [H, W]."""
    maps = labels.permute(2, 0, 1)[None]
    maps = F.interpolate(maps, scale_factor=patch_size, mode="bilinear", align_corners=False)[0]
    # As the published numbers do: each object's map is stretched to 0..1 before they compete.
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    maps = torch.where(high > low, (maps - low) / (high - low), maps)
    winners = np.array(numbers, dtype=np.uint8)[maps.argmax(dim=0).cpu().numpy()]
    return np.array(Image.fromarray(winners).resize(size[::-1], Image.Resampling.NEAREST))


# --- the measures -------------------------------------------------------------------------------


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
    scores = {}
    for name, measure in (("J", region_similarity), ("F", boundary_accuracy)):
        values = list(map(measure, truth, predicted))
        scores |= {name: fmean(values), f"{name}_recall": fmean(value > 0.5 for value in values)}
    return scores


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


main = worker(evaluate)

if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="video")
