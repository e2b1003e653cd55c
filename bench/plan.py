"""What does a pre-training cost? On paper, for the published recipe and any change to it:

python -m bench.plan encoder=vit_large gpus=64 gpu=h100 batch_size=64 accum_iter=1 --json plan.json
python -m bench.plan --check           # the measured points of bench/machines.yaml, predicted

All keys of configs/lmim.yaml, and the planner's own: gpu, gpus, gpus_per_node, images (of the data
set), efficiency (share of the peak: replaces measured points, or the assumption of 0.4), bandwidth
(GB/s that a GPU sends in the all-reduce), images_per_core (images/s of one core of the loader).

Work is that of matrix products, two operations per multiplication; softmax, norms, GELU and the
optimiser are left out. Memory is what is held when a forward pass ends; left out are results inside
an operation, the CUDA context (about half a GiB) and what the allocator loses.
"""

import json
import math
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import yaml
from omegaconf import DictConfig, open_dict

from util.command import say_error
from util.config import ConfigError, compose_config, parse_override
from util.validate import POSITIVE, SHARE, Rule, check_config, one_of, or_null, whole

MACHINES = Path(__file__).with_name("machines.yaml")
INFONCE = "infonce_patches"  # the only loss with a matrix product
ASSUMED_EFFICIENCY = 0.4  # share of the peak
OWN_KEYS: dict[str, tuple[object, Rule | None]] = {  # default, and what is valid
    "gpu": ("a100", None),  # one of the machines
    "gpus": (8, whole(1)),
    "gpus_per_node": (8, whole(1)),
    "images": (1_281_167, whole(1)),
    "efficiency": (None, or_null(SHARE)),
    "bandwidth": (None, or_null(POSITIVE)),
    "images_per_core": (460, POSITIVE),  # bench/RESULTS.md
}


# --- the networks: parameters, work, memory -----------------------------------------------------


def product(tokens: int, inputs: int, outputs: int) -> int:
    """Operations of a linear layer."""
    return 2 * tokens * inputs * outputs


@dataclass(frozen=True)
class Blocks:
    """A stack of transformer blocks over `tokens` tokens per image. context: tokens more that each
    block of the cross-attention decoder looks at; 0: blocks without cross-attention."""

    dim: int
    depth: int
    heads: int
    tokens: int
    context: int = 0

    def matrices(self) -> int:
        """Numbers in those of one block: qkv, projection, MLP; q, k, v, projection."""
        return (16 if self.context else 12) * self.dim**2

    def parameters(self) -> int:
        """Of all blocks: with biases and norms."""
        return self.depth * (self.matrices() + (21 if self.context else 13) * self.dim)

    def flops(self) -> int:
        """Of one block: linear layers, then scores and weighted sums of all heads."""
        linear = product(self.tokens, self.dim, 12 * self.dim)
        if self.context:
            linear += product(self.tokens + self.context, self.dim, 2 * self.dim)
        return linear + 4 * self.tokens * (self.tokens + self.context) * self.dim

    def kept_bytes(self, low: int, fused: bool) -> int:
        """What autograd keeps of one block. low: bytes per number in matrix products.

        In fp32 the inputs of the norms and two numbers for each. In `low` the inputs of qkv,
        projection, fc1 (1 each), GELU and fc2 (4 each), and q, k, v (3). Fused attention keeps one
        fp32 number for a row of weights, else all of them. Cross-attention: another norm, the
        inputs of q and projection, and q; of the context k, v and their input.
        """
        weights = (8 if self.context else 4) if fused else low * (self.tokens + self.context)
        per_token = (2 * 4 + 14 * low) * self.dim + 2 * 8 + self.heads * weights
        if self.context:
            per_token += (4 + 3 * low) * self.dim + 8
        return self.tokens * per_token + self.context * (3 * low * self.dim + 8)


