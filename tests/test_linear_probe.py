"""Linear probe: LARS, batch norm over processes, heads together and alone, resume, bad input."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.base import DataError
from eval.backbone import Tokens
from eval.common import (
    LabelledImages,
    check_same_backbone,
    count_classes,
    count_hits,
    run_joined,
)
from eval.linear_probe import (
    AttentivePool,
    GlobalBatchNorm,
    Probe,
    ProbeHead,
    evaluate,
    main,
    probe_features,
)
from launch.config import ConfigError
from tests.backbones import digits_checkpoint, load_backbone
from tests.evaluations import (
    EVAL,
    TRAIN,
    assert_bad_input,
    config,
    few_digits,
    numbers,
    results,
    stop_in_step,
    unlabelled_folder,
)
from tests.runs import assert_same_state, final_state
from tests.test_distributed import spawn
from util.checkpoint import CheckpointError
from util.optim import LARS, warmup_cosine

# ---- Parts. --------------------------------------------------------------------------------------


def lars_by_hand(weight, gradients, lr, weight_decay):
    """In numpy, from the definition. Vectors: momentum only."""
    weight, velocity = weight.copy(), np.zeros_like(weight)
    for gradient in gradients:
        direction = gradient.copy()
        if weight.ndim > 1:
            direction += weight_decay * weight
            sizes = np.linalg.norm(weight), np.linalg.norm(direction)
            direction *= 0.001 * sizes[0] / sizes[1] if min(sizes) > 0 else 1.0
        velocity = 0.9 * velocity + direction
        weight -= lr * velocity
    return weight


@pytest.mark.parametrize("shape", [(4, 5), (5,), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["random", "zero weight", "zero gradient"])
def test_lars_equals_the_definition(shape, kind):
    rng = np.random.default_rng(1)
    start = rng.normal(size=shape) * (kind != "zero weight")
    gradients = [rng.normal(size=shape) * (kind != "zero gradient") for _ in range(3)]
    parameter = nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = LARS([parameter], lr=0.7, weight_decay=0.03)
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    expected = lars_by_hand(start, gradients, 0.7, 0.03)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_learning_rate_rises_from_zero_and_ends_at_the_floor():
    shares = [warmup_cosine(epoch, 0.1, 10, 90) for epoch in (0, 5, 10, 50, 90)]
    assert shares == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    assert warmup_cosine(3, 0.0, 3, 3) == 1.0


def test_batch_norm_equals_torch():
    ours, theirs = GlobalBatchNorm(6, 1), nn.BatchNorm1d(6, eps=1e-6, affine=False)
    for seed in range(3):
        features = 3 * torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) + 1
        torch.testing.assert_close(ours(features), theirs(features), rtol=1e-5, atol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(features), theirs(features), rtol=1e-5, atol=1e-5)


def test_attentive_pooling_equals_multi_head_attention():
    """torch's, with its projections set to what absorbs ours: keys are the tokens themselves."""
    dim, tokens = 128, torch.randn(3, 7, 128)
    pooling = AttentivePool(dim, torch.Generator().manual_seed(0))
    assert pooling.queries == 2
    attention = nn.MultiheadAttention(dim, 2, bias=False, batch_first=True)
    with torch.no_grad():
        for head in range(2):
            rows = slice(64 * head, 64 * (head + 1))
            # Query e of a head, times a key projection: any (q, W) with q W / 8 = our query.
            key = torch.randn(64, dim)
            query = torch.linalg.lstsq(key.T, pooling.query[head][:, None]).solution[:, 0]
            pooling.query[head] = query @ key
            attention.in_proj_weight[rows] = torch.outer(8 * query, torch.eye(dim)[0])
            attention.in_proj_weight[dim:][rows] = key
            attention.in_proj_weight[2 * dim :][rows] = pooling.value[rows]
        attention.out_proj.weight.copy_(torch.eye(dim))
        asked = torch.eye(dim)[0].expand(3, 1, dim)
        expected = attention(asked, tokens, tokens)[0][:, 0]
    torch.testing.assert_close(pooling(tokens), expected, rtol=1e-4, atol=1e-5)


def test_attentive_pooling_starts_from_each_token_normalised():
    tokens = 3 * torch.randn(2, 7, 128) + torch.randn(7, 1)
    found = probe_features(Tokens(None, tokens, (1, 7)), "attentive")
    expected = torch.stack([F.layer_norm(own, [128]) for own in tokens.flatten(0, 1)])
    torch.testing.assert_close(found.flatten(0, 1), expected)


