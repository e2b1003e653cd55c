"""The switches of target, objective and masks: networks against a slow formulation, what may depend
on what, refusals."""

import math

import pytest
import torch
from torch import Tensor

from launch.config import ConfigError, compose_config
from launch.validate import RULES, check_config
from models.lmim import TARGETS
from models.losses import SIGReg, epps_pulley, infonce_patches
from models.views import MASKS, sample_views, take_tokens
from tests import reference
from tests.published import published_objective
from tests.test_losses import assert_same, random_latents, random_tokens
from tests.test_models import random_inputs, small_model
from util.build import target_layers
from util.distributed import all_reduce

CPU = torch.device("cpu")

# ---- Targets. ------------------------------------------------------------------------------------


def slow_norm(tokens: Tensor, norm: str | None) -> Tensor:
    """Number by number groups of [N, L, D]: of a token, of a channel in its image, of a channel."""
    if norm is None:
        return tokens
    result = torch.empty_like(tokens)
    images, places, channels = tokens.shape
    groups = {
        "layer": [(n, p, slice(None)) for n in range(images) for p in range(places)],
        "instance": [(n, slice(None), c) for n in range(images) for c in range(channels)],
        "batch": [(slice(None), slice(None), c) for c in range(channels)],
    }
    for group in groups[norm]:
        centred = tokens[group] - tokens[group].mean()
        result[group] = centred / torch.sqrt((centred**2).mean() + 1e-5)
    return result


def slow_layers(weights: dict, patches: Tensor, ids: Tensor, heads: int, tap: str) -> list[Tensor]:
    """What each block gives, without the class token."""
    table = weights["pos_embed.pos_embeds"]
    tokens = reference.linear(patches, weights, "embed.proj")
    tokens = tokens + reference.pick_positions(table, ids)
    cls_token = (weights["cls_token"] + table[0]).expand(len(tokens), 1, -1)
    tokens, found = torch.cat([cls_token, tokens], dim=1), []
    for block in range(reference.count_blocks(weights)):
        name = f"blocks.{block}"
        normed = reference.layer_norm(tokens, weights, f"{name}.norm1")
        middle = tokens + reference.self_attention(normed, weights, f"{name}.attn", heads)
        tokens = reference.vit_block(tokens, weights, name, heads)
        found.append((tokens if tap == "block" else tokens - middle)[:, 1:])
    return found


@pytest.mark.parametrize("target", ["ema", "frozen", "stopgrad", "joint"])
@pytest.mark.parametrize(
    ("layers", "tap", "norm", "post_norm"),
    [
        ([1, 2], "block", "layer", "layer"),
        ([0, 2], "mlp", "instance", "layer"),
        ([1], "block", "batch", None),
        ([2, 0], "mlp", None, "instance"),
    ],
)
def test_averaged_layers_equal_the_slow_formulation(target, layers, tap, norm, post_norm):
    changes = {"target_layers": layers, "target_tap": tap, "target_norm": norm}
    changes |= {"target_post_norm": post_norm, "mask_target": False, "target": target, "depth": 3}
    model, config = small_model(**changes)
    images, views = random_inputs(config)
    targets = model(images, views).targets
    encoder = "target_encoder" if target in ("ema", "frozen") else "encoder"
    weights = reference.below(dict(model.state_dict()), encoder)
    patches = model.patches(images, views)
    everywhere = torch.arange(patches.shape[1]).expand(len(patches), -1)
    found = slow_layers(weights, patches, everywhere, config["num_heads"], tap)
    mean = sum(slow_norm(found[layer], norm) for layer in layers) / len(layers)
    wanted = take_tokens(slow_norm(mean, post_norm), views.masked_ids)
    torch.testing.assert_close(targets, wanted, rtol=1e-9, atol=1e-10)
    assert targets.requires_grad == (target == "joint")


