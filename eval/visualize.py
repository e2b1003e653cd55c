"""What a network tells apart: pictures of the patch tokens of each image.

clusters      agglomerative (Ward), of one image's tokens; finer levels divide the clusters of
              coarser ones, and their colours say so
t-SNE         of the same tokens, in the colours of the finest level
PCA           of the tokens of all images together, as red, green and blue: the same colour means
              the same everywhere
similarity    cosine to the token at `point`

The controls are the same network with random weights, and the raw pixels of the same patches.

python launcher.py --config-name=visualize pretrained=checkpoints/demo images=photos
"""

import shlex
import shutil
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import Tensor

from data.base import UNREADABLE, DataError
from data.files import given_images
from data.photographs import installed
from data.picture import Picture, crop_and_resize, size_of
from data.transforms import EvalTransform
from eval.backbone import BackboneError
from eval.common import EvalRun, load_for_all
from eval.pictures import Panel, draw, nested_clusters, nested_colours
from launch.command import run_worker
from launch.config import ConfigError, compose_config, flatten, quote
from models.views import extract_patches
from util.distributed import Ranks, join_processes, leave_processes
from util.files import write_json

MOST_PATCHES = 16384  # of one image: clustering keeps a distance for each pair, 1 GB
PERPLEXITY = 30
SAMPLES = "sklearn/datasets/images"  # two photographs


class Method(NamedTuple):
    """A network, or what it is compared with: a row of each figure."""

    name: str
    run: EvalRun
    is_pixels: bool

    @property
    def side(self) -> int:
        """Side of the images that the network was made for, in whole patches"""
        backbone = self.run.backbone
        return backbone.image_side // backbone.patch_size * backbone.patch_size


class View(NamedTuple):
    """What a method makes of an image."""

    image: Tensor  # uint8 [3, H, W], whole patches
    tokens: np.ndarray  # float32 [L, D]
    grid: tuple[int, int]  # rows, columns


def main(cfg: DictConfig) -> None:
    ranks = join_processes()
    methods = load_methods(cfg, ranks)
    if ranks.is_main:  # the others have nothing to do
        visualize(cfg, methods)
    leave_processes()


def load_methods(cfg: DictConfig, ranks: Ranks) -> list[Method]:
    """Load each network, followed by its controls."""
    methods: dict[tuple, Method] = {}  # networks may have the same patches
    for source in cfg.pretrained if isinstance(cfg.pretrained, ListConfig) else [cfg.pretrained]:
        for is_random in (False, True) if "random" in cfg.controls else (False,):
            own = OmegaConf.merge(cfg, {"pretrained": source})
            own.random_init = cfg.random_init or is_random
            backbone = load_for_all(own, ranks).to(ranks.device)
            weights = f"{source}, random weights" if own.random_init else source
            run = EvalRun(own, ranks, backbone)
            name = f"{backbone.family} {backbone.name} ({weights})"
            methods[source, own.random_init] = Method(name, run, False)
        if "pixels" in cfg.controls:
            patch = backbone.patch_size
            pixels = Method(f"raw pixels of {patch} x {patch} patches", run, True)
            methods.setdefault((patch, pixels.side), pixels)
    return list(methods.values())