class Model:
    """The networks of a composed config in numbers. Work and memory are per image."""

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.patches, self.visible = cfg.grid_size**2, cfg.num_vis
        self.masked = self.patches - self.visible
        self.dim, self.decoder_dim = cfg.encoder.embed_dim, cfg.decoder_embed_dim
        self.patch_dim = 3 * cfg.patch_size**2
        depth, heads = cfg.encoder.depth, cfg.encoder.num_heads
        self.encoder = Blocks(self.dim, depth, heads, 1 + self.visible)  # 1: the class token
        aimed_at = self.masked if cfg.mask_target else self.patches
        self.target = Blocks(self.dim, cfg.target_depth or depth, heads, 1 + aimed_at)
        cross = cfg.decoder.name == "cross"
        tokens, context = 1 + (self.masked if cross else self.patches), cross * (1 + self.visible)
        depth, heads = cfg.decoder_depth, cfg.decoder_num_heads
        self.decoder = Blocks(self.decoder_dim, depth, heads, tokens, context)
        widths = [self.dim, *[cfg.proj.mlp_dim] * (cfg.proj.mlp_depth - 1), self.dim]
        self.head = list(pairwise(widths))[: cfg.proj.mlp_depth]  # inputs, outputs of each layer
        self.target_learns = cfg.target.name == "joint"
        self.learning = [self.encoder, *[self.target] * self.target_learns, self.decoder]
        tokens = (2 if cross else 1) + (0 if cfg.freeze_pe else 1 + self.patches)  # positions
        decoder = (2 * self.dim + 1 + tokens + 2) * self.decoder_dim + self.dim
        self.trained = self.encoder_parameters(self.encoder) + self.decoder.parameters() + decoder
        has_copy = cfg.target.name in ("ema", "frozen")
        self.copied = self.encoder_parameters(self.target) if has_copy else 0
        self.work = sum(self.flops().values())

    def encoder_parameters(self, blocks: Blocks) -> int:
        tokens = 1 if self.cfg.freeze_pe else 2 + self.patches  # class token, table
        head = sum(inputs * outputs + 2 * outputs for inputs, outputs in self.head)
        return (self.patch_dim + 1 + tokens + 2) * self.dim + blocks.parameters() + head

    def encoder_flops(self, blocks: Blocks) -> int:
        head = sum(product(blocks.tokens, *layer) for layer in self.head)
        embedding = product(blocks.tokens - 1, self.patch_dim, self.dim)
        return embedding + blocks.depth * blocks.flops() + head

    def flops(self) -> dict[str, float]:
        """Of the parts of a step."""
        encoder, target = self.encoder_flops(self.encoder), self.encoder_flops(self.target)
        decoder = product(2 + self.patches, self.dim, self.decoder_dim)  # embedding and head
        decoder += self.decoder.depth * self.decoder.flops()
        affinity = cue = 0
        if self.cfg.avg_vis_mask_token:  # the products of positions are shared by a micro-step
            affinity = product(self.patches, self.decoder_dim, self.patches) / self.cfg.batch_size
            cue = product(self.masked, self.visible, self.decoder_dim)
        loss = product(self.masked, self.dim, self.masked) * (self.cfg.loss.name == INFONCE)
        # A product has two gradients, each as much work as itself. Patches, targets and positions
        # that are fixed want none.
        embedding = product(1, self.patch_dim, self.dim)
        backward = 2 * (encoder + decoder) - self.visible * embedding + cue + loss
        backward += 0 if self.cfg.freeze_pe else 2 * affinity + cue
        if self.target_learns:
            backward += 2 * target - (self.target.tokens - 1) * embedding + loss
        # torch repeats a block up to the last input that is needed: all but the MLP's second layer.
        again = sum(b.depth * (b.flops() - 8 * b.tokens * b.dim**2) for b in self.learning)
        return {
            "encoder": encoder,
            "target": target,
            "decoder": decoder + affinity + cue,
            "loss": loss,
            "backward": backward,
            "recomputed": self.cfg.recompute * again,
        }

    def encoder_bytes(self, blocks: Blocks, low: int, norm: int) -> int:
        """What autograd keeps around the blocks. norm: bytes per number in the head's norms."""
        kept = low * (blocks.tokens - 1) * self.patch_dim + blocks.tokens * (4 * self.dim + 8)
        for layer, (inputs, outputs) in enumerate(self.head, start=1):
            norms = 1 if layer == len(self.head) else 2  # its input, and its output for GELU
            kept += blocks.tokens * (low * inputs + norm * norms * outputs + 8)
        return kept

    def decoder_and_loss_bytes(self, low: int) -> int:
        """The same; of the loss, in fp32: predictions, centred, standardised, targets, logits."""
        visible, latents = 1 + self.visible, 4 * self.masked * self.dim
        kept = (1 + self.masked) * ((4 + low) * self.decoder_dim + 8) + low * visible * self.dim
        kept += 4 * self.decoder_dim * self.decoder.context
        if self.cfg.avg_vis_mask_token:
            kept += low * self.masked * self.visible
            if not self.cfg.freeze_pe:  # then the softmax has a gradient
                kept += 4 * self.masked * self.visible + low * visible * self.decoder_dim
        if self.cfg.loss.name == INFONCE:
            kept += (4 + 2 * self.target_learns) * latents + self.masked * (4 * self.masked + 24)
        else:
            kept += 2 * latents
        if self.cfg.avg_sim_coeff > 0:  # visible latents in fp32, where that is a copy
            kept += 8 * self.masked + (4 * self.dim * (low < 4) + 8) * self.visible
        return kept

    def memory(self, precision: str, on_cpu: bool) -> dict[str, int]:
        """Bytes in one process when the forward pass of a micro-step ends."""
        cfg, batch = self.cfg, self.cfg.batch_size
        low = 4 if precision == "fp32" else 2
        norm = low if on_cpu else 4  # autocast computes norms in fp32 on GPUs only
        fused = not on_cpu or low == 4  # see engine_pretrain.Training
        kept = sum(self.encoder_bytes(blocks, low, norm) for blocks in self.learning[:-1])
        kept += self.decoder_and_loss_bytes(low)
        # Autocast's copies of trained matrices, for the gradients of what they are multiplied by.
        copied = 2 * self.dim * self.decoder_dim + sum(math.prod(layer) for layer in self.head)
        again = 0
        if cfg.recompute:
            kept += sum(4 * blocks.depth * blocks.tokens * blocks.dim for blocks in self.learning)
            again = max(blocks.kept_bytes(low, fused) for blocks in self.learning)
        else:
            kept += sum(blocks.depth * blocks.kept_bytes(low, fused) for blocks in self.learning)
            copied += sum(b.depth * b.matrices() for b in (self.encoder, self.decoder))
        pixels = self.patches * (3 * (cfg.patch_size + cfg.patch_gap) ** 2 + self.patch_dim)
        return {
            "weights": 4 * self.trained,
            "target": 4 * self.copied,
            "gradients": 4 * self.trained,  # they are views of the all-reduce's buckets
            "moments": 8 * self.trained,
            "weight copies": 0 if precision == "fp32" else 2 * copied,
            "activations": batch * kept,
            "recomputed block": batch * again,
            "images and targets": 4 * batch * (pixels + self.target.tokens * self.dim),
        }