@pytest.mark.parametrize("mask_target", [True, False])
def test_targets_without_an_encoder(mask_target):
    """The masked patches themselves, shifted windows and all, or a map of them."""
    for target in ("pixels", "projection"):
        model, config = small_model(target=target, mask_target=mask_target)
        images, views = random_inputs(config)
        offsets = (views.row_offsets, views.column_offsets)
        patches = reference.extract_patches(images, 3, config["patch_gap"], *offsets)
        wanted = reference.pick(patches, views.masked_ids)
        if target == "projection":
            layer = model.target_projection
            wanted = wanted @ layer.weight.T + layer.bias
        latents = model(images, views)
        torch.testing.assert_close(latents.targets, wanted)
        assert latents.predictions.shape == wanted.shape and not latents.targets.requires_grad
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        frozen = {"target_projection.weight", "target_projection.bias"}
        assert not any(name.startswith("target_") for name in trained)
        others = set(dict(model.named_parameters())) - trained
        assert others == (frozen if target == "projection" else set())


def test_layers_are_counted_from_the_end_of_the_target_encoder():
    def layers(*overrides: str) -> list[int] | None:
        return target_layers(compose_config("lmim", ["encoder=vit_tiny", *overrides]))

    assert layers() is None
    assert layers("target_layers=top:3") == [9, 10, 11]
    assert layers("target_layers=top:3", "target_depth=5") == [2, 3, 4]
    assert layers("target_layers=[2,0]") == [2, 0]


# ---- Losses. -------------------------------------------------------------------------------------


def slow_discrimination(
    predictions: Tensor, targets: Tensor, tau: float, unit, negatives: str, same: float | None
) -> Tensor:
    groups = {"image": list(predictions), "batch": [predictions.flatten(0, 1)], None: []}[unit]
    rows = list(predictions) if unit is None else []
    for group in groups:
        mean, count = sum(group) / len(group), len(group)
        std = torch.sqrt(sum((token - mean) ** 2 for token in group) / (count - 1))
        rows += [(token - mean) / (std + 1e-4) for token in group]
    rows = torch.stack(rows).reshape(predictions.shape)
    losses = []
    for image, own_targets in zip(rows, targets, strict=True):
        others = own_targets if negatives == "image" else targets.flatten(0, 1)
        own_losses, alone = [], False
        for token, target in zip(image, own_targets, strict=True):
            logits, own = [], reference.unit(token) @ reference.unit(target) / tau
            for other in others:
                cosine = reference.unit(other) @ reference.unit(target)
                if (
                    other is target
                    or same is None
                    or cosine <= same
                    or bool((other == target).all())
                ):
                    logits.append(reference.unit(token) @ reference.unit(other) / tau)
            alone |= len(logits) == 1 and len(image) > 1
            own_losses.append(torch.stack(logits).exp().sum().log() - own)
        if not alone:
            losses.append(sum(own_losses) / len(own_losses))
    return 2 * tau * sum(losses) / len(losses) if losses else 0 * predictions.sum()


@pytest.mark.parametrize("unit", ["image", "batch", None])
@pytest.mark.parametrize(
    ("negatives", "same"), [("image", None), ("batch", None), ("image", 0.4), ("image", 0.0)]
)
def test_discrimination_equals_the_slow_formulation(unit, negatives, same):
    predictions = random_tokens((3, 6, 5), 1)
    targets = random_tokens((3, 6, 5), 2) - 0.7  # in all directions
    if same:  # in the last image only: there each patch may be left alone
        targets[2] = targets[2] * 0.05 + targets[2, :1]
    assert_same(
        lambda p, t: infonce_patches(p, t, 0.3, unit, negatives, same),
        lambda p, t: slow_discrimination(p, t, 0.3, unit, negatives, same),
        predictions,
        targets,
    )


def test_an_image_in_which_a_patch_has_no_other_is_left_out():
    predictions, targets = random_tokens((2, 4, 6), 3), random_tokens((2, 4, 6), 4)
    targets[1] = targets[1, :1]
    leaf = predictions.clone().requires_grad_()
    loss = infonce_patches(leaf, targets, 0.2, None, "image", 0.999)
    alone = infonce_patches(predictions[:1], targets[:1], 0.2, None, "image", None)
    assert loss.item() == pytest.approx(alone.item())
    loss.backward()
    assert leaf.grad[0].any() and not leaf.grad[1].any()
    nothing = infonce_patches(predictions[1:], targets[1:], 0.2, None, "image", 0.999)
    assert nothing.item() == 0


def test_the_parabola_of_smooth_l1():
    latents = random_latents()
    for beta in (0.5, 2.0):
        loss, _ = published_objective(loss="smooth_l1", loss_beta=beta, avg_sim_coeff=0)(latents, 0)
        e = (latents.predictions - latents.targets).abs()
        wanted = torch.where(e < beta, e**2 / (2 * beta), e - beta / 2).mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("negatives", ["image", "batch"])