def test_heads_start_alike_and_as_in_the_recipe():
    one, other = (ProbeHead("mean", 500, 40, 1, seed=3) for _ in range(2))
    assert torch.equal(one.linear.weight, other.linear.weight)
    assert one.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not one.linear.bias.any()
    assert [name for name, _ in one.named_parameters()] == ["linear.weight", "linear.bias"]


def norm_a_share(ranks, folder) -> None:
    torch.manual_seed(0)
    features = torch.randn(8, 5, requires_grad=True)
    norm = GlobalBatchNorm(5, ranks.world_size)
    own = features.view(ranks.world_size, -1, 5)[ranks.rank]
    normed = norm(own)
    weights = torch.arange(40.0).view(ranks.world_size, -1, 5)[ranks.rank]
    (normed * weights).sum().backward()
    torch.save((normed, features.grad, norm.running_var), folder / f"share{ranks.rank}")


@pytest.mark.slow
def test_batch_norm_of_two_processes_is_that_of_one(tmp_path):
    spawn(norm_a_share, 2, tmp_path, tmp_path)
    (normed0, grad0, var0), (normed1, grad1, _) = (
        torch.load(tmp_path / f"share{rank}") for rank in range(2)
    )
    torch.manual_seed(0)
    features = torch.randn(8, 5, requires_grad=True)
    norm = nn.BatchNorm1d(5, eps=1e-6, affine=False)
    normed = norm(features)
    (normed * torch.arange(40.0).view(8, 5)).sum().backward()
    torch.testing.assert_close(torch.cat([normed0, normed1]), normed, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad0 + grad1, features.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var0.float(), norm.running_var)


def test_hits_are_counted_and_what_is_not_finite_is_none():
    logits = torch.tensor([[3.0, 2, 1, 0, 0, -1], [0, 1, 2, 3, 4, 5], [torch.nan, 9, 0, 0, 0, 0]])
    assert count_hits(logits, torch.tensor([0, 0, 1])).tolist() == [1, 1]
    assert count_hits(logits[:, :2], torch.tensor([1, 1, 0])).tolist() == [1, 2]


def test_classes_are_counted_and_must_be_trained():
    assert count_classes(torch.tensor([0, 3, 1]), torch.tensor([3])) == 4
    with pytest.raises(DataError, match="classes 2 of the evaluation have no training image"):
        count_classes(torch.tensor([0, 3]), torch.tensor([0, 2]))


def test_images_without_label_are_left_out():
    from data.datasets import build_digits

    digits = build_digits("eval", None)
    digits.labels[::2] = -1
    labelled = LabelledImages(digits)
    assert len(labelled) == len(digits) // 2
    assert labelled.describe(1) == "digits/eval[3]" and labelled.labels[1] == digits.labels[3]


def test_another_backbone_is_not_resumed(checkpoint):
    """Another part of the same file is another backbone, too."""
    before = load_backbone(checkpoint).describe()
    check_same_backbone({"backbone": before}, load_backbone(checkpoint))
    changes = {"which": "target", "layer": 0, "final_norm": False, "image_side": 36}
    for change in [*({key: value} for key, value in changes.items()), {"random_init": True}]:
        now = load_backbone(checkpoint, **change)
        with pytest.raises(CheckpointError, match="belongs to another backbone"):
            check_same_backbone({"backbone": before}, now)


# ---- Runs. ---------------------------------------------------------------------------------------

SHORT = "epochs=2 warmup_epochs=1 batch_size=32 print_freq=1 eval_freq=2 blrs=[0.1,20]".split()


@pytest.fixture(scope="module", autouse=True)
def checkpoint(tmp_path_factory):
    with few_digits():
        yield digits_checkpoint(tmp_path_factory.mktemp("pretrained"))


def probe(checkpoint, folder, *overrides: str) -> dict:
    main(config("linear_probe", checkpoint, folder, *SHORT, *overrides))
    return final_state(folder / "linear_probe")["state_dict"]


def test_heads_of_a_run_equal_that_of_a_run_of_its_own(checkpoint, tmp_path):
    """To the last bit."""
    together = probe(checkpoint, tmp_path / "all", "poolings=[cls,mean,cls+mean,attentive]")
    for pooling, blr in (("attentive", 20), ("cls+mean", 0.1)):
        one = [f"poolings=[{pooling}]", f"blrs=[{blr}]"]
        for key, value in probe(checkpoint, tmp_path / pooling, *one).items():
            assert torch.equal(value, together[key]), key


def test_stored_features_are_those_of_each_pooling(checkpoint, tmp_path):
    """Of several poolings they come from one pass."""
    together = probe(checkpoint, tmp_path / "all", "poolings=[mean,cls+mean,cls]", "cached=True")
    for pooling in ("cls", "mean"):
        one = [f"poolings=[{pooling}]", "blrs=[20]", "cached=True"]
        for key, value in probe(checkpoint, tmp_path / pooling, *one).items():
            assert torch.equal(value, together[key]), key


