"""Every number that a protocol fixes in a config, once more and by hand (those of the code are in
test_protocols_in_code.py). Whoever changes one changes results, and has to say so here as well."""

import inspect
from functools import cache

import pytest
from omegaconf import OmegaConf

from data import datasets
from engine_pretrain import Training
from launch.config import CONFIG_DIR, compose_config, flatten, parse_command_line, read_yaml
from launch.results import CHANGE_NO_RESULT
from models.lmim import LatentMIM
from models.losses import Objective
from models.vit import Encoder
from tests.test_config import PUBLISHED

# ---- The groups, then every key that changes results. --------------------------------------------

SIZES = ("name", "embed_dim", "depth", "num_heads", "patch_size", "grid_size")
ENCODERS = [
    ("vit_nano", 96, 4, 3, 6, 4),
    ("vit_mini", 128, 4, 4, 8, 8),
    ("vit_tiny", 192, 12, 3, 16, 14),
    ("vit_small", 384, 12, 6, 16, 14),
    ("vit_base", 768, 12, 12, 16, 14),
    ("vit_large", 1024, 24, 16, 16, 14),
    ("vit_huge", 1280, 32, 16, 14, 16),
]
DATA_KEYS = ("name", "flip", "crop_ratio", "mean", "std", "options")
COLOURS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # of ImageNet
FAST = {"decoder": "fast", "max_value": None}
DRAWN = {"image_size": 96, "train_images": 6000, "eval_images": 400, "seed": 0}
DATA = [
    ("digits", False, 1.0, [0.306] * 3, [0.375] * 3, {}),
    ("textures", True, 0.6667, [0.497] * 3, [0.156] * 3, DRAWN),
    ("photographs", True, 1.0, [0.477, 0.404, 0.379], [0.263, 0.217, 0.226], DRAWN),
    *[(n, True, 0.875, *COLOURS, FAST | {"index_folder": None}) for n in ("tar", "images")],
    *[(n, True, 0.875, *COLOURS, {}) for n in ("cifar10", "cifar100", "stl10")],
    *[(n, True, 0.875, *COLOURS, FAST) for n in "folder imagefolder imagenet imagenet100".split()],
    ("masks", True, 1.0, *COLOURS, {"max_value": None}),
    ("voc", True, 1.0, *COLOURS, {}),
]
TARGETS = "ema frozen joint pixels projection stopgrad"
LOSSES = "cosine infonce_patches l1 l2 norm_l2 smooth_l1"
SEEDS = [0, 1, 2]
HALF, QUARTER = "${patches:${grid_size},0.5}", "${patches:${grid_size},0.25}"
EXPERIMENTS = {
    "challenge_target": {"sweep": {"target": "ema joint stopgrad frozen".split(), "seed": SEEDS}},
    "challenge_loss": {
        "sweep": {"loss": "infonce_patches l2 norm_l2 smooth_l1 cosine".split(), "seed": SEEDS}
    },
    "challenge_correlation": {
        "sweep": {
            "variants": ["", "patch_gap=0", "avg_sim_coeff=0", f"num_vis={HALF}"],
            "seed": SEEDS,
        }
    },
    "challenge_decoder": {
        "sweep": {
            "variants": ["", "decoder=self", "avg_vis_mask_token=False", "proj.mlp_depth=0"],
            "seed": SEEDS,
        }
    },
    "lab_mae": {
        "defaults": [
            {"override /target": "pixels"},
            {"override /loss": "norm_l2"},
            {"override /decoder": "self"},
        ],
        **{"decoder_depth": 8, "avg_vis_mask_token": False, "num_vis": QUARTER, "patch_gap": 0},
        **{"proj": {"mlp_depth": 0}, "avg_sim_coeff": 0, "sweep": {"seed": SEEDS}},
    },
    "lab_lite": {
        "defaults": [{"override /target": "projection"}],
        **{"pred_unit": None, "tau": 0.1, "decoder_depth": 4, "avg_sim_coeff": 0},
        "sweep": {"seed": SEEDS},
    },
    "lab_data2vec": {
        "defaults": [{"override /loss": "smooth_l1"}],
        "target_layers": "top:${scaled:6,${encoder.depth},12}",
        **{"target_norm": "layer", "target_post_norm": "layer", "loss_beta": 2},
        **{"mask_target": False, "proj": {"mlp_depth": 0}, "target_mom": 0.9998},
        **{"num_vis": "${patches:${grid_size},0.39}", "patch_gap": 0, "avg_sim_coeff": 0},
        "sweep": {"seed": SEEDS},
    },
    "lab_lejepa": {
        "defaults": [{"override /target": "joint"}, {"override /loss": "l2"}],
        **{"sigreg": 0.05, "avg_sim_coeff": 0, "sweep": {"seed": SEEDS}},
    },
}
GROUPS = {
    "encoder": {row[0]: dict(zip(SIZES, row, strict=True)) for row in ENCODERS},
    "dataset": {row[0]: dict(zip(DATA_KEYS, row, strict=True)) for row in DATA},
    "loss": {name: {"name": name} for name in LOSSES.split()},
    "decoder": {name: {"name": name} for name in ("cross", "self")},
    "target": {name: {"name": name} for name in TARGETS.split()},
    "experiment": EXPERIMENTS,
}