def visualize(cfg: DictConfig, methods: list[Method]) -> None:
    from sklearn.decomposition import PCA

    first = methods[0].run
    run = EvalRun(cfg, first.ranks, first.backbone)  # of all methods
    run.prepare()
    paths, views = see_all(cfg, run, methods)
    labels, lines, reports, colours = [], [], [], []
    for number, (method, own) in enumerate(zip(methods, zip(*views, strict=True), strict=True)):
        # In double precision; its signs follow from the strongest weights.
        tokens = np.concatenate([view.tokens for view in own]).astype(np.float64)
        pca = PCA(n_components=3, svd_solver="covariance_eigh")
        scores = pca.fit_transform(tokens)
        low, high = np.percentile(scores, [1, 99], axis=0)
        rgb = ((scores - low) / np.maximum(high - low, 1e-9)).clip(0, 1)
        colours.append(np.split(rgb, np.cumsum([len(view.tokens) for view in own])))
        shares = [round(100 * share, 1) for share in pca.explained_variance_ratio_.tolist()]
        labels.append(f"{chr(ord('A') + number)}: {method.name}")
        explained = f"PCA explains {', '.join(map(str, shares))} %"
        lines.append(f"{labels[-1]}, {conditions(method)}; {explained}")
        run.say(f"visualize: {lines[-1]}")
        backbone = method.run.backbone.describe()
        reports.append({"name": method.name, "backbone": backbone, "pca_percent": shares})
    lines.append(
        f"Clusters: Ward, of one image's patch tokens. PCA: of those of all {len(paths)} images. "
        f"t-SNE: perplexity {PERPLEXITY}, max_iter {cfg.max_iter}, seed {cfg.seed}. Similarity: "
        f"cosine to the token at point {cfg.point}, as shares of width and height."
    )
    lines.append(command_of(cfg))
    folder, sheet, files = run.job / "results" / "pictures", {}, []
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    folder.mkdir(exist_ok=True)
    for index in run.tracked(range(len(paths)), "images drawn:"):
        path, seen = paths[index], zip(labels, views[index], colours, strict=True)
        rows = {label: show(cfg, view, own[index]) for label, view, own in seen}
        files.append(f"{index:03d}-{Path(path).stem}")
        draw(folder / files[-1], rows, [path, *lines])
        sheet[path] = {"input": rows[labels[0]]["input"]._replace(mark=None)}
        for label, own in rows.items():
            for name in (f"{cfg.clusters[-1]} clusters", "PCA"):
                sheet[path][f"{label[0]}: {name}"] = own[name]
    draw(folder / "all", sheet, lines)
    report: dict = {"command": lines[-1], "caption": lines, "methods": reports, "images": paths}
    report |= {"pictures": files, "left_out": run.count_left_out()}
    write_json(run.job / "results" / "visualize.json", report)
    made = f"{len(files)} pictures, and all on one sheet, as PNG and PDF in {folder}/"
    run.say(f"visualize: {made}{run.left_out_in_words()}")


def see_all(
    cfg: DictConfig, run: EvalRun, methods: list[Method]
) -> tuple[list[str], list[list[View]]]:
    """Encode all images that can be read: their paths, and what each method makes of each."""
    images = cfg.images or str(installed(SAMPLES))
    dataset = given_images(images, cfg.dataset.options.get("max_value"))
    run.bad_images[dataset] = set()  # which other evaluations do with its loader
    paths, views = [], []
    for index, path in enumerate(run.tracked(list(dataset.paths), "images encoded:")):
        try:
            picture = dataset.load(index)
        except DataError:
            raise
        except UNREADABLE:
            run.leave_out(dataset, [index])
            continue
        paths.append(path if cfg.images else Path(path).name)
        views.append([see(method, picture, paths[-1]) for method in methods])
    return paths, views


