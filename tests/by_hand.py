"""Pre-training written out by hand: from the configured values straight to a loop.

Parts that have tests of their own are used as they are: data sets, the networks, cutting patches.
What connects them is written here again (order, crops, normalisation, views, objective, schedules,
groups, moving average, accumulation, clipping, processes, evaluation points), and nothing that the
project's own wiring is made of is called.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data.datasets import build_dataset
from models.lmim import LatentMIM, Latents
from models.views import Views, extract_patches

# --- images and views ---------------------------------------------------------------------------


def images_of(keys: dict, split: str):
    prefix = "dataset.options."
    options = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
    return build_dataset(keys["dataset"], split, None, options)


def random_crop(image: Image.Image, keys: dict, epoch: int, index: int) -> Image.Image:
    rng = np.random.default_rng([1, keys["seed"], epoch, index])
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(keys["min_crop"], 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = rng.integers(width - crop_width + 1)
            top = rng.integers(height - crop_height + 1)
            break
    else:
        raise AssertionError("choose settings without crops that do not fit")
    side = keys["grid_size"] * (keys["patch_size"] + keys["patch_gap"])
    image = image.crop((left, top, left + crop_width, top + crop_height))
    image = image.resize((side, side), Image.Resampling.BICUBIC)
    if keys["dataset.flip"] and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def normalised(images: list[Image.Image], keys: dict) -> Tensor:
    """(pixel / 255 - mean) / std, as one product and one sum."""
    mean, std = (np.array(keys[f"dataset.{name}"])[:, None, None] for name in ("mean", "std"))
    scale, shift = (torch.tensor(v, dtype=torch.float32) for v in (1 / (255 * std), -mean / std))
    pixels = np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2)
    return torch.from_numpy(pixels) * scale + shift


def images_of_step(dataset, keys: dict, step: int, per_step: int) -> Tensor:
    """In the order of the epoch; processes and micro-steps take theirs one after the other."""
    epoch, place = divmod(step, len(dataset) // per_step)
    order = np.random.default_rng([2, keys["seed"], epoch]).permutation(len(dataset))
    chosen = order[place * per_step : (place + 1) * per_step]
    crops = [random_crop(dataset.load(int(i)), keys, epoch, int(i)) for i in chosen]
    return normalised(crops, keys)


def views_of_step(keys: dict, step: int, per_step: int) -> Views:
    counter = np.random.SeedSequence([3, keys["seed"], step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(counter[0]))
    grid, gap = keys["grid_size"], keys["patch_gap"]
    if keys["masks"] == "random":
        order = torch.rand(per_step, grid**2, generator=generator).argsort(dim=1)
    else:
        numbers = torch.rand(per_step, 5, generator=generator).tolist()
        order = torch.tensor([rectangle_order(keys, *own) for own in numbers])
    rows = columns = None
    if gap:
        rows, columns = torch.randint(gap, (2, per_step, grid, grid), generator=generator)
    return Views(order[:, : keys["num_vis"]], order[:, keys["num_vis"] :], rows, columns)


def rectangle_order(keys: dict, aspect, top, left, down, right) -> list[int]:
    """Cell by cell: a rectangle of visible ones (inverse), or of masked ones (block)."""
    side, num_vis = keys["grid_size"], keys["num_vis"]
    is_inverse, rolls = keys["masks"].startswith("inverse"), keys["masks"].endswith("roll")
    wanted = num_vis if is_inverse else side**2 - num_vis
    least, most = max(1 / 2, wanted / side**2), min(2, side**2 / (wanted + 1e-5))
    aspect = least * (most / least) ** aspect
    height, width = math.ceil((wanted * aspect) ** 0.5), math.ceil((wanted / aspect) ** 0.5)
    top, left = int(top * (side - height + 1)), int(left * (side - width + 1))
    cells = [(row, column) for row in range(side) for column in range(side)]
    inside = [c for c in cells if 0 <= c[0] - top < height and 0 <= c[1] - left < width]
    order = inside + [cell for cell in cells if cell not in inside]
    if rolls:
        down, right = int(down * side), int(right * side)
        order = [((row + down) % side, (column + right) % side) for row, column in order]
    ids = [row * side + column for row, column in order]
    return ids if is_inverse else ids[-num_vis:] + ids[:-num_vis]


# --- objective ----------------------------------------------------------------------------------


def similarity(tokens: Tensor) -> Tensor:
    mean_unit_vector = F.normalize(tokens, dim=-1).mean(dim=1)
    return mean_unit_vector.square().sum(dim=-1).mean()


def discrimination(keys: dict, predicted: Tensor, target: Tensor) -> Tensor:
    """Image by image."""
    units = {"image": list(predicted), "batch": [predicted.flatten(0, 1)], None: []}
    rows = [(u - u.mean(dim=0)) / (u.std(dim=0) + 1e-4) for u in units[keys["pred_unit"]]]
    predicted = F.normalize(torch.cat(rows).view_as(predicted) if rows else predicted, dim=-1)
    target, losses = F.normalize(target, dim=-1), []
    if keys["negatives"] == "batch":
        predicted, target = predicted.flatten(0, 1)[None], target.flatten(0, 1)[None]
    for own, candidates in zip(predicted, target, strict=True):
        cosines = own @ candidates.T
        alike = candidates @ candidates.T > (keys["same_target"] or 2)
        cosines = cosines.masked_fill(alike.fill_diagonal_(False), -math.inf)
        if (alike.sum(dim=1) < len(own) - 1).all():
            losses.append(F.cross_entropy(cosines / keys["tau"], torch.arange(len(own))))
    return 2 * keys["tau"] * sum(losses) / len(losses)


def prediction_loss(keys: dict, predicted: Tensor, target: Tensor) -> Tensor:
    name = keys["loss"]
    if name == "infonce_patches":
        return discrimination(keys, predicted, target)
    if name == "norm_l2":
        centred = target - target.mean(dim=-1, keepdim=True)
        target = centred / (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    if name == "cosine":
        return 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
    functions = {"norm_l2": F.mse_loss, "l2": F.mse_loss, "l1": F.l1_loss}
    if name == "smooth_l1":
        return F.smooth_l1_loss(predicted, target, beta=keys["loss_beta"])
    return functions[name](predicted, target)


def sigreg(keys: dict, step: int, visible: list[Tensor], own: int) -> Tensor:
    """Of the latents of all processes, with the gradient of one's own times their number."""
    counter = np.random.SeedSequence([10, keys["seed"], step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(counter[0]))
    width = keys["encoder.embed_dim"]
    directions = torch.randn(width, keys["sigreg_slices"], generator=generator)
    samples = torch.cat([v if p == own else v.detach() for p, v in enumerate(visible)])
    on_image = keys["sigreg_on"] == "image"
    samples = samples.mean(dim=1)[None] if on_image else samples.transpose(0, 1)
    projected, total = samples @ (directions / directions.norm(dim=0)), 0
    for knot in range(17):
        t = 3 * knot / 16
        normal, weight = math.exp(-(t**2) / 2), (3 if knot in (0, 16) else 6) / 16
        cosine, sine = (t * projected).cos().mean(dim=1), (t * projected).sin().mean(dim=1)
        total = total + weight * normal * ((cosine - normal) ** 2 + sine**2).mean()
    statistic = samples.shape[1] * total
    return statistic + (len(visible) - 1) * (statistic - statistic.detach())


def objective(keys: dict, latents: Latents, goal: float) -> tuple[Tensor, Tensor]:
    """-> the loss; loss and similarities of predictions, visible latents, targets"""
    predicted, target, visible = (part.float() for part in latents)
    loss = prediction_loss(keys, predicted, target)
    similarities = [similarity(part) for part in (predicted, visible, target)]
    if keys["avg_sim_coeff"]:
        goal = torch.tensor(goal)
        distance = (similarities[0] - goal) ** 2 + (similarities[1] - goal) ** 2
        loss = loss + keys["avg_sim_coeff"] * distance
    return loss, torch.stack([loss, *similarities]).detach()


def levels(keys: dict, images: int, processes: int) -> dict[str, float]:
    """What predictions that know nothing cost; SIGReg of latents that are all alike."""
    candidates = keys["grid_size"] ** 2 - keys["num_vis"]
    candidates *= images if keys["negatives"] == "batch" else 1
    width = {"pixels": 3 * keys["patch_size"] ** 2}.get(keys["target"], keys["encoder.embed_dim"])
    chance = {"infonce_patches": 2 * keys["tau"] * math.log(candidates)}
    chance |= {"norm_l2": (width - 1) / width, "cosine": 1}
    found = {"chance": chance[keys["loss"]]} if keys["loss"] in chance else {}
    if keys["sigreg"]:
        knots = [(3 * k / 16, (3 if k in (0, 16) else 6) / 16) for k in range(17)]
        alike = sum(w * math.exp(-t * t / 2) * (1 - math.exp(-t * t)) for t, w in knots)
        found["sigreg_collapsed"] = images * processes * alike
    return found


# --- networks and their updates -----------------------------------------------------------------


def build_model(keys: dict) -> LatentMIM:
    torch.manual_seed(keys["seed"])
    return LatentMIM(
        grid_size=keys["grid_size"],
        patch_size=keys["patch_size"],
        patch_gap=keys["patch_gap"],
        embed_dim=keys["encoder.embed_dim"],
        depth=keys["encoder.depth"],
        num_heads=keys["encoder.num_heads"],
        freeze_pe=keys["freeze_pe"],
        mlp_dim=keys["proj.mlp_dim"],
        mlp_depth=keys["proj.mlp_depth"],
        decoder=keys["decoder"],
        decoder_embed_dim=keys["decoder_embed_dim"],
        decoder_depth=keys["decoder_depth"],
        decoder_num_heads=keys["decoder_num_heads"],
        avg_vis_mask_token=keys["avg_vis_mask_token"],
        target=keys["target"],
        target_depth=keys["target_depth"],
        mask_target=keys["mask_target"],
        target_layers=keys["target_layers"],
        target_tap=keys["target_tap"],
        target_norm=keys["target_norm"],
        target_post_norm=keys["target_post_norm"],
        recompute=False,
    )


def build_optimiser(model: nn.Module, keys: dict) -> torch.optim.AdamW:
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1
            named = "bias" in name or "norm" in name or "embed" in name
            (decayed if is_matrix and not named else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": keys["weight_decay"]},
        {"params": others, "weight_decay": 0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def schedules(keys: dict, epoch: float, per_step: int) -> dict[str, float]:
    peak = keys["blr"] * per_step / 256
    floor, warmup = peak * keys["min_lr_frac"], keys["warmup_epochs"]
    rising = epoch / warmup if epoch < warmup else None
    falling = (1 + math.cos(math.pi * (epoch - warmup) / (keys["epochs"] - warmup))) / 2
    cosine = (1 + math.cos(math.pi * epoch / keys["epochs"])) / 2
    return {
        "lr": floor + (peak - floor) * (falling if rising is None else rising),
        "momentum": 1 - (1 - keys["target_mom"]) * cosine,
        "sim_goal": keys["sim_end"] + (keys["sim_init"] - keys["sim_end"]) * cosine,
    }


@torch.no_grad()
def move_target(model: LatentMIM, momentum: float) -> None:
    online = dict(model.encoder.named_parameters())
    for name, parameter in model.target_encoder.named_parameters():
        parameter.lerp_(online[name], 1 - momentum)


# --- the loop -----------------------------------------------------------------------------------


@dataclass
class ByHand:
    model: LatentMIM
    losses: list[dict] = field(default_factory=list)  # of each step, as in a log line
    accuracies: dict[int, float] = field(default_factory=dict)  # by epoch


def train(keys: dict, processes: int = 1, last_step: int | None = None) -> ByHand:
    """keys: flat names, as on the command line."""
    dataset = images_of(keys, "train")
    model = build_model(keys)
    run, optimiser = ByHand(model), build_optimiser(model, keys)
    share, parts = keys["batch_size"], processes * keys["accum_iter"]
    if keys["shrink_batch"]:
        share = min(share, len(dataset) // parts)
    per_step = share * parts
    steps_per_epoch = len(dataset) // per_step
    known = levels(keys, share, processes)
    total = steps_per_epoch * keys["epochs"] if last_step is None else last_step
    if keys["eval_at_start"]:
        run.accuracies[0] = nearest_neighbour_accuracy(model, keys)
    for step in range(total):
        now = schedules(keys, step / steps_per_epoch, per_step)
        for group in optimiser.param_groups:
            group["lr"] = now["lr"]
        if keys["target"] == "ema":
            move_target(model, now["momentum"])
        images = images_of_step(dataset, keys, step, per_step)
        views = views_of_step(keys, step, per_step)
        numbers = torch.zeros(5, dtype=torch.float64)
        gradients = [torch.zeros_like(p) for p in trained(optimiser)]
        for process in range(processes):
            for micro in range(keys["accum_iter"]):
                parts_of_micro = [
                    slice(first, first + share)
                    for first in range(micro * processes * share, per_step, share)
                ][:processes]
                latents = forward(model, keys, images, views, parts_of_micro[process])
                loss, found = objective(keys, latents, now["sim_goal"])
                statistic = torch.zeros(())
                if keys["sigreg"]:
                    visible = [forward(model, keys, images, views, p)[2] for p in parts_of_micro]
                    statistic = sigreg(keys, step, visible, process)
                loss = loss + keys["sigreg"] * statistic
                (loss / keys["accum_iter"]).backward()
                numbers += torch.stack([loss, *found[1:], statistic]).detach()
            for sum_of_all, parameter in zip(gradients, trained(optimiser), strict=True):
                sum_of_all += parameter.grad / processes
                parameter.grad = None
        for gradient, parameter in zip(gradients, trained(optimiser), strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(trained(optimiser), keys["clip_grad"] or math.inf)
        optimiser.step()
        optimiser.zero_grad()
        names = ("loss", "sim_pred", "sim_vis", "sim_trg", "sigreg")
        means = dict(zip(names, (numbers / parts).tolist(), strict=True))
        if not keys["sigreg"]:
            del means["sigreg"]
        run.losses.append({"step": step + 1, **means, "grad_norm": norm.item(), **now, **known})
        epoch, rest = divmod(step + 1, steps_per_epoch)
        is_due = keys["eval_freq"] and epoch % keys["eval_freq"] == 0
        if rest == 0 and keys["eval_freq"] and (is_due or epoch == keys["epochs"]):
            run.accuracies[epoch] = nearest_neighbour_accuracy(model, keys)
    return run


def forward(model: LatentMIM, keys: dict, images: Tensor, views: Views, own: slice) -> Latents:
    own_views = Views(*(part if part is None else part[own] for part in views))
    with torch.autocast("cpu", torch.bfloat16, enabled=keys["precision"] == "bf16"):
        return model(images[own], own_views)


def trained(optimiser: torch.optim.AdamW) -> list[nn.Parameter]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


@torch.no_grad()
def nearest_neighbour_accuracy(model: LatentMIM, keys: dict) -> float:
    """Percent of the evaluation images whose nearest other image has their label."""
    dataset = images_of(keys, "eval")
    side = keys["grid_size"] * keys["patch_size"]
    shorter = round(side / keys["dataset.crop_ratio"])
    edge = round((shorter - side) / 2)
    images = []
    for index in range(len(dataset)):
        image = dataset.load(index).resize((shorter, shorter), Image.Resampling.BICUBIC)
        images.append(image.crop((edge, edge, edge + side, edge + side)))
    patches = extract_patches(normalised(images, keys), keys["patch_size"])
    tokens = model.encoder.embed(patches) + model.encoder.pos_embed.pos_embeds[1:]
    cls_token = model.encoder.cls_token + model.encoder.pos_embed.pos_embeds[0]
    tokens = torch.cat([cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
    for block in model.encoder.blocks:
        tokens = block(tokens)
    features = F.normalize(tokens[:, 1:].mean(dim=1), dim=-1)
    cosines = features @ features.T
    nearest = cosines.fill_diagonal_(-1).argmax(dim=1)
    labels = torch.from_numpy(np.asarray(dataset.labels))
    return 100 * (labels[nearest] == labels).double().mean().item()
