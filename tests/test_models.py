"""The networks against the slow formulation, what may depend on what, and the published layout."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from engine_pretrain import begin_step, end_step, micro_step
from models.decoder import visual_cue
from models.lmim import TARGETS, LatentMIM, Latents
from models.views import Views, sample_views
from models.vit import PositionTable, ProjectionHead
from tests import reference
from tests.published import published_model, published_training
from util.checkpoint import CheckpointError, load_weights

ROOT = Path(__file__).parent.parent
LAYOUT = json.loads((ROOT / "tests/golden/released_vit_base_layout.json").read_text())
NUM_VIS = 4
SMALL = {
    "grid_size": 4,
    "patch_size": 3,
    "patch_gap": 2,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "freeze_pe": True,
    "mlp_dim": 20,
    "mlp_depth": 3,
    "decoder": "cross",
    "decoder_embed_dim": 12,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
    "avg_vis_mask_token": True,
    "target": "ema",
    "target_depth": None,
    "mask_target": True,
    "recompute": False,
} | dict.fromkeys(("target_layers", "target_norm", "target_post_norm", "target_tap"))


def random_tensor(shape, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def small_model(**changes) -> tuple[LatentMIM, dict]:
    """A float64 model and its configuration. No weight is at its start: biases are not zero, norms
    not one, and the target is not the online encoder.
    """
    config = SMALL | changes
    model = LatentMIM(**config).double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += 0.2 * random_tensor(parameter.shape, seed)
    return model, config


def random_inputs(config: dict, batch_size: int = 2) -> tuple[torch.Tensor, Views]:
    grid, gap = config["grid_size"], config["patch_gap"]
    side = grid * (config["patch_size"] + gap)
    views = sample_views(batch_size, grid, NUM_VIS, gap, torch.Generator().manual_seed(1))
    return random_tensor((batch_size, 3, side, side), 2), views


def keep_only(images, ids, config: dict, views: Views) -> torch.Tensor:
    """The pixels of the patches `ids` stay; all others, gaps included, become different ones."""
    size, grid = config["patch_size"], config["grid_size"]
    kept = 10 * random_tensor(images.shape, 3)
    for n, own in enumerate(ids.tolist()):
        offsets = (views.row_offsets, views.column_offsets)
        corners = reference.patch_corners(grid, size, config["patch_gap"], *offsets, n)
        for top, left in (corners[k] for k in own):
            square = (n, slice(None), slice(top, top + size), slice(left, left + size))
            kept[square] = images[square]
    return kept


def randomly_weighted_sum(latents: Latents) -> torch.Tensor:
    return sum((own * random_tensor(own.shape, 4)).sum() for own in latents)


# --- outputs and gradients ---

VARIANTS = {
    "published": {},
    "no gap": {"patch_gap": 0, "grid_size": 3, "embed_dim": 24, "num_heads": 3},
    "one head, one block": {"num_heads": 1, "depth": 1, "decoder_num_heads": 1},
    "larger patches": {"patch_size": 4, "grid_size": 3, "patch_gap": 1, "depth": 3},
    "no cue": {"avg_vis_mask_token": False},
    "no head": {"mlp_depth": 0},
    "head of one layer": {"mlp_depth": 1},
    "head of two layers": {"mlp_depth": 2},
    "target sees all": {"mask_target": False},
    "learned positions": {"freeze_pe": False},
    "learned positions, no cue": {"freeze_pe": False, "avg_vis_mask_token": False},
    "shallow target": {"depth": 3, "target_depth": 1},
    "shallow online target": {"depth": 3, "target_depth": 2, "target": "joint"},
    "joint": {"target": "joint"},
    "joint, target sees all": {"target": "joint", "mask_target": False},
    "stopgrad": {"target": "stopgrad"},
    "frozen": {"target": "frozen"},
    "self decoder": {"decoder": "self"},
    "self decoder, no cue": {"decoder": "self", "avg_vis_mask_token": False, "freeze_pe": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_equal_the_slow_formulation(variant):
    model, config = small_model(**VARIANTS[variant])
    images, views = random_inputs(config)
    latents = model(images, views)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in trained:
        weights[name].requires_grad_()
    expected = reference.latent_mim(weights, config, images, views)
    for own, wanted in zip(latents, expected, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-11)

    gradients = torch.autograd.grad(randomly_weighted_sum(latents), list(trained.values()))
    slow_loss = randomly_weighted_sum(Latents(*expected))
    wanted_gradients = torch.autograd.grad(slow_loss, [weights[name] for name in trained])
    for name, own, wanted in zip(trained, gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("dim, grid", [(8, 3), (24, 5), (768, 14)])
def test_position_table(dim, grid):
    table = PositionTable(dim, grid, freeze=True).pos_embeds
    torch.testing.assert_close(
        table, reference.position_table(dim, grid).float(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("decoder", ["cross", "self"])
@pytest.mark.parametrize("cue", [True, False])
def test_cue_is_the_only_difference_and_has_no_parameters(decoder, cue):
    model, config = small_model(decoder=decoder, avg_vis_mask_token=cue)
    other, _ = small_model(decoder=decoder, avg_vis_mask_token=not cue)
    other.load_state_dict(model.state_dict())
    images, views = random_inputs(config)
    assert not torch.allclose(model(images, views).predictions, other(images, views).predictions)


@pytest.mark.parametrize("mlp_depth", [0, 1, 2, 3])
def test_projection_head(mlp_depth):
    head = ProjectionHead(dim=6, mlp_dim=10, mlp_depth=mlp_depth).double()
    weights = {name: random_tensor(v.shape, 5) for name, v in head.state_dict().items()}
    head.load_state_dict(weights)
    tokens = random_tensor((2, 5, 6), 6)
    expected = reference.projection_head(tokens, weights)
    torch.testing.assert_close(head(tokens), expected, rtol=1e-11, atol=1e-12)
    widths = {0: [], 1: [(6, 6)], 2: [(10, 6), (6, 10)], 3: [(10, 6), (10, 10), (6, 10)]}
    matrices = [tuple(v.shape) for name, v in weights.items() if name.startswith("linear")]
    assert matrices == widths[mlp_depth]  # and no bias


# --- what may depend on what ---


@pytest.mark.parametrize("variant", ["published", "no gap", "joint", "self decoder", "no cue"])
def test_predictions_do_not_see_masked_patches(variant):
    model, config = small_model(**VARIANTS[variant])
    images, views = random_inputs(config)
    changed = keep_only(images, views.visible_ids, config, views)
    first, second = model(images, views), model(changed, views)
    assert torch.equal(first.predictions, second.predictions)
    assert torch.equal(first.visible, second.visible)
    assert not torch.allclose(first.targets, second.targets)


@pytest.mark.parametrize("target", ["ema", "joint", "stopgrad", "frozen"])
@pytest.mark.parametrize("mask_target", [True, False])
def test_targets_see_visible_patches_only_without_mask_target(target, mask_target):
    model, config = small_model(target=target, mask_target=mask_target)
    images, views = random_inputs(config)
    changed = keep_only(images, views.masked_ids, config, views)
    first, second = model(images, views), model(changed, views)
    assert torch.equal(first.targets, second.targets) == mask_target
    assert not torch.allclose(first.predictions, second.predictions)


# --- the target encoder ---


@pytest.mark.parametrize("target", TARGETS)
def test_which_parameters_get_gradients(target):
    model, config = small_model(target=target)
    latents = model(*random_inputs(config))
    randomly_weighted_sum(latents).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    trained = {n for n, p in model.named_parameters() if not n.startswith("target_")}
    assert with_gradient == trained
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
    assert latents.targets.requires_grad == (target == "joint")
    has_own_weights = any(name.startswith("target_encoder.") for name in model.state_dict())
    assert has_own_weights == (target in ("ema", "frozen"))
    before = copy.deepcopy(model.state_dict())
    model.move_target(0.5)
    moves = any(not value.equal(before[name]) for name, value in model.state_dict().items())
    assert moves == (target == "ema")


def test_joint_has_gradients_through_both_sides():
    model, config = small_model(target="joint")
    images, views = random_inputs(config)
    for side in ("predictions", "targets"):
        latents = getattr(model(images, views), side)
        loss = (latents * random_tensor(latents.shape, 7)).sum()
        gradients = torch.autograd.grad(loss, list(model.encoder.parameters()))
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("target_depth", [None, 3, 4])
def test_target_pairs_by_name(target_depth):
    """Also where blocks 1 and 10 begin alike."""
    model, _ = small_model(depth=12 if target_depth is None else 4, target_depth=target_depth)
    depth = len(model.target_encoder.blocks)
    expected = reference.first_blocks(dict(model.encoder.named_parameters()), depth)
    assert [name for name, _ in model.target_encoder.named_parameters()] == list(expected)
    online = reference.first_blocks(model.encoder.state_dict(), depth)
    start = copy.deepcopy(model.target_encoder.state_dict())
    model.move_target(0.7)
    expected = reference.moving_average(start, online, 0.7)
    for name, value in model.target_encoder.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    model.move_target(0.0)
    assert set(online) == set(start)
    for name, value in model.target_encoder.state_dict().items():
        assert torch.equal(value, online[name])


@pytest.mark.parametrize("target", ["ema", "frozen"])
@pytest.mark.parametrize("target_depth", [None, 1, 2])
def test_target_starts_as_a_copy_of_the_first_blocks(target, target_depth):
    model = LatentMIM(**SMALL | {"depth": 3, "target": target, "target_depth": target_depth})
    expected = reference.first_blocks(model.encoder.state_dict(), target_depth or 3)
    start = model.target_encoder.state_dict()
    assert set(start) == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in start.items())


def test_momentum_one_leaves_the_target_and_every_step_the_encoder():
    model, _ = small_model()
    before = copy.deepcopy(model.state_dict())
    model.move_target(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.move_target(0.5)
    assert all(
        torch.equal(value, before[name]) != name.startswith("target_encoder.")
        for name, value in model.state_dict().items()
        if not name.endswith("pos_embeds")  # frozen: the same table on both sides
    )


# --- weights: names, start, layout ---


@pytest.mark.parametrize("freeze_pe", [True, False])
def test_positions_are_in_the_state_dict_either_way(freeze_pe):
    model = LatentMIM(**SMALL | {"freeze_pe": freeze_pe})
    weights, parameters = model.state_dict(), dict(model.named_parameters())
    for part, dim in (("encoder", 16), ("target_encoder", 16), ("decoder", 12)):
        name = f"{part}.pos_embed.pos_embeds"
        start = reference.position_table(dim, 4).float()
        torch.testing.assert_close(weights[name], start, rtol=0, atol=1e-6)
        assert (name in parameters) == (not freeze_pe)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "pos_embed" in n]
    assert len(trained) == (0 if freeze_pe else 2)


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_weights_start_as_published(decoder):
    torch.manual_seed(0)
    wide = {"embed_dim": 256, "num_heads": 4, "mlp_dim": 128, "patch_size": 8}
    wide |= {"decoder": decoder, "decoder_embed_dim": 192, "decoder_num_heads": 4}
    model = LatentMIM(**SMALL | wide)
    kinds = dict(model.named_modules())
    tokens = {"encoder.cls_token", "target_encoder.cls_token", "decoder.mask_token"}
    tokens |= {"decoder.cls_token"} if decoder == "cross" else set()
    for name, parameter in model.named_parameters():
        owner = kinds[name.rpartition(".")[0]]
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif isinstance(owner, nn.LayerNorm):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif isinstance(owner, nn.Linear):
            bound = (6 / sum(parameter.shape)) ** 0.5  # xavier: fan in + fan out
            largest, spread = parameter.abs().max().item(), parameter.std().item()
            assert 0.99 * bound < largest <= bound, name
            assert spread == pytest.approx(bound / 3**0.5, rel=0.02), name
        else:
            tokens.remove(name)
            if name == "decoder.mask_token":
                assert not parameter.any()
            else:
                assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
                assert abs(parameter.mean().item()) < 0.005
    assert not tokens


@pytest.fixture(scope="module")
def vit_base() -> LatentMIM:
    """No memory is taken until to_empty."""
    with torch.device("meta"):
        return published_model()


def test_parameter_counts_of_vit_base(vit_base):
    parameters = list(vit_base.parameters())
    assert round(sum(p.numel() for p in parameters if p.requires_grad) / 1e6, 1) == 122.1
    assert round(sum(p.numel() for p in parameters) / 1e6, 1) == 230.9


def test_layout_of_vit_base_is_the_released_one(vit_base):
    released = {k.removeprefix("module."): shape for k, shape in LAYOUT["state_dict"].items()}
    assert all(key.startswith("module.") for key in LAYOUT["state_dict"])
    ours = {key: list(value.shape) for key, value in vit_base.state_dict().items()}
    assert ours == released


def test_released_checkpoint_loads(vit_base):
    # One number per key, without the memory of a tensor; half precision for the model's sake.
    released = {
        key: torch.tensor(float(number)).expand(shape)
        for number, (key, shape) in enumerate(LAYOUT["state_dict"].items())
    }
    model = copy.deepcopy(vit_base).half().to_empty(device="cpu")
    load_weights(model, released, "the released checkpoint")
    loaded = model.state_dict()
    for key, value in released.items():
        weight = loaded[key.removeprefix("module.")]
        assert (weight.flatten()[[0, -1]] == value.flatten()[[0, -1]]).all(), key


def test_one_training_step_as_published():
    """With fewer and narrower blocks."""
    torch.manual_seed(0)
    model = published_model(depth=2, embed_dim=192, num_heads=3, mlp_dim=256, decoder_depth=1)
    own = {"warmup_epochs": 0, "epochs": 10, "sim_init": 0.5, "sim_end": 0.5}
    training = published_training(model, **own)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 280, 280, generator=torch.Generator().manual_seed(8))
    views = sample_views(2, 14, 20, 4, torch.Generator().manual_seed(9))
    begin_step(training, 0.0)
    metrics = micro_step(training, images, views, last_of_step=True)
    end_step(training, 0)
    # At the start predictions know nothing: chance among 176 patches, 0.4 ln(176), and at most the
    # constraint on top.
    assert 2.0 < metrics[0].item() < 2.4
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_other_layouts_are_refused(change):
    model = LatentMIM(**SMALL)
    weights = {"module." + key: value for key, value in model.state_dict().items()}
    if change == "missing":
        del weights["module.decoder.mask_token"]
    elif change == "unexpected":
        weights["module.decoder.extra"] = torch.zeros(1)
    else:
        weights["module.decoder.mask_token"] = torch.zeros(1, 1, 13)
    with pytest.raises(
        CheckpointError, match=r"(Missing|Unexpected|mismatch) .*decoder\.(mask_token|extra)"
    ):
        load_weights(model, weights, "the file")


def test_the_visual_cue_is_as_precise_under_autocast():
    """Of products about 100, of which bf16 keeps the halves alone."""
    table = torch.tensor(
        [[20.0, 1, 0, 0], [10, 0, 0, 0], [10, 0.6, 0, 0]]
    )  # one masked, two visible
    ids = torch.tensor([[1, 2]]), torch.tensor([[0]])
    with torch.autocast("cpu", torch.bfloat16):
        cue = visual_cue(table, torch.eye(2, dtype=torch.bfloat16)[None], *ids)
    expected = torch.tensor([100.0, 100.3]).softmax(dim=0)
    torch.testing.assert_close(cue[0, 0].float(), expected, atol=0.004, rtol=0)