def run_main(ranks, checkpoint, folder, runs: dict[str, list[str]]) -> None:
    with few_digits():
        for name, overrides in runs.items():
            cfg = config("linear_probe", checkpoint, folder / name, *SHORT, *overrides)
            run_joined(cfg, ranks, evaluate)


@pytest.mark.slow
def test_the_split_into_processes_and_batches_changes_nothing(checkpoint, tmp_path):
    """Weights to 1e-4 of their size, accuracies to one image."""
    runs = {
        "crops": ["batch_size=64", "poolings=[mean,attentive]"],
        "stored": ["batch_size=64", "poolings=[cls,mean]", "cached=True"],
    }
    spread = {name: [*own, "batch_size=16", "accum_iter=2"] for name, own in runs.items()}
    spawn(run_main, 2, tmp_path, checkpoint, tmp_path / "two", spread)
    for name, own in runs.items():
        one = probe(checkpoint, tmp_path / "one" / name, *own)
        split = ["batch_size=16", "accum_iter=4"]
        alone = probe(checkpoint, tmp_path / "split" / name, *own, *split)
        two = final_state(tmp_path / "two" / name / "linear_probe")["state_dict"]
        for key, value in one.items():
            for other in (alone, two):
                assert (other[key] - value).norm() <= 1e-4 * value.norm() + 1e-9, key
        first, *others = (
            results(tmp_path / way / name, "linear_probe")["results"]
            for way in ("one", "split", "two")
        )
        for other in others:
            assert other == pytest.approx(first, abs=100 / EVAL + 1e-9)


def test_stopped_and_resumed_equals_undisturbed(checkpoint, tmp_path, monkeypatch):
    settings = ["poolings=[mean,attentive]", "resume=True"]
    probe(checkpoint, tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        stop_in_step(patch, Probe, 6)
        with pytest.raises(SystemExit):
            probe(checkpoint, tmp_path / "broken", *settings)
    whole, broken = (tmp_path / name / "linear_probe" for name in ("whole", "broken"))
    assert final_state(broken)["step"] == 7
    with pytest.raises(CheckpointError, match="belongs to another backbone"):
        probe(digits_checkpoint(tmp_path, seed=1), tmp_path / "broken", *settings)
    probe(checkpoint, tmp_path / "broken", *settings)
    assert_same_state(final_state(broken), final_state(whole))
    assert numbers(broken) == numbers(whole)
    found = results(tmp_path / "broken", "linear_probe")["results"]
    assert found == results(tmp_path / "whole", "linear_probe")["results"]


# ---- Bad input. ----------------------------------------------------------------------------------


def test_a_dataset_without_labels_is_refused(checkpoint, tmp_path):
    cfg = config("linear_probe", checkpoint, tmp_path, *unlabelled_folder(tmp_path / "images"))
    assert_bad_input(
        main, cfg, DataError, "no image of its train split has a label, and linear_probe"
    )


def test_attentive_needs_the_tokens(checkpoint, tmp_path):
    cfg = config("linear_probe", checkpoint, tmp_path, "cached=True", "poolings=[attentive]")
    assert_bad_input(main, cfg, ConfigError, "cached=True: expected poolings without attentive")


@pytest.mark.parametrize("cached", [False, True])
def test_a_step_larger_than_the_dataset_is_refused(checkpoint, tmp_path, cached):
    settings = [f"cached={cached}", f"batch_size={TRAIN + 1}"]
    cfg = config("linear_probe", checkpoint, tmp_path, *settings)
    assert_bad_input(main, cfg, DataError, f"has {TRAIN} images, but one step needs {TRAIN + 1}")


def test_an_earlier_run_is_not_lost_by_accident(checkpoint, tmp_path):
    folder = tmp_path / "linear_probe" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000003.pth").write_text("")
    cfg = config("linear_probe", checkpoint, tmp_path)
    assert_bad_input(main, cfg, ConfigError, "choose resume=True")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("blrs=[]", "a list of different numbers above 0"),
        ("blrs=[0.1,0.1]", "a list of different numbers above 0"),
        ("blrs=[0]", "a list of different numbers above 0"),
        ("blrs=0.1", "a list of different numbers above 0"),
        ("poolings=[max]", "a list of different ones of cls, mean"),
        ("poolings=[cls,cls]", "a list of different ones of cls, mean"),
        ("warmup_epochs=91", "expected 0 to 90"),
    ],
)
def test_invalid_values_are_refused(checkpoint, tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        config("linear_probe", checkpoint, tmp_path, override)