RECIPE = (
    "encoder=vit_base dataset=imagenet decoder=cross target=ema loss=infonce_patches seed=0 "
    "env.slurm=True env.distributed=True env.ngpu=8 env.world_size=1 precision=auto compile=False "
    "grid_size=14 patch_size=16 patch_gap=4 num_vis=20 min_crop=0.2 freeze_pe=True "
    "proj.mlp_dim=4096 proj.mlp_depth=3 decoder_depth=3 decoder_embed_dim=512 "
    "decoder_num_heads=16 avg_vis_mask_token=True target_depth=null mask_target=True tau=0.2 "
    "avg_sim_coeff=0.1 sim_init=0.75 sim_end=0.25 target_mom=0.99 epochs=800 max_steps=null "
    "warmup_epochs=40 blr=1.5e-4 min_lr_frac=0.25 weight_decay=0.05 batch_size=256 accum_iter=2 "
    "clip_grad=null shrink_batch=False masks=random target_layers=null target_tap=block "
    "target_norm=null target_post_norm=null pred_unit=image negatives=image same_target=null "
    "loss_beta=1 sigreg=0 sigreg_slices=1024 sigreg_on=image "
)
RHYTHM = "eval_freq=10 save_freq=50 print_freq=100 worker=main_lmim "
EVALUATION = (
    "dataset=imagenet env.slurm=False env.distributed=True env.ngpu=1 env.world_size=1 "
    "pretrained=null pretrained_weights=null which=encoder layer=-1 final_norm=True "
    "image_side=null random_init=False precision=fp32 seed=0 "
)
TABLE = {
    "lmim": RECIPE,
    "imagenet100": RECIPE + "dataset=imagenet100 avg_sim_coeff=0 epochs=300 warmup_epochs=30 "
    "batch_size=128 accum_iter=4",
    "images": RECIPE + "encoder=vit_small dataset=images env.slurm=False env.ngpu=null "
    "proj.mlp_dim=2048 decoder_embed_dim=256 decoder_num_heads=8 epochs=100 warmup_epochs=5 "
    "blr=6e-4 batch_size=128 accum_iter=1 shrink_batch=True max_bad_images=0.05 print_freq=10 "
    "eval_freq=10 eval_at_start=True save_freq=50",
    "demo": RECIPE + "encoder=vit_nano dataset=digits env.slurm=False env.ngpu=1 grid_size=4 "
    "patch_size=6 patch_gap=1 num_vis=6 min_crop=0.7 proj.mlp_dim=256 decoder_embed_dim=96 "
    "decoder_depth=2 decoder_num_heads=3 precision=fp32 epochs=60 warmup_epochs=5 blr=4e-3 "
    "min_lr_frac=0.02 batch_size=128 accum_iter=1",
    "textures": RECIPE
    + "encoder=vit_mini dataset=textures env.slurm=False env.ngpu=1 patch_size=8 "
    "grid_size=8 patch_gap=2 num_vis=10 min_crop=0.5 proj.mlp_dim=512 decoder_embed_dim=128 "
    "decoder_depth=2 decoder_num_heads=4 precision=fp32 epochs=14 warmup_epochs=1.4 blr=2e-3 "
    "min_lr_frac=0.02 batch_size=128 accum_iter=1",
    "photographs": RECIPE + "encoder=vit_tiny dataset=photographs env.slurm=False env.ngpu=1 "
    "encoder.name=vit_tiny_6 encoder.depth=6 encoder.patch_size=8 encoder.grid_size=8 patch_size=8 "
    "grid_size=8 patch_gap=2 num_vis=16 min_crop=0.35 proj.mlp_dim=512 decoder_embed_dim=192 "
    "decoder_depth=2 decoder_num_heads=3 precision=fp32 epochs=6 warmup_epochs=0.6 blr=2e-3 "
    "min_lr_frac=0.02 batch_size=128 accum_iter=1",
    "nn": EVALUATION + "protocol=paper final_norm=False pooling=mean neighbours=[10,20,100,200] "
    "temperature=0.07",
    "few_shot": EVALUATION + "pooling=mean shots=[1,5,10,25] draws=5 "
    "regularisers=[1e-5,1e-4,1e-3,1e-2,0.1,1,10]",
    "linear_probe": EVALUATION + "poolings=[cls,mean] blrs=[0.05,0.1,0.2] cached=False epochs=90 "
    "warmup_epochs=10 weight_decay=0 min_crop=0.08 precision=auto batch_size=512 accum_iter=1",
    "finetune": EVALUATION + "pooling=mean final_norm=False drop_path=0.1 epochs=100 blr=5e-4 "
    "warmup_epochs=5 min_lr=1e-6 layer_decay=0.65 weight_decay=0.05 precision=auto batch_size=128 "
    "accum_iter=1 min_crop=0.08 auto_augment=rand-m9-mstd0.5-inc1 erase=0.25 mixup=0.8 cutmix=1.0 "
    "label_smoothing=0.1",
    "segmentation": EVALUATION + "dataset=textures method=unsupervised features=tokens "
    "segments=[2,3,4,5] centre=False neighbours=[20] temperature=0.07 bank_patches=50000 "
    "clustering.metric=cosine clustering.linkage=average "
    "clustering.connected=False patch_head.epochs=20 patch_head.lr=1e-3 "
    "patch_head.weight_decay=1e-4 patch_head.batch_images=16",
    "video": EVALUATION + "dataset=folder video_split=val frame_side=480 previous_frames=7 "
    "neighbourhood=12 top_k=5 temperature=0.1",
    "collapse": EVALUATION + "final_norm=False pooling=mean split=eval probe_images=4000",
    "features": EVALUATION + "images=null split=eval tokens=False pooling=mean dtype=float32",
    "evaluate": EVALUATION + "evals=[nn,knn,few_shot,collapse] settings=[] "
    "beside_random_init=False",
    "export": EVALUATION,
    "visualize": EVALUATION + "dataset=images images=null controls=[] stride=null upsample=null "
    "clusters=[3,4,5] max_iter=1000 point=[0.5,0.5]",
}
OTHERS = ("status", "report", "challenges", "laboratory")  # which train nothing by themselves
# There the size of a batch changes results.
TRAINED = "lmim imagenet100 images demo textures photographs linear_probe finetune".split()
CHANGES_NO_RESULT = CHANGE_NO_RESULT | {"save_masks"}


