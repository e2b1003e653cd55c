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

Test = Callable[[object], bool]
Rule = tuple[str, Test]  # what is expected, in words and as a test
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


def number(least: float, most: float = MOST, kind: str = "number", holds=is_number) -> Rule:
    words = f"a {kind} from {least} to {'10**9' if most == MOST else most}"
    return words, lambda v: holds(v) and least <= v <= most


def whole(least: int, most: float = MOST) -> Rule:
    return number(least, most, "whole number", is_whole)


def list_of(words: str, holds: Test, least: int = 0, most: float = math.inf) -> Rule:
    """A list of so many items that hold."""

    def is_list(value) -> bool:
        items = isinstance(value, ListConfig) and all(map(holds, value))
        return items and least <= len(value) <= most

    return f"a list of {words}", is_list


def choice(words: str, holds: Test, least: int = 1) -> Rule:
    """A list of items that hold, without repetitions."""
    words, is_list = list_of(words, holds, least)
    return words, lambda v: is_list(v) and len(v) == len(set(map(str, v)))


def either(first: Rule, second: Rule) -> Rule:
    return f"{first[0]}, or {second[0]}", lambda v: first[1](v) or second[1](v)


def or_null(rule: Rule) -> Rule:
    return either(rule, ("null", lambda v: v is None))


def one_of(*names: str) -> Rule:
    return f"one of {', '.join(names)}", lambda v: v in names


def choice_of(group: str) -> Rule:
    return one_of(*group_choices(group, [CONFIG_DIR]))


def several_of(*names: str, least: int = 1) -> Rule:
    return choice(f"different ones of {', '.join(names)}", lambda v: v in names, least)


def matches(words: str, pattern: str) -> Rule:
    return words, lambda v: is_text(v) and re.fullmatch(pattern, v) is not None


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
LABEL: Rule = either(TEXT, ("a whole number", is_whole))
SECTION: Rule = ("a section of keys", lambda v: isinstance(v, DictConfig))
SETTINGS: Rule = (
    "a section of keys, each with a text, a number, True or False",
    lambda v: (
        isinstance(v, DictConfig) and all(isinstance(x, str | int | float) for x in v.values())
    ),
)
TEXTS = list_of("texts, such as [first,'second=1,2']", is_text)
BACKBONES = either(TEXT, choice("different texts", is_text))
LAYERS = either(
    matches("top:K, such as top:6", r"top:[1-9]\d*"),
    choice("different blocks counted from 0, such as [2,5]", whole(0)[1]),
)
CLUSTERS = list_of("whole numbers from 2 to 12 that rise, such as [3,4,5]", whole(2, 12)[1], 1)
RISING: Rule = (CLUSTERS[0], lambda v: CLUSTERS[1](v) and list(v) == sorted(set(v)))
SEGMENTS = list_of(
    "whole numbers of at least 1, or truth, such as [2,truth]",
    either(one_of("truth"), whole(1))[1],
    least=1,
)
PLACE = list_of("two shares of width and height, such as [0.5,0.5]", number(0, 1)[1], 2, 2)
RAND_AUGMENT = matches(
    "a RandAugment of timm, such as rand-m9-mstd0.5-inc1",
    r"rand(-(m|mstd|mmax|n|p|inc|t|w)\d+(\.\d+)?)*",
)
EVALUATIONS = (
    "nn knn linear_probe few_shot collapse finetune patches_knn patches_linear clusters".split()
)