@dataclass(frozen=True)
class Point:
    """A measured speed of one GPU. settings: where it was not the published recipe."""

    machine: str
    encoder: str
    batch: int
    precision: str
    images_per_second: float
    date: str
    source: str
    settings: tuple[str, ...] = ()

    @cached_property
    def model(self) -> Model:
        overrides = [f"encoder={self.encoder}", f"batch_size={self.batch}", *self.settings]
        return Model(compose_config("lmim", overrides))


def read_machines(path: Path) -> tuple[dict, list[Point]]:
    try:
        contents = yaml.safe_load(path.read_text())
        machines = contents["machines"]
        points = [Point(**point) for point in contents["measured"]]
        for point in points:
            machines[point.machine]["tflops"][point.precision]  # each is known
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: valid is a file like bench/machines.yaml: {error}") from error
    return machines, points


def predict_speed(
    model: Model, kind: tuple[str, str], machines: dict, points: list[Point], efficiency=None
) -> tuple[float, str]:
    """Images/s of one GPU (kind: machine, precision) and where that comes from: a given share of
    the peak; else the most similar point, scaled by the work of an image; else an assumed share."""
    peak = machines[kind[0]]["tflops"][kind[1]]
    points = [point for point in points if (point.machine, point.precision) == kind]
    if efficiency or not points:
        share = efficiency or ASSUMED_EFFICIENCY
        return 1e12 * peak * share / model.work, f"ASSUMED: {share:.0%} of {peak:g} TFLOP/s"

    def distance(pair: tuple[Point, Model]) -> tuple[bool, float, float]:
        other = pair[1]
        ratios = other.work / model.work, other.cfg.batch_size / model.cfg.batch_size
        return other.cfg.compile != model.cfg.compile, *(abs(math.log(ratio)) for ratio in ratios)

    point, measured = min(((point, point.model) for point in points), key=distance)
    speed = point.images_per_second * measured.work / model.work
    return speed, f"from {point.encoder}, batch {point.batch}, measured {point.date}"