def settings(text: str) -> dict[str, object]:
    """What 'a.b=1 c=x' says, the last word on each key; encoder=NAME stands for all its keys."""
    found = {}
    for pair in text.split():
        group, _, choice = pair.partition("=")
        if group in GROUPS:
            found = {key: value for key, value in found.items() if not key.startswith(f"{group}.")}
            found |= flatten({group: GROUPS[group][choice]})
        else:
            found |= flatten(OmegaConf.to_container(OmegaConf.from_dotlist([pair])))
    return found


@cache
def composed(name: str, *overrides: str):
    return compose_config(name, list(overrides))


def assert_holds(config, table: dict) -> set[str]:
    """-> the keys that the table lacks"""
    found = flatten(OmegaConf.to_container(config))
    assert {key: found.get(key, "no such key") for key in table} == table
    return found.keys() - table.keys()


def test_the_published_command_and_the_defaults():
    command = parse_command_line(PUBLISHED, "")
    for config in (composed(command.config_name, *command.overrides), composed("lmim")):
        assert_holds(config, settings(RECIPE + RHYTHM))


@pytest.mark.parametrize("name", TABLE)
def test_configs(name):
    others = assert_holds(composed(name), settings(TABLE[name])) - CHANGES_NO_RESULT
    others = {key for key in others if not key.startswith("env.")}
    assert others <= (set() if name in TRAINED else {"batch_size"}), "a key that is not in TABLE"


@pytest.mark.parametrize("group", GROUPS)
def test_groups(group):
    paths = (CONFIG_DIR / group).glob("*.yaml")
    assert {path.stem: read_yaml(path) for path in paths} == GROUPS[group]


def test_the_table_is_complete_and_defaults_in_code_agree_with_it():
    assert {path.stem for path in CONFIG_DIR.glob("*.yaml")} == {*TABLE, *OTHERS}
    for name, build in datasets.DATASETS.items():
        options = inspect.signature(build).parameters.values()
        defaults = {p.name: p.default for p in options if p.kind is p.KEYWORD_ONLY}
        defaults |= datasets.DECODING.get(name, {})
        assert defaults == GROUPS["dataset"][name]["options"], name
    for model in (LatentMIM, Encoder, Objective, Training):  # a default stands in the YAML alone
        arguments = inspect.signature(model).parameters.values()
        assert all(argument.default is inspect.Parameter.empty for argument in arguments), model