@pytest.mark.parametrize("loss", ["infonce_patches", "norm_l2", "cosine", "l2"])
def test_chance_is_what_predictions_that_know_nothing_cost(loss, negatives):
    targets, images, masked, channels = random_tokens((4, 6, 4096), 5) - 0.7, 4, 6, 4096
    objective = published_objective(loss=loss, avg_sim_coeff=0, negatives=negatives)
    chance = objective.chance(images, masked, channels)
    if loss == "l2":
        assert chance is None
        return
    know_nothing = (
        torch.zeros_like(targets) if loss == "norm_l2" else random_tokens(targets.shape, 6)
    )
    latents = random_latents()._replace(predictions=know_nothing, targets=targets)
    assert objective(latents, 0.0)[0].item() == pytest.approx(chance, rel=0.05)


def slow_sigreg(samples: Tensor, directions: Tensor) -> Tensor:
    """One set of samples [n, D], direction by direction and knot by knot."""
    total = 0
    for direction in directions.T:
        u = samples @ direction
        for knot in range(17):
            t = 3 * knot / 16
            cosine, sine = (t * u).cos().mean(), (t * u).sin().mean()
            normal = math.exp(-(t**2) / 2)
            width = 3 / 16 if knot in (0, 16) else 6 / 16
            distance = (cosine - normal) ** 2 + sine**2
            total = total + len(samples) * width * normal * distance
    return total / directions.shape[1]


def build_sigreg(on: str, **changes) -> SIGReg:
    options = {"weight": 0.3, "slices": 7, "dim": 8, "seed": 1, "processes": 1, "device": CPU}
    return SIGReg(on=on, all_reduce=all_reduce, **options | changes)


@pytest.mark.parametrize("on", ["image", "token"])
def test_sigreg_equals_the_slow_formulation(on):
    sigreg = build_sigreg(on)
    sigreg.draw(3)
    directions = sigreg.directions.double()

    def slow(visible: Tensor) -> Tensor:
        if on == "image":
            return slow_sigreg(visible.mean(dim=1), directions)
        tokens = [slow_sigreg(visible[:, v], directions) for v in range(visible.shape[1])]
        return sum(tokens) / len(tokens)

    assert_same(sigreg, slow, random_tokens((5, 3, 8), 7))
    half = random_tokens((5, 3, 8), 7).bfloat16()
    assert torch.equal(sigreg(half), sigreg(half.float()))


def test_directions_are_new_in_each_step_and_of_length_one():
    drawn = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        sigreg = build_sigreg("image", seed=seed, slices=4000)
        sigreg.draw(step)
        drawn.append(sigreg.directions)
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.testing.assert_close(drawn[0].norm(dim=0), torch.ones(4000))
    assert drawn[0].mean(dim=1).abs().max() < 0.03


def test_sigreg_tells_collapse_from_a_normal_distribution():
    sigreg = build_sigreg("image", dim=64, slices=500)
    sigreg.draw(0)
    normal = torch.randn(256, 1, 64, generator=torch.Generator().manual_seed(0))
    alike = torch.nn.functional.layer_norm(normal[:1], (64,)).expand(256, -1, -1)
    collapsed = sigreg.collapsed(256)
    assert sigreg(normal) < 0.01 * collapsed
    assert sigreg(alike).item() == pytest.approx(collapsed, rel=0.1)


def test_each_process_gets_its_share_of_the_gradient_times_their_number():
    """What others have is added to its own means; here it is known beforehand."""
    samples, knots = random_tokens((6, 4), 8), torch.linspace(0, 3, 17)
    directions = torch.nn.functional.normalize(random_tokens((4, 5), 9), dim=0)
    whole = samples.clone().requires_grad_()
    statistic = epps_pulley(whole, directions, knots).mean()
    statistic.backward()
    angles = (samples @ directions)[..., None] * knots
    parts = [torch.stack([p.cos().mean(0), p.sin().mean(0)]) for p in angles.split(3)]
    own = samples[:3].clone().requires_grad_()
    found = epps_pulley(own, directions, knots, 2, lambda means: means + parts[1]).mean()
    found.backward()
    torch.testing.assert_close(found, statistic)
    torch.testing.assert_close(own.grad, 2 * whole.grad[:3], rtol=1e-4, atol=1e-6)