def check_points(machines: dict, points: list[Point]) -> Iterator[str]:
    """Each measured point beside what would be predicted without it."""
    for point in points:
        kind, speed = (point.machine, point.precision), point.images_per_second
        others = [other for other in points if other is not point]
        predicted, source = predict_speed(point.model, kind, machines, others)
        peak, _ = predict_speed(point.model, kind, machines, [], efficiency=1)
        yield (
            f"{' '.join(kind)} {point.encoder} batch {point.batch}: {speed:.4g} images/s, "
            f"{speed / peak:.1%} of the peak, {speed / predicted:.2f} of the prediction ({source})"
        )


# --- the plan -----------------------------------------------------------------------------------


def read_settings(overrides: list[str], machines: dict) -> tuple[DictConfig, dict]:
    """-> the composed config, and the planner's own keys"""
    own = {key: default for key, (default, _) in OWN_KEYS.items()}
    for key, text in ((text.partition("=")[0], text) for text in overrides):
        if key in OWN_KEYS:
            own[key] = parse_override(text).value()
            valid, holds = OWN_KEYS[key][1] or one_of(*machines)
            if not holds(own[key]):
                raise ConfigError(f"{text}: valid is {valid}")
    gpus, per_node = own["gpus"], own["gpus_per_node"]
    if gpus > per_node and gpus % per_node:
        raise ConfigError(f"gpus={gpus}: valid is 1 to gpus_per_node={per_node}, or a multiple")
    cfg = compose_config("lmim", [o for o in overrides if o.partition("=")[0] not in OWN_KEYS])
    with open_dict(cfg):
        del cfg.job_name  # there is no job whose folder could be checked
    check_config(cfg)
    types = list(machines[own["gpu"]]["tflops"])
    if cfg.precision == "auto":
        cfg.precision = types[0]
    if cfg.precision not in types:
        raise ConfigError(f"precision={cfg.precision}: {own['gpu']} has {', '.join(types)}")
    own["window"] = cfg.batch_size * cfg.accum_iter * gpus
    if own["window"] > own["images"]:
        raise ConfigError(f"images={own['images']}: valid is at least {own['window']}, one step's")
    return cfg, own


