"""How fast is a training step? On synthetic images, against matrix products of the same machine:

python -m bench.step --encoder vit_small --batch 48 --precision bf16 --plain fp32
torchrun --nproc-per-node=2 -m bench.step --batch 24       # several processes
python -m bench.step --grid 7 14 28 --batch 16             # one row for each combination

Everything is measured in turns in one run, because machines get faster and slower; the figures are
medians. The peak is that of the best of several square matrix products in the same precision. The
plain formulation is the same training step written down in the plainest way: softmax attention as
matrices, the moving average and AdamW parameter by parameter, the numbers read after each step.
Imports only torch, timm, yaml and this project's networks and engine: it runs where Hydra is not.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine_pretrain import begin_step, end_step, micro_step
from models.views import Views, sample_views
from util.build import Training, build_model, read_geometry
from util.cpu import tune_for_cpu, write_out_attention
from util.distributed import Ranks, all_reduce, barrier, join_processes, leave_processes
from util.metrics import memory_in_use
from util.optim import parameter_groups

CONFIGS = Path(__file__).parents[1] / "configs"
MATRIX_SIDES = {"cpu": (1024, 1536, 2048, 3072), "cuda": (4096, 8192, 12288, 16384)}
MATRIX_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPOCH = 10.0  # any, for the schedules


def read_config(name: str) -> dict:
    """The file as it is, without what OmegaConf would compose or fill in."""
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


RECIPE = read_config("lmim")
for choice in RECIPE["defaults"]:
    for group in ("encoder", "decoder", "target", "loss", "dataset"):
        if group in choice:
            RECIPE[group] = read_config(f"{group}/{choice[group]}")
RECIPE["blr"] = float(RECIPE["blr"])  # PyYAML takes 1e-4 for a text
GRID = RECIPE["encoder"]["grid_size"]


@dataclass
class Setting:
    encoder: str
    batch: int
    grid: int
    precision: str
    compile: bool
    recompute: bool

    @property
    def visible(self) -> int:
        return max(1, round(RECIPE["num_vis"] * (self.grid / GRID) ** 2))


def recipe_of(setting: Setting) -> SimpleNamespace:
    """The published one, but for the setting."""
    encoder = read_config(f"encoder/{setting.encoder}") | {"grid_size": setting.grid}
    own = {"batch_size": setting.batch, "accum_iter": 1, "recompute": setting.recompute}
    keys = RECIPE | encoder | own | {"encoder": encoder, "num_vis": setting.visible}
    return json.loads(json.dumps(keys), object_hook=lambda section: SimpleNamespace(**section))


def build_training(setting: Setting, ranks: Ranks, tuned: bool = True) -> Training:
    cfg = recipe_of(setting)
    torch.manual_seed(0)
    model = build_model(cfg).to(ranks.device)
    if tuned and ranks.device.type == "cpu":
        tune_for_cpu(model, setting.precision)
    training = Training(cfg, model, ranks, setting.precision, cfg.batch_size)
    if setting.compile:
        training.compile()
    return training


def image_side(training: Training, setting: Setting) -> int:
    return setting.grid * (training.model.patch_size + training.model.patch_gap)


def draw_images(training: Training, setting: Setting) -> Tensor:
    """Noise: what an image shows does not change how long it takes. As bytes, as loaders give."""
    side = image_side(training, setting)
    sizes, about = (setting.batch, 3, side, side), {"dtype": torch.uint8, "device": training.device}
    return torch.randint(256, sizes, **about)


def view_source(setting: Setting, ranks: Ranks) -> Callable[[], Views]:
    """New views for each step, as in training."""
    generator = torch.Generator(ranks.device)
    sizes = (setting.batch, setting.grid, setting.visible, RECIPE["patch_gap"])
    return partial(sample_views, *sizes, generator)


def our_step(setting: Setting, ranks: Ranks) -> Callable[[], None]:
    training = build_training(setting, ranks)
    images, draw_views = draw_images(training, setting), view_source(setting, ranks)

    def step() -> None:
        begin_step(training, EPOCH)
        micro_step(training, images, draw_views(), last_of_step=True)
        end_step(training, 0)

    return step


def make_plain(training: Training) -> Training:
    """In place."""
    write_out_attention(training.model)
    groups = parameter_groups(training.model, RECIPE["weight_decay"])
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


def plain_formulation(setting: Setting, ranks: Ranks) -> Callable[[], list[float]]:
    training = make_plain(build_training(setting, ranks, tuned=False))
    images, draw_views = draw_images(training, setting), view_source(setting, ranks)
    return lambda: plain_step(training, images, draw_views())


def matrix_products(precision: str, device: torch.device) -> dict[str, tuple[int, Callable]]:
    """What the peak is looked for among. -> side and product by name"""
    products = {}
    for side in MATRIX_SIDES[device.type]:
        left, right = torch.randn(2, side, side, device=device).to(MATRIX_TYPES[precision])
        result = torch.empty_like(left)
        products[f"matrix {side}"] = side, partial(torch.mm, left, right, out=result)
    return products


def count_flops(setting: Setting) -> float:
    """Of one image. Recomputing is not progress: the share of the peak counts what is needed."""
    return flops_per_image(recipe_of(replace(setting, recompute=False)))


def flops_per_image(cfg) -> float:
    """All matrix products of a training step, forward and backward, by counting them."""
    model = build_model(cfg)
    write_out_attention(model)  # torch does not count its fused form on a CPU
    ranks = Ranks(0, 1, torch.device("cpu"))
    training = Training(cfg, model, ranks, "fp32", cfg.batch_size)
    geometry, images = read_geometry(cfg), 2
    sizes = (images, geometry.grid_size, geometry.num_vis, geometry.patch_gap)
    views = sample_views(*sizes, torch.Generator(), masks=cfg.masks)
    pixels = torch.rand(images, 3, geometry.side, geometry.side)
    with FlopCounterMode(display=False) as counter:
        training.objective(training.network(pixels, views), 0.5)[0].backward()
    return counter.get_total_flops() / images


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def measure_in_turns(
    actions: dict[str, Callable], rounds: int, ranks: Ranks
) -> dict[str, list[float]]:
    """-> for each action one time per round; the slowest process counts."""
    for action in [*actions.values()] * 2:
        action()  # compilation, first allocations
    seconds = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            barrier()
            mine = torch.tensor(seconds_of(action, ranks.device), device=ranks.device)
            seconds[name].append(float(all_reduce(mine, "max")))
    return seconds


def measure(setting: Setting, plain: str | None, rounds: int, ranks: Ranks) -> dict:
    """plain: precision of the plain formulation to compare with; None: do not."""
    flops = count_flops(setting)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    actions = {"step": our_step(setting, ranks)}
    actions["step"]()
    memory = memory_in_use(ranks.device)  # before anything else is built
    if plain is not None:
        # A plain formulation in bf16 is autocast, nothing else.
        other = replace(setting, precision=plain, compile=False, recompute=False)
        actions["plain"] = plain_formulation(other, ranks)
    products = matrix_products(setting.precision, ranks.device)
    actions |= {name: product for name, (_, product) in products.items()}
    seconds = measure_in_turns(actions, rounds, ranks)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    speeds = {name: 2 * side**3 / medians[name] for name, (side, _) in products.items()}
    peak_of = max(speeds, key=speeds.get)
    peak = speeds[peak_of] * ranks.world_size
    images_per_second = setting.batch * ranks.world_size / medians["step"]
    result = {
        **asdict(setting),
        "processes": ranks.world_size,
        "threads": torch.get_num_threads(),
        "device": device_name(ranks.device),
        "torch": torch.__version__,
        "images_per_second": images_per_second,
        "gflop_per_image": flops / 1e9,
        "gflop_per_second": images_per_second * flops / 1e9,
        "peak_gflop_per_second": peak / 1e9,
        "peak_of": peak_of,
        "share_of_peak": images_per_second * flops / peak,
        "memory_gb": memory,
        "spread": max(seconds["step"]) / min(seconds["step"]) - 1,
    }
    if plain is not None:
        result["plain_precision"] = plain
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


def show(result: dict) -> None:
    numbers = {name: f"{x:.3f}" if isinstance(x, float) else x for name, x in result.items()}
    print("  ".join(f"{name} {value}" for name, value in numbers.items()), flush=True)


def command_line(description: str) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=layout)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    encoders = sorted(path.stem for path in (CONFIGS / "encoder").glob("*.yaml"))
    parser.add_argument("--encoder", default="vit_small", choices=encoders)
    parser.add_argument("--precision", default="fp32", choices=MATRIX_TYPES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")


def setting_of(options: argparse.Namespace, batch: int, grid: int) -> Setting:
    given = {key: getattr(options, key) for key in ("encoder", "precision", "compile", "recompute")}
    return Setting(batch=batch, grid=grid, **given)


def main() -> None:
    parser = command_line(__doc__)
    add_training_options(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[48], help="images per process")
    parser.add_argument("--grid", type=int, nargs="+", default=[GRID], help="patches along a side")
    parser.add_argument("--plain", choices=MATRIX_TYPES, help="compare with the plain formulation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU, per process")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    ranks = join_processes()
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    for batch, grid in product(options.batch, options.grid):
        setting = setting_of(options, batch, grid)
        results.append(measure(setting, options.plain, options.rounds, ranks))
        if ranks.is_main:
            show(results[-1])
    if ranks.is_main and options.json is not None:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    leave_processes()


if __name__ == "__main__":
    main()