# A rule, and the keys that it is for; a key with ? may also be null. Keys that are True or False in
# the shipped configs need none.
KEYS_OF_RULES: list[tuple[Rule, str]] = [
    (SECTION, "dataset.options"),
    (SETTINGS, "env.slurm_extra env.nccl"),
    (MODULE, "worker"),
    (("True, False or changed", lambda v: v == "changed" or isinstance(v, bool)), "resume"),
    (TEXT, "output_dir title command page data_path? images? cache_dir? note?"),
    (TEXT, "pretrained? pretrained_weights? dataset.options.index_folder? env.gres? env.python?"),
    (TEXTS, "jobs apart settings env.setup env.srun_args digits? textures?"),
    (several_of(*group_choices("experiment", [CONFIG_DIR])), "experiments"),
    (FOLDER_NAME, "job_name encoder.name video_split"),  # the encoder's is part of job_name
    (LABEL, "env.partition? env.constraint? env.nodelist? env.exclude?"),
    (LABEL, "env.account? env.qos? env.comment?"),
    # Whole numbers.
    (whole(-1, 1000), "layer"),
    (whole(0, 1000), "patch_gap proj.mlp_depth previous_frames neighbourhood"),
    (whole(0), "max_bad_steps eval_freq watch_images env.max_restarts"),
    (whole(0, 2**63 - 1), "seed dataset.options.seed"),
    (whole(0, 1024), "num_workers? env.ngpu?"),
    (whole(1, 1024), "env.tasks_per_node env.parallel"),
    (whole(1, 1000), "patch_size encoder.patch_size encoder.depth decoder_depth"),
    (whole(1, 10**5), "encoder.embed_dim encoder.num_heads decoder_embed_dim decoder_num_heads"),
    (whole(1, 10**5), "image_side?"),
    (whole(1, 10**6), "proj.mlp_dim frame_side"),
    (whole(1), "num_vis epochs batch_size accum_iter print_freq save_freq max_steps?"),
    (whole(1), "env.world_size env.timeout env.signal_delay env.workers env.array_parallelism"),
    (whole(1), "dataset.options.train_images dataset.options.eval_images target_depth? stride?"),
    (whole(1), "sigreg_slices draws top_k patch_head.epochs patch_head.batch_images bank_patches?"),
    (whole(2, 1000), "grid_size encoder.grid_size"),
    (whole(4), "probe_images"),
    (whole(8, 10**5), "dataset.options.image_size"),
    (whole(250), "max_iter?"),
    (list_of("whole numbers of at least 1, such as [1,2]", whole(1)[1], 1), "neighbours shots"),
    (SEGMENTS, "segments"),
    (RISING, "clusters"),
    (PLACE, "point?"),
    # Other numbers.
    (number(-1, 1), "sim_init sim_end same_target?"),
    (number(0), "sigreg data_timeout avg_sim_coeff warmup_epochs weight_decay min_lr mixup cutmix"),
    (number(0), "patch_head.weight_decay env.mem?"),
    (number(0, 1), "max_bad_images target_mom min_lr_frac erase"),
    (number(0, 0.99), "drop_path label_smoothing"),
    (number(1, 1000), "upsample?"),
    (POSITIVE, "loss_beta tau blr save_minutes temperature patch_head.lr"),
    (POSITIVE, "clip_grad? dataset.options.max_value?"),
    (SHARE, "min_crop dataset.crop_ratio layer_decay"),
    (choice("different numbers above 0", POSITIVE[1]), "blrs regularisers"),
    (list_of("three numbers (red, green, blue)", is_number, 3, 3), "dataset.mean"),
    (list_of("three numbers above 0 (red, green, blue)", POSITIVE[1], 3, 3), "dataset.std"),
    # Choices.
    (choice_of("decoder"), "decoder.name"),
    (choice_of("target"), "target.name"),
    (choice_of("loss"), "loss.name"),
    (choice_of("dataset"), "dataset.name"),
    (one_of("random", "block", "block_roll", "inverse", "inverse_roll"), "masks"),
    (LAYERS, "target_layers?"),
    (one_of("block", "mlp"), "target_tap"),
    (one_of("layer", "instance", "batch"), "target_norm? target_post_norm?"),
    (one_of("image", "batch"), "negatives pred_unit?"),
    (one_of("image", "token"), "sigreg_on"),
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
    (several_of("random", "pixels", least=0), "controls"),
    (several_of("cls", "mean", "cls+mean", "attentive"), "poolings"),
    (RAND_AUGMENT, "auto_augment?"),
]
RULES: dict[str, Rule] = {
    key.removesuffix("?"): or_null(rule) if key.endswith("?") else rule
    for rule, keys in KEYS_OF_RULES
    for key in keys.split()
}


def expect(cfg: DictConfig, key: str, is_right: bool, valid: str) -> None:
    if not is_right:
        value = OmegaConf.select(cfg, key)
        raise ConfigError(f"{key}={'null' if value is None else value}: expected {valid}")