def make_plan(overrides: list[str], machines: dict, points: list[Point]) -> dict:
    """In bytes, seconds and operations; speeds per second."""
    cfg, own = read_settings(overrides, machines)
    model, machine = Model(cfg), machines[own["gpu"]]
    gpus, local_gpus = own["gpus"], min(own["gpus"], own["gpus_per_node"])
    kind = (own["gpu"], cfg.precision)
    speed, source = predict_speed(model, kind, machines, points, own["efficiency"])
    steps = cfg.epochs * (own["images"] // own["window"])
    step_seconds = cfg.batch_size * cfg.accum_iter / speed
    # Between nodes there are as many rings as a node has GPUs, each through its own adapter.
    to_nodes = min(machine["link"], machine["network"] * local_gpus)
    bandwidth = own["bandwidth"] or (machine["link"] if gpus == local_gpus else to_nodes)
    sent = 2 * (gpus - 1) / gpus * 4 * model.trained
    # Bytes of: the gradient's norm; AdamW, which reads four numbers and writes three; the average.
    updated = (4 + 28) * model.trained + 12 * model.copied * (cfg.target.name == "ema")
    checkpoint = 12 * model.trained + 4 * model.copied
    return {
        **{key: cfg[key] for key in ("precision", "epochs", "batch_size", "accum_iter")},
        **own,
        "encoder": cfg.encoder.name,
        "parameters": {"trained": model.trained, "target": model.copied},
        "flops_per_image": model.flops(),
        "images_per_second": {"gpu": speed, "node": local_gpus * speed, "all": gpus * speed},
        "source": source,
        "time": {"hours": steps * step_seconds / 3600, "steps": steps, "step": step_seconds},
        "memory": model.memory(cfg.precision, on_cpu=own["gpu"].startswith("cpu")),
        "memory_there": machine["memory"] * 2**30,
        "loader_cores": math.ceil(local_gpus * speed / own["images_per_core"]),
        "bandwidth": bandwidth,
        "all_reduce": {"bytes": sent, "seconds": sent / bandwidth / 1e9},
        "update_seconds": updated / machine["memory_bandwidth"] / 1e9,
        "checkpoint": {"bytes": checkpoint, "seconds": checkpoint / 1e9},
    }


def table(plan: dict) -> str:
    def parts(values: dict, unit: float) -> str:
        return ", ".join(f"{name} {value / unit:.1f}" for name, value in values.items() if value)

    def cost(seconds: float) -> str:
        return f"{seconds:.4f} s, {seconds / time['step']:.1%} of the step"

    flops, speed, time = (plan[key] for key in ("flops_per_image", "images_per_second", "time"))
    there, needed = plan["memory_there"] / 2**30, sum(plan["memory"].values()) / 2**30
    verdict = "" if needed < there else ", DOES NOT FIT"
    rows = {
        "plan": f"{plan['encoder']} on {plan['gpus']} x {plan['gpu']}, {plan['precision']}, "
        f"{plan['epochs']} epochs of {plan['images']:,} images",
        "images per step": f"{plan['window']:,} = {plan['gpus']} x {plan['batch_size']} x "
        f"{plan['accum_iter']} (the published recipe: 4,096)",
        "parameters": f"{parts(plan['parameters'], 1e6)} million",
        "GFLOP per image": f"{sum(flops.values()) / 1e9:.1f}: {parts(flops, 1e9)}",
        "images/s": f"{speed['all']:,.0f}, per GPU {speed['gpu']:,.0f} ({plan['source']})",
        "time": f"{time['hours']:,.1f} hours, {time['steps']:,} steps of {time['step']:.3f} s",
        "GiB per GPU": f"{needed:.1f} of {there:.0f}{verdict}: {parts(plan['memory'], 2**30)}",
        "loader": f"{speed['node']:,.0f} images/s per node, {plan['loader_cores']} cores at "
        f"{plan['images_per_core']} images/s (yours: python -m bench.loader)",
        "all-reduce": f"{plan['all_reduce']['bytes'] / 1e9:.2f} GB per GPU and step at "
        f"{plan['bandwidth']:g} GB/s: {cost(plan['all_reduce']['seconds'])} where nothing hides it",
        "update": f"optimiser and moving average: {cost(plan['update_seconds'])}",
        "checkpoint": f"{plan['checkpoint']['bytes'] / 1e9:.2f} GB, "
        f"{plan['checkpoint']['seconds']:.1f} s at 1 GB/s",
    }
    return "\n".join(f"{name:16} {text}" for name, text in rows.items())


def main(arguments: list[str] | None = None) -> int:
    """-> exit code"""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here as well")
    parser.add_argument("--machines", type=Path, metavar="FILE", default=MACHINES)
    parser.add_argument("--check", action="store_true", help="compare with the measured points")
    options = parser.parse_intermixed_args(arguments)
    try:
        machines, points = read_machines(options.machines)
        if options.check:
            print("\n".join(check_points(machines, points)) or f"no points in {options.machines}")
            return 0
        plan = make_plan(options.overrides, machines, points)
        print(table(plan))
        if options.json:
            options.json.write_text(json.dumps(plan, indent=2) + "\n")
    except (ConfigError, OSError) as error:
        say_error(error)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