# ---- Masks. --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("grid", [2, 5, 14])
def test_masks_leave_exactly_so_many_visible(masks, grid):
    for num_vis in range(1, grid**2):
        views = sample_views(
            6, grid, num_vis, 0, torch.Generator().manual_seed(num_vis), masks=masks
        )
        assert views.visible_ids.shape == (6, num_vis)
        ids = torch.cat([views.visible_ids, views.masked_ids], dim=1)
        assert torch.equal(ids.sort(dim=1).values, torch.arange(grid**2).expand(6, -1))


@pytest.mark.parametrize("masks", MASKS[1:])
def test_the_share_of_a_process_is_a_slice_of_all(masks):
    whole, own = (
        sample_views(8, 6, 9, 2, torch.Generator().manual_seed(0), part, masks)
        for part in (slice(None), slice(2, 5))
    )
    assert all(torch.equal(a[2:5], b) for a, b in zip(whole, own, strict=True))


# ---- What does not go together. ------------------------------------------------------------------

LAYERS = "target_layers=[1] mask_target=False"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "target=pixels",
            "avg_sim_coeff=0.1: expected 0 with target=pixels: predictions are pixels",
        ),
        (
            "target=projection target_depth=2",
            "target_depth=2: expected null with target=projection",
        ),
        (
            "target=pixels avg_sim_coeff=0 mask_target=False target_layers=[1]",
            "target_layers=[1]: expected null with target=pixels, which has no blocks",
        ),
        (
            "target_layers=[1]",
            "mask_target=True: expected False with target_layers, which are of all positions",
        ),
        ("target_norm=layer", "target_norm=layer: expected null with target_layers=null"),
        ("target_post_norm=layer", "target_post_norm=layer: expected null with target_layers=null"),
        ("target_tap=mlp", "target_tap=mlp: expected block with target_layers=null"),
        ("loss=l2 pred_unit=null", "pred_unit=null: expected image with loss=l2"),
        ("loss=l2 negatives=batch", "negatives=batch: expected image with loss=l2"),
        ("loss=l2 same_target=0.9", "same_target=0.9: expected null with loss=l2"),
        (
            "negatives=batch same_target=0.9",
            "same_target=0.9: expected null with negatives=batch",
        ),
        ("loss_beta=2", "loss_beta=2: expected 1 with loss=infonce_patches"),
        (
            "negatives=batch batch_size=1639",
            "negatives=batch: expected image, or a batch_size of at most 16384 masked patches, "
            "because each of 16390 is compared with all",
        ),
        (
            f"{LAYERS} target_depth=1",
            "target_layers=[1]: expected top:1 to top:1, or blocks 0 to 0, of the target encoder",
        ),
        (
            "mask_target=False target_layers=top:5",
            "target_layers=top:5: expected top:1 to top:4, or",
        ),
        *(
            (
                f"mask_target=False target_layers={value}",
                "expected top:K, such as top:6, or a list of",
            )
            for value in ("top:0", "6", "[]", "[1,1]", "[-1]", "[a]", "last")
        ),
    ],
)
def test_choices_that_do_not_go_together_are_refused(tmp_path, settings, message):
    cfg = compose_config("demo", [*settings.split(), f"output_dir={tmp_path}"])
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        "target=pixels avg_sim_coeff=0 loss=norm_l2",
        "target=projection pred_unit=null",
        f"{LAYERS} target_norm=instance target_post_norm=layer target_tap=mlp",
        "mask_target=False target_layers=top:4 loss=smooth_l1 loss_beta=2",
        "negatives=batch batch_size=1638",
        "same_target=0.999",
        "target=joint sigreg=0.05 sigreg_on=token avg_sim_coeff=0",
    ],
)
def test_choices_that_go_together(tmp_path, settings):
    check_config(compose_config("demo", [*settings.split(), f"output_dir={tmp_path}"]))


def test_the_choices_are_those_of_the_code():
    assert RULES["masks"][0] == f"one of {', '.join(MASKS)}"
    assert RULES["target.name"][0] == f"one of {', '.join(sorted(TARGETS))}"