def check_config(cfg: DictConfig) -> None:
    """Each key that the config has; then what must fit together."""
    switches = {key for key, value in shipped_keys().items() if isinstance(value, bool)}
    rules = dict.fromkeys(switches, YES_OR_NO) | RULES
    if "controls" in cfg:  # several side by side
        rules["pretrained"] = or_null(BACKBONES)
    for key, (valid, holds) in rules.items():
        value = OmegaConf.select(cfg, key, default=ABSENT)
        expect(cfg, key, value is ABSENT or holds(value), valid)
    if "encoder" in cfg:
        check_networks(cfg)
    if "warmup_epochs" in cfg:
        is_right = cfg.warmup_epochs <= cfg.epochs
        expect(cfg, "warmup_epochs", is_right, f"0 to {cfg.epochs} (epochs)")
    if "clustering" in cfg and cfg.clustering.linkage == "ward":
        valid = "euclidean with clustering.linkage=ward"
        expect(cfg, "clustering.metric", cfg.clustering.metric == "euclidean", valid)
    if "job_name" in cfg:
        check_job(cfg)


def check_networks(cfg: DictConfig) -> None:
    # infonce_patches tells the masked patches of an image apart.
    patches, masked = cfg.grid_size**2, 2 if cfg.loss.name == "infonce_patches" else 1
    why = f"grid_size={cfg.grid_size} makes {patches} patches and {masked} or more must be masked"
    most = patches - masked
    expect(cfg, "num_vis", cfg.num_vis <= most, f"1 to {most}, because {why}")
    for dim_key, heads_key in (
        ("encoder.embed_dim", "encoder.num_heads"),
        ("decoder_embed_dim", "decoder_num_heads"),
    ):
        dim, heads = OmegaConf.select(cfg, dim_key), OmegaConf.select(cfg, heads_key)
        expect(cfg, dim_key, dim % heads == 0, f"a multiple of {heads_key}={heads}")
        # The table holds sines and cosines of two coordinates.
        expect(cfg, dim_key, dim % 4 == 0, "a multiple of 4 (position table)")
    depth = cfg.target_depth or cfg.encoder.depth
    valid = f"1 to {cfg.encoder.depth} (encoder.depth), or null for all of them"
    expect(cfg, "target_depth", depth <= cfg.encoder.depth, valid)
    check_choices(cfg)
    if layers := cfg.target_layers:
        last = int(layers.removeprefix("top:")) - 1 if isinstance(layers, str) else max(layers)
        valid = f"top:1 to top:{depth}, or blocks 0 to {depth - 1}, of the target encoder"
        expect(cfg, "target_layers", last < depth, valid)
    compared = cfg.batch_size * (patches - cfg.num_vis)
    valid = f"image, or a batch_size of at most {MOST_CANDIDATES} masked patches"
    why = f"each of {compared} is compared with all"
    is_right = cfg.negatives == "image" or compared <= MOST_CANDIDATES
    expect(cfg, "negatives", is_right, f"{valid}, because {why}")


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
        valid = f"{'null' if only is None else only} with {why}"
        expect(cfg, key, not is_wrong or cfg[key] == only, valid)


def check_job(cfg: DictConfig) -> None:
    env = cfg.env
    processes = processes_per_node(cfg) * env.world_size
    found = f"env.ngpu={env.ngpu} and env.world_size={env.world_size} make {processes}"
    is_right = env.distributed or processes <= 1
    expect(cfg, "env.distributed", is_right, f"one process, but {found}")
    if env.slurm:
        expect(cfg, "env.ngpu", env.ngpu is not None, "a number where env.slurm=True")
        named = re.findall(r"\bgpu(?::[^:,]+)*?(?::(\d+))?(?=,|$)", str(env.gres))
        is_right = not named or sum(int(count or 1) for count in named) == env.ngpu
        valid = f"as many GPUs as env.ngpu={env.ngpu} (one process for each)"
        expect(cfg, "env.gres", is_right, valid)
    valid = f"fewer seconds than the env.timeout={env.timeout} minutes have"
    expect(cfg, "env.signal_delay", env.signal_delay < 60 * env.timeout, valid)
    check_writable(cfg, job_directory(cfg))


def check_writable(cfg: DictConfig, folder: Path) -> None:
    """Try it, in the nearest folder that exists: permissions say nothing to root, nor about file
    systems that are read-only."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    valid = f"a folder that can be written to, but {existing}"
    expect(cfg, "output_dir", existing.is_dir(), f"{valid} is not a folder")
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        expect(cfg, "output_dir", False, f"{valid} refuses new files ({error.strerror})")


def check_processes(cfg: DictConfig, gpus: int, cores: int) -> None:
    """Without any GPU the processes run on the CPU."""
    most, what = (gpus, "GPUs") if gpus else (cores, "cores")
    key = "env.ngpu" if cfg.env.ngpu else "env.tasks_per_node"
    expect(cfg, key, processes_per_node(cfg) <= most, f"1 to {most}, the {what} present")
