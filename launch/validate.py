"""Checks of the composed configuration, before anything is built. One sentence for each mistake:
the key, its value, and what would be valid."""

import math
import os
import re
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from omegaconf import DictConfig, ListConfig, OmegaConf

from launch.config import (
    CONFIG_DIR,
    ConfigError,
    group_choices,
    job_directory,
    processes_per_node,
    shipped_keys,
)

Rule = tuple[str, Callable[[object], bool]]  # what is expected, in words and as a test
ABSENT = object()
MOST = 10**9  # of what has no natural bound: fits C's int
LONGEST_NAME = 199  # bytes, to which endings are added
MOST_CANDIDATES = 2**14  # of negatives=batch: their square are 1 GB in float32


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Infinity and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value) -> TypeGuard[str]:
    return isinstance(value, str) and value.strip() != ""


def is_module(value) -> bool:
    try:
        return is_text(value) and find_spec(value) is not None
    except (ImportError, ValueError):  # of the package around it
        return False


def is_list(value, holds: Callable[[object], bool], least: int = 0, most: float = math.inf) -> bool:
    items = isinstance(value, ListConfig) and all(map(holds, value))
    return items and least <= len(value) <= most


def is_choice(value, holds: Callable[[object], bool]) -> bool:
    """A list of at least one item, without repetitions."""
    return is_list(value, holds, 1) and len(value) == len(set(map(str, value)))


def number(least: float, most: float = MOST, kind: str = "number", holds=is_number) -> Rule:
    words = f"a {kind} from {least} to {'10**9' if most == MOST else most}"
    return words, lambda v: holds(v) and least <= v <= most


def whole(least: int, most: float = MOST) -> Rule:
    return number(least, most, "whole number", is_whole)


def list_of(words: str, holds: Callable[[object], bool], *lengths: int) -> Rule:
    """lengths: the least and the greatest, where they matter."""
    return f"a list of {words}", lambda v: is_list(v, holds, *lengths)