def prepare(method: Method, picture: Picture) -> Tensor:
    """Cut the crop of the evaluations out of an image; or keep the whole image, less what is no
    whole patch at its edges."""
    cfg, side, patch = method.run.cfg, method.side, method.run.backbone.patch_size
    if cfg.stride is None and cfg.upsample is None:
        return EvalTransform(side, cfg.dataset.crop_ratio)(picture)
    size = size_of(picture)
    shorter = max(min(size), side) if cfg.upsample is None else round(side * cfg.upsample)
    resized = EvalTransform(shorter, crop_ratio=1).resized(*size)
    image = crop_and_resize(picture, (0, 0, *size), *resized)
    width, height = (length // patch * patch for length in resized)
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    return image[:, top : top + height, left : left + width]


def conditions(method: Method) -> str:
    """Say what the tokens depend on besides the network."""
    cfg, backbone, side = method.run.cfg, method.run.backbone, method.side
    seen, how = f"central crop of {side} x {side} pixels (crop_ratio {cfg.dataset.crop_ratio})", ""
    if cfg.stride is not None or cfg.upsample is not None:
        scale = "as stored" if cfg.upsample is None else f"shorter side {side * cfg.upsample:.0f}"
        windows = f", mean of windows of {side} x {side} pixels every {cfg.stride}"
        seen = f"whole image ({scale})"
        how = ", positions resampled" if cfg.stride is None else windows
    if method.is_pixels:
        return seen
    norm = "with" if backbone.final_norm else "without"
    return f"layer {backbone.layer}, {norm} final norm, {seen}{how}"


@torch.inference_mode()
def see(method: Method, picture: Picture, path: str) -> View:
    cfg, run = method.run.cfg, method.run
    image = prepare(method, picture)
    patch = run.backbone.patch_size
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    least = max(3, cfg.clusters[-1])  # three components
    if not least <= rows * columns <= MOST_PATCHES:
        expected = f"{least} to {MOST_PATCHES} (see clusters= and upsample=)"
        raise ConfigError(f"{path} makes {rows} x {columns} patches: expected {expected}")
    batch = image[None].to(run.ranks.device)
    if method.is_pixels:
        tokens = extract_patches(run.normalised(batch), patch)[0]
    elif cfg.stride is not None:
        tokens = average_windows(method, batch[0]).flatten(0, 1)
    else:
        try:
            tokens = run.tokens(batch).patches[0]
        except AssertionError as error:  # how timm's models refuse a size
            raise BackboneError(f"upsample={cfg.upsample}: {method.name}: {error}") from error
    return View(image, tokens.float().cpu().numpy(), (rows, columns))


def average_windows(method: Method, image: Tensor) -> Tensor:
    """Average the tokens of each patch over all windows that it lies in. -> [rows, columns, D]"""
    run, patch, stride = method.run, method.run.backbone.patch_size, method.run.cfg.stride
    if stride % patch or stride > method.side:
        found = f"stride={stride} for {method.name}"
        raise ConfigError(f"{found}: expected a multiple of {patch}, at most {method.side}")
    cells = method.side // patch
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    # The last window lies at the edge, whatever the step.
    lasts, step = (rows - cells, columns - cells), stride // patch
    corners = list(product(*([*range(0, last, step), last] for last in lasts)))
    total = torch.zeros(rows, columns, run.backbone.embed_dim, device=image.device)
    count = torch.zeros(rows, columns, 1, device=image.device)
    windows = image.unfold(1, method.side, patch).unfold(2, method.side, patch)
    for first in range(0, len(corners), run.cfg.batch_size):
        part = corners[first : first + run.cfg.batch_size]
        tokens = run.tokens(torch.stack([windows[:, row, column] for row, column in part]))
        maps = tokens.patches.float().unflatten(1, (cells, cells))
        for (row, column), own in zip(part, maps, strict=True):
            total[row : row + cells, column : column + cells] += own
            count[row : row + cells, column : column + cells] += 1
    return total / count


def show(cfg: DictConfig, view: View, rgb: np.ndarray) -> dict[str, Panel]:
    """Make the panels of an image, by title and in the order of the figure."""
    panels = {"input": Panel(view.image.permute(1, 2, 0).numpy(), mark=cfg.point)}
    levels = nested_clusters(view.tokens, cfg.clusters)
    for count, colours in zip(cfg.clusters, nested_colours(levels), strict=True):
        panels[f"{count} clusters"] = Panel(colours.reshape(*view.grid, 3))
    if cfg.max_iter is not None:
        from sklearn.manifold import TSNE  # takes a second

        perplexity, seed = min(PERPLEXITY, (len(view.tokens) - 1) / 3), cfg.seed % 2**32
        tsne = TSNE(perplexity=perplexity, max_iter=cfg.max_iter, init="pca", random_state=seed)
        panels["t-SNE"] = Panel(colours, places=tsne.fit_transform(view.tokens))
    panels["PCA"] = Panel(rgb.reshape(*view.grid, 3))
    if cfg.point is not None:
        similar = similarity(view, cfg.point)
        note = f"{similar.min():.2f} to {similar.max():.2f}"
        panels["similarity to +"] = Panel(similar, mark=cfg.point, note=note)
    return panels


def similarity(view: View, point: list[float]) -> np.ndarray:
    """Compare all tokens with the one at the point: cosines [rows, columns]."""
    column, row = (min(int(at * n), n - 1) for at, n in zip(point, view.grid[::-1], strict=True))
    unit = F.normalize(torch.from_numpy(view.tokens), dim=1).reshape(*view.grid, -1)
    return (unit @ unit[row, column]).numpy()


def command_of(cfg: DictConfig) -> str:
    """Write the command that draws the same, with all that is not as shipped."""
    words = [f"dataset={cfg.dataset.name}"]
    shipped = flatten(OmegaConf.to_container(compose_config("visualize", words)))
    for key, value in flatten(OmegaConf.to_container(cfg)).items():
        if not key.startswith("env.") and value != shipped.get(key):
            if isinstance(value, list):
                value = f"[{','.join(quote(str(item)) for item in value)}]"
            words.append(f"{key}={'null' if value is None else value}")
    return shlex.join(["python", "launcher.py", "--config-name=visualize", *words])


if __name__ == "__main__":
    run_worker(main, description=__doc__, config_name="visualize")
