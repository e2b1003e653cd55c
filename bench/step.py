"""How fast is a training step? On noise, against matrix products of the same machine:

python -m bench.step encoder=vit_small batch_size=48 precision=bf16 plain=fp32
torchrun --nproc-per-node=2 -m bench.step encoder=vit_small batch_size=24    # several processes
python -m bench.step --config-name=demo rounds=3                             # any other config

A step has one micro-step here. Everything is measured in turns in one run, because machines get
faster and slower; the figures are medians of the rounds. The peak is that of the best of several
square matrix products in the same precision. plain: the precision of the same training step written
down in the plainest way, to compare with: softmax attention as matrices, the moving average and
AdamW parameter by parameter, the numbers read after each step. threads: of the CPU, per process.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine_pretrain import train_step
from launch.command import run_worker
from launch.config import ConfigError
from main_lmim import view_source
from models.views import Views
from util.build import AUTOCAST, Training, build_model, read_geometry
from util.distributed import Ranks, barrier, gather_objects, join_processes, leave_processes
from util.metrics import memory_in_use
from util.optim import parameter_groups
from util.precision import choose_precision, tune_for_cpu, write_out_attention

MATRIX_SIDES = {"cpu": (1024, 1536, 2048, 3072), "cuda": (4096, 8192, 12288, 16384)}
EPOCH = 10.0  # any, for the schedules


def build_training(cfg: DictConfig, ranks: Ranks, precision: str, tuned: bool = True) -> Training:
    torch.manual_seed(cfg.seed)
    with ranks.device:
        model = build_model(cfg)
    if tuned and ranks.device.type == "cpu":
        tune_for_cpu(model, precision)
    training = Training(cfg, model, ranks, precision, cfg.batch_size)
    if cfg.compile:
        training.compile()
    return training


def draw_images(cfg: DictConfig, device: torch.device) -> Tensor:
    """Noise: what an image shows does not change how long it takes. As bytes, as loaders give."""
    side = read_geometry(cfg).side
    return torch.randint(256, (cfg.batch_size, 3, side, side), dtype=torch.uint8, device=device)


def step_of(cfg: DictConfig, training: Training, ranks: Ranks) -> Callable[..., None]:
    """The engine's step, on the same noise with new views for each number."""
    images = repeat(draw_images(cfg, ranks.device))
    draw_views = view_source(cfg, ranks, read_geometry(cfg))

    def step(number: int = 0) -> None:
        train_step(training, images, draw_views, number, EPOCH)

    return step


def make_plain(training: Training, weight_decay: float) -> Training:
    """In place."""
    write_out_attention(training.model)
    groups = parameter_groups(training.model, weight_decay)
    training.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    return training


def plain_step(training: Training, images: Tensor, views: Views) -> list[float]:
    schedule = training.schedule
    for group in training.optimizer.param_groups:
        group["lr"] = schedule.learning_rate(EPOCH)
    momentum = schedule.target_momentum(EPOCH)
    online = dict(training.model.encoder.named_parameters())
    with torch.no_grad():
        for name, target in training.model.target_encoder.named_parameters():
            target.mul_(momentum).add_(online[name], alpha=1 - momentum)
    with training.autocast():
        latents = training.network(images, views)
    loss, metrics = training.objective(latents, schedule.similarity_goal(EPOCH))
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    return [number.item() for number in metrics]


def plain_formulation(cfg: DictConfig, ranks: Ranks, precision: str) -> Callable[[], list[float]]:
    """In bf16 it is autocast, nothing else."""
    if precision not in AUTOCAST or cfg.target.name != "ema" or cfg.sigreg:
        valid = f"{', '.join(AUTOCAST)}, with target=ema and sigreg=0"
        raise ConfigError(f"plain={precision}: expected {valid}")
    cfg = OmegaConf.merge(cfg, {"compile": False, "recompute": False})
    training = build_training(cfg, ranks, precision, tuned=False)
    make_plain(training, cfg.weight_decay)
    images = draw_images(cfg, ranks.device)
    draw_views = view_source(cfg, ranks, read_geometry(cfg))
    return lambda: plain_step(training, images, draw_views(0, 0, cfg.batch_size))


def matrix_products(precision: str, device: torch.device) -> dict[int, Callable]:
    """By side: what the peak is looked for among."""
    products = {}
    for side in MATRIX_SIDES[device.type]:
        matrices = torch.randn(2, side, side, device=device)
        left, right = matrices.to(AUTOCAST[precision] or torch.float32)
        products[side] = partial(torch.mm, left, right, out=torch.empty_like(left))
    return products