def or_null(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


def one_of(*names: str) -> Rule:
    return f"one of {', '.join(names)}", lambda v: v in names


def choice_of(group: str) -> Rule:
    return one_of(*group_choices(group, [CONFIG_DIR]))


def several_of(*names: str) -> Rule:
    words = f"a list of different ones of {', '.join(names)}"
    return words, lambda v: is_choice(v, lambda name: name in names)


POSITIVE: Rule = ("a number above 0", lambda v: is_number(v) and v > 0)
SHARE: Rule = ("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1)
YES_OR_NO: Rule = ("True or False", lambda v: isinstance(v, bool))
TEXT: Rule = ("a text that is not empty", is_text)
FOLDER_NAME: Rule = (
    f"the name of a folder inside output_dir, without '/', of at most {LONGEST_NAME} bytes",
    lambda v: (
        is_text(v) and not re.search(r"[/\0]|^\.\.?$", v) and len(os.fsencode(v)) <= LONGEST_NAME
    ),
)
MODULE: Rule = ("a Python module with main(cfg), such as main_lmim", is_module)
# Slurm's accounts and nodes may be plain numbers.
LABEL: Rule = ("a text or a whole number", lambda v: is_text(v) or is_whole(v))
SECTION: Rule = ("a section of keys", lambda v: isinstance(v, DictConfig))
PLAIN: Rule = ("a text, a number, True or False", lambda v: isinstance(v, str | int | float))
EVALUATIONS = (
    *("nn", "knn", "linear_probe", "few_shot", "collapse", "finetune"),
    *("patches_knn", "patches_linear", "clusters"),
)
RGB = list_of("three numbers (red, green, blue)", is_number, 3, 3)
RGB_POSITIVE = list_of("three numbers above 0 (red, green, blue)", POSITIVE[1], 3, 3)
TEXTS = list_of("texts, such as ['linear_probe.epochs=10']", is_text)
FOLDERS = list_of(
    "folders of jobs or globs of them, such as [checkpoints/demo,reference/*]", is_text
)
COUNTS = list_of("whole numbers of at least 1, such as [1,2]", whole(1)[1], 1)
LAYERS: Rule = (
    "top:K, such as top:6, or a list of different blocks counted from 0, such as [2,5]",
    lambda v: (is_text(v) and bool(re.fullmatch(r"top:[1-9]\d*", v))) or is_choice(v, whole(0)[1]),
)
RISING: Rule = (
    "a rising list of whole numbers from 2 to 12, such as [3,4,5]",
    lambda v: is_choice(v, whole(2, 12)[1]) and list(v) == sorted(v),
)
PLACE: Rule = (
    "a place in the picture as shares of its width and height from 0 to 1, such as [0.5,0.5]",
    lambda v: is_list(v, number(0, 1)[1], 2, 2),
)
BACKBONES: Rule = ("a text or a list of texts", lambda v: is_text(v) or is_choice(v, is_text))
CONTROLS: Rule = (
    "[], [random], [pixels] or [random,pixels]",
    lambda v: v == [] or is_choice(v, lambda name: name in ("random", "pixels")),
)
SEGMENTS = list_of(
    "whole numbers of at least 1, or truth, such as [2,truth]",
    lambda n: n == "truth" or whole(1)[1](n),
    1,
)
RATES: Rule = ("a list of different numbers above 0", lambda v: is_choice(v, POSITIVE[1]))
RAND_AUGMENT: Rule = (
    "a RandAugment of timm, such as rand-m9-mstd0.5-inc1",
    lambda v: is_text(v) and bool(re.fullmatch(r"rand(-(m|mstd|mmax|n|p|inc|t|w)\d+(\.\d+)?)*", v)),
)

# A rule, and the keys that it is for. Keys that are True or False in the shipped configs need none.
KEYS_OF_RULES: list[tuple[Rule, str]] = [
    (SECTION, "dataset.options env.slurm_extra env.nccl"),
    (MODULE, "worker"),
    (("True, False or changed", lambda v: v == "changed" or isinstance(v, bool)), "resume"),
    (TEXT, "output_dir title command page"),
    (or_null(TEXT), "data_path images dataset.options.index_folder env.gres env.python"),
    (or_null(TEXT), "pretrained pretrained_weights cache_dir note"),
    (TEXTS, "settings env.setup env.srun_args"),
    (or_null(TEXTS), "digits textures"),
    (several_of(*group_choices("experiment", [CONFIG_DIR])), "experiments"),
    (FOLDERS, "jobs apart"),
    (FOLDER_NAME, "job_name encoder.name video_split"),  # the encoder's is part of job_name
    (or_null(LABEL), "env.partition env.constraint env.nodelist env.exclude"),
    (or_null(LABEL), "env.account env.qos env.comment"),
    # Whole numbers.
    (whole(-1, 1000), "layer"),
    (whole(0, 1000), "patch_gap proj.mlp_depth previous_frames neighbourhood"),
    (whole(0), "max_bad_steps eval_freq watch_images env.max_restarts"),
    (whole(0, 2**63 - 1), "seed dataset.options.seed"),
    (or_null(whole(0, 1024)), "num_workers env.ngpu"),
    (whole(1, 1024), "env.tasks_per_node env.parallel"),
    (whole(1, 1000), "patch_size encoder.patch_size encoder.depth decoder_depth"),
    (whole(1, 10**5), "encoder.embed_dim encoder.num_heads decoder_embed_dim decoder_num_heads"),
    (whole(1, 10**6), "proj.mlp_dim frame_side"),
    (whole(1), "num_vis epochs batch_size accum_iter print_freq save_freq"),
    (whole(1), "env.world_size env.timeout env.signal_delay env.workers"),
    (whole(1), "env.array_parallelism dataset.options.train_images dataset.options.eval_images"),
    (whole(1), "sigreg_slices draws top_k patch_head.epochs patch_head.batch_images"),
    (or_null(whole(1, 10**5)), "image_side"),
    (or_null(whole(1)), "target_depth max_steps bank_patches stride"),
    (whole(2, 1000), "grid_size encoder.grid_size"),
    (whole(4), "probe_images"),
    (whole(8, 10**5), "dataset.options.image_size"),
    (COUNTS, "neighbours shots"),
    (SEGMENTS, "segments"),
    (RISING, "clusters"),
    (or_null(PLACE), "point"),
    (or_null(whole(250)), "max_iter"),
    # Other numbers.
    (number(-1, 1), "sim_init sim_end"),
    (or_null(number(-1, 1)), "same_target"),
    (number(0), "sigreg data_timeout avg_sim_coeff warmup_epochs weight_decay min_lr mixup cutmix"),
    (number(0), "patch_head.weight_decay"),
    (number(0, 1), "max_bad_images target_mom min_lr_frac erase"),
    (number(0, 0.99), "drop_path label_smoothing"),
    (POSITIVE, "loss_beta tau blr save_minutes temperature patch_head.lr"),
    (or_null(POSITIVE), "clip_grad dataset.options.max_value"),
    (or_null(number(1, 1000)), "upsample"),
    (or_null(number(0)), "env.mem"),
    (SHARE, "min_crop dataset.crop_ratio layer_decay"),
    (RATES, "blrs regularisers"),
    (RGB, "dataset.mean"),
    (RGB_POSITIVE, "dataset.std"),
    # Choices.
    (choice_of("decoder"), "decoder.name"),
    (choice_of("target"), "target.name"),
    (choice_of("loss"), "loss.name"),
    (one_of("random", "block", "block_roll", "inverse", "inverse_roll"), "masks"),
    (or_null(LAYERS), "target_layers"),
    (one_of("block", "mlp"), "target_tap"),
    (or_null(one_of("layer", "instance", "batch")), "target_norm target_post_norm"),
    (or_null(one_of("image", "batch")), "pred_unit"),
    (one_of("image", "batch"), "negatives"),
    (one_of("image", "token"), "sigreg_on"),
    (choice_of("dataset"), "dataset.name"),
    (one_of("fast", "pil"), "dataset.options.decoder"),
    (one_of("auto", "bf16", "fp16", "fp32"), "precision"),
    (one_of("encoder", "target"), "which"),
    (one_of("paper", "knn"), "protocol"),
    (one_of("cls", "mean", "cls+mean"), "pooling"),
    (one_of("eval", "train"), "split"),
    (one_of("warn", "stop"), "on_collapse"),
    (one_of("float32", "float16"), "dtype"),
    (one_of("unsupervised", "linear", "knn"), "method"),
    (one_of("tokens", "pixels"), "features"),
    (one_of("cosine", "euclidean", "manhattan"), "clustering.metric"),
    (one_of("average", "complete", "single", "ward"), "clustering.linkage"),
    (several_of(*EVALUATIONS), "evals"),
    (CONTROLS, "controls"),
    (several_of("cls", "mean", "cls+mean", "attentive"), "poolings"),
    (or_null(RAND_AUGMENT), "auto_augment"),
]
RULES: dict[str, Rule] = {key: rule for rule, keys in KEYS_OF_RULES for key in keys.split()}


def check_config(cfg: DictConfig) -> None:
    """Each key that the config has; then what must fit together."""
    switches = {key for key, value in shipped_keys().items() if isinstance(value, bool)}
    rules = dict.fromkeys(switches, YES_OR_NO) | RULES
    for section in ("env.slurm_extra", "env.nccl"):  # options of sbatch, variables of the shell
        if OmegaConf.is_dict(values := OmegaConf.select(cfg, section)):
            rules |= {f"{section}.{name}": PLAIN for name in values}
    if "controls" in cfg:  # several side by side
        rules["pretrained"] = or_null(BACKBONES)
    for key, (valid, holds) in rules.items():
        value = OmegaConf.select(cfg, key, default=ABSENT)
        if value is not ABSENT and not holds(value):
            raise ConfigError(f"{key}={'null' if value is None else value}: expected {valid}")
    if "encoder" in cfg:
        check_networks(cfg)
    if "warmup_epochs" in cfg and cfg.warmup_epochs > cfg.epochs:
        raise ConfigError(f"warmup_epochs={cfg.warmup_epochs}: expected 0 to {cfg.epochs} (epochs)")
    is_ward = "clustering" in cfg and cfg.clustering.linkage == "ward"
    if is_ward and cfg.clustering.metric != "euclidean":
        valid = "euclidean with clustering.linkage=ward"
        raise ConfigError(f"clustering.metric={cfg.clustering.metric}: expected {valid}")
    if "job_name" in cfg:
        check_job(cfg)


def check_networks(cfg: DictConfig) -> None:
    # infonce_patches tells the masked patches of an image apart.
    patches, masked = cfg.grid_size**2, 2 if cfg.loss.name == "infonce_patches" else 1
    if cfg.num_vis > patches - masked:
        why = (
            f"grid_size={cfg.grid_size} makes {patches} patches and {masked} or more must be masked"
        )
        raise ConfigError(f"num_vis={cfg.num_vis}: expected 1 to {patches - masked}, because {why}")
    networks = (
        ("encoder.embed_dim", cfg.encoder.embed_dim, "encoder.num_heads", cfg.encoder.num_heads),
        ("decoder_embed_dim", cfg.decoder_embed_dim, "decoder_num_heads", cfg.decoder_num_heads),
    )
    for dim_key, dim, heads_key, heads in networks:
        if dim % heads:
            raise ConfigError(f"{dim_key}={dim}: expected a multiple of {heads_key}={heads}")
        if dim % 4:  # sines and cosines of two coordinates
            raise ConfigError(f"{dim_key}={dim}: expected a multiple of 4 (position table)")
    if cfg.target_depth is not None and cfg.target_depth > cfg.encoder.depth:
        valid = f"1 to {cfg.encoder.depth} (encoder.depth), or null for all of them"
        raise ConfigError(f"target_depth={cfg.target_depth}: expected {valid}")
    check_choices(cfg)
    check_layers(cfg)
    batch_masked = cfg.batch_size * (patches - cfg.num_vis)
    if cfg.negatives == "batch" and batch_masked > MOST_CANDIDATES:
        valid = f"image, or a batch_size of at most {MOST_CANDIDATES} masked patches"
        why = f"each of {batch_masked} is compared with all"
        raise ConfigError(f"negatives=batch: expected {valid}, because {why}")


def check_choices(cfg: DictConfig) -> None:
    """Choices that do not go together, or that would do nothing."""
    target, loss = f"target={cfg.target.name}", f"loss={cfg.loss.name}"
    no_encoder = cfg.target.name in ("pixels", "projection")
    not_infonce = cfg.loss.name != "infonce_patches"
    no_layers = cfg.target_layers is None
    for key, only, is_wrong, why in (
        ("avg_sim_coeff", 0, cfg.target.name == "pixels", f"{target}: predictions are pixels"),
        ("target_depth", None, no_encoder, f"{target}, which has no blocks"),
        ("target_layers", None, no_encoder, f"{target}, which has no blocks"),
        ("mask_target", False, not no_layers, "target_layers, which are of all positions"),
        ("target_tap", "block", no_layers, "target_layers=null"),
        ("target_norm", None, no_layers, "target_layers=null"),
        ("target_post_norm", None, no_layers, "target_layers=null"),
        ("pred_unit", "image", not_infonce, loss),
        ("negatives", "image", not_infonce, loss),
        ("same_target", None, not_infonce, loss),
        ("same_target", None, cfg.negatives == "batch", "negatives=batch"),
        ("loss_beta", 1, cfg.loss.name != "smooth_l1", loss),
    ):
        if is_wrong and cfg[key] != only:
            value, valid = ("null" if v is None else v for v in (cfg[key], only))
            raise ConfigError(f"{key}={value}: expected {valid} with {why}")


def check_layers(cfg: DictConfig) -> None:
    layers, depth = cfg.target_layers, cfg.target_depth or cfg.encoder.depth
    if layers is None:
        return
    last = int(layers.removeprefix("top:")) - 1 if isinstance(layers, str) else max(layers)
    if last >= depth:
        valid = f"top:1 to top:{depth}, or blocks 0 to {depth - 1}, of the target encoder"
        raise ConfigError(f"target_layers={layers}: expected {valid}")


def check_job(cfg: DictConfig) -> None:
    processes = processes_per_node(cfg) * cfg.env.world_size
    if not cfg.env.distributed and processes > 1:
        found = f"env.ngpu={cfg.env.ngpu} and env.world_size={cfg.env.world_size} make {processes}"
        raise ConfigError(f"env.distributed=False: expected one process, but {found}")
    if cfg.env.slurm and cfg.env.ngpu is None:
        raise ConfigError("env.ngpu=null: expected a number where env.slurm=True (see env=slurm)")
    named = re.findall(r"\bgpu(?::[^:,]+)*?(?::(\d+))?(?=,|$)", str(cfg.env.gres))
    if cfg.env.slurm and named and sum(int(count or 1) for count in named) != cfg.env.ngpu:
        valid = f"as many GPUs as env.ngpu={cfg.env.ngpu} (one process for each)"
        raise ConfigError(f"env.gres={cfg.env.gres}: expected {valid}")
    if cfg.env.signal_delay >= 60 * cfg.env.timeout:
        valid = f"fewer seconds than the env.timeout={cfg.env.timeout} minutes have"
        raise ConfigError(f"env.signal_delay={cfg.env.signal_delay}: expected {valid}")
    check_writable(cfg, job_directory(cfg))


def check_writable(cfg: DictConfig, folder: Path) -> None:
    if problem := why_not_writable(folder):
        valid = f"a folder that can be written to, but {problem}"
        raise ConfigError(f"output_dir={cfg.output_dir}: expected {valid}")


def why_not_writable(folder: Path) -> str | None:
    """Try it, in the nearest folder that exists: permissions say nothing to root, nor about file
    systems that are read-only."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is not a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        return f"{existing} refuses new files ({error.strerror})"


def check_processes(cfg: DictConfig, gpus: int, cores: int) -> None:
    """Without any GPU the processes run on the CPU."""
    most, what = (gpus, "GPUs") if gpus else (cores, "cores")
    if (wanted := processes_per_node(cfg)) > most:
        key = "env.ngpu" if cfg.env.ngpu else "env.tasks_per_node"
        raise ConfigError(f"{key}={wanted}: expected 1 to {most}, the {what} present")