def flops_per_image(cfg: DictConfig) -> float:
    """Count all matrix products of a training step, forward and backward. Recomputing is not
    progress: the share of the peak counts what is needed."""
    cfg = OmegaConf.merge(cfg, {"recompute": False, "accum_iter": 1, "batch_size": 2})
    alone = Ranks(0, 1, torch.device("cpu"))
    training = Training(cfg, build_model(cfg), alone, "fp32", cfg.batch_size)
    write_out_attention(training.model)  # torch does not count its fused form on a CPU
    views = view_source(cfg, alone, read_geometry(cfg))(0, 0, cfg.batch_size)
    images = draw_images(cfg, alone.device)
    with FlopCounterMode(display=False) as counter:
        training.objective(training.network(images, views), 0.5)[0].backward()
    return counter.get_total_flops() / cfg.batch_size


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def measure_in_turns(
    actions: dict[str | int, Callable], rounds: int, ranks: Ranks
) -> dict[str | int, list[float]]:
    """-> for each action one time per round; the slowest process counts."""
    for action in [*actions.values()] * 2:
        action()  # compilation, first allocations
    seconds = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            barrier()
            seconds[name].append(max(gather_objects(seconds_of(action, ranks.device), ranks)))
    return seconds


def measure(cfg: DictConfig, ranks: Ranks, plain: str, rounds: int) -> dict:
    """plain: precision of the plain formulation to compare with; empty: do not."""
    cfg = OmegaConf.merge(cfg, {"accum_iter": 1})
    precision = choose_precision(cfg.precision, ranks.device)
    flops = flops_per_image(cfg)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    actions = {"step": step_of(cfg, build_training(cfg, ranks, precision), ranks)}
    actions["step"]()
    memory = memory_in_use(ranks.device)  # before anything else is built
    if plain:
        actions["plain"] = plain_formulation(cfg, ranks, plain)
    actions |= matrix_products(precision, ranks.device)
    seconds = measure_in_turns(actions, rounds, ranks)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sides = MATRIX_SIDES[ranks.device.type]
    peak = ranks.world_size * max(2 * side**3 / medians[side] for side in sides)
    images_per_second = cfg.batch_size * ranks.world_size / medians["step"]
    result = {
        "encoder": cfg.encoder.name,
        "batch_size": cfg.batch_size,
        "precision": precision,
        "processes": ranks.world_size,
        "threads": torch.get_num_threads(),
        "device": device_name(ranks.device),
        "torch": torch.__version__,
        "images_per_second": images_per_second,
        "gflop_per_image": flops / 1e9,
        "gflop_per_second": images_per_second * flops / 1e9,
        "peak_gflop_per_second": peak / 1e9,
        "share_of_peak": images_per_second * flops / peak,
        "memory_gb": memory,
        "spread": max(seconds["step"]) / min(seconds["step"]) - 1,
    }
    if plain:
        result["times_plain"] = median_ratio(seconds["plain"], seconds["step"])
    return result


def median_ratio(these: list[float], others: list[float]) -> float:
    """Of what was measured in the same rounds."""
    return statistics.median(a / b for a, b in zip(these, others, strict=True))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("model name"))


def run_bench(main: Callable, description: str, **own: int | str) -> NoReturn:
    """Run main(cfg, **own). own: its keys that no config has, with their defaults."""
    for text in sys.argv[1:]:
        name, _, value = text.partition("=")
        if name not in own:
            continue
        if isinstance(own[name], int) and not value.isdecimal():
            sys.exit(f"error: {text}: expected a whole number")
        own[name] = type(own[name])(value)
        sys.argv.remove(text)
    run_worker(partial(main, **own), description)


def show(result: dict) -> None:
    """As JSON, numbers to four digits."""
    rounded = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in result.items()
    }
    print(json.dumps(rounded, indent=2), flush=True)


def main(cfg: DictConfig, plain: str, rounds: int, threads: int) -> None:
    ranks = join_processes()
    if threads:
        torch.set_num_threads(threads)
    result = measure(cfg, ranks, plain, rounds)
    if ranks.is_main:
        show(result)
    leave_processes()


if __name__ == "__main__":
    run_bench(main, __doc__, plain="", rounds=7, threads=0)
