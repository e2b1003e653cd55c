"""AdamW: which parameters decay, the numbers of a step, and steps that are left out."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import reference
from tests.golden.replay import MODEL_KEYS
from tests.published import published_model
from util.optim import build_adamw, decays, parameter_groups

GOLDEN = Path(__file__).parent / "golden"
WEIGHT_DECAY = 0.05


class SmallNet(nn.Module):
    """One parameter of every sort that the decay rule tells apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.embed = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 3))
        self.untrained = nn.Linear(3, 3).requires_grad_(False)


DECAYED = {"linear.weight", "cls_token"}


def set_random_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class ExplicitAdamW:
    """The textbook formulation on float64 copies, name by name."""

    def __init__(self, model: nn.Module):
        self.weights = {name: p.detach().double() for name, p in model.named_parameters()}
        self.states = {name: {} for name in self.weights}

    def step(self, model: nn.Module, rate: float) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decay = WEIGHT_DECAY if name in DECAYED else 0.0
                gradient, state = parameter.grad.double(), self.states[name]
                self.weights[name] = reference.adamw_step(
                    self.weights[name], gradient, state, rate, decay
                )

    def assert_equals(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            expected = self.weights[name].float()
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("description", ["paper_recipe", "regression_plain"])
def test_decay_sets_are_the_published_ones(description):
    published = json.loads((GOLDEN / f"{description}.json").read_text())
    config = published["config"]
    model = published_model(**{key: config[key] for key in MODEL_KEYS if key in config})
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, others = parameter_groups(model, WEIGHT_DECAY)
    assert (decayed["weight_decay"], others["weight_decay"]) == (WEIGHT_DECAY, 0.0)
    assert sorted(names[p] for p in decayed["params"]) == sorted(published["decay"])
    assert sorted(names[p] for p in others["params"]) == sorted(published["no_decay"])


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("encoder.blocks.0.attn.qkv.weight", (6, 2), True),
        ("encoder.cls_token", (1, 1, 2), True),
        ("decoder.mask_token", (1, 1, 2), True),
        ("encoder.head.linear0.weight", (2, 2), True),
        ("encoder.embed.proj.weight", (2, 2), False),
        ("encoder.pos_embed.pos_embeds", (5, 2), False),
        ("decoder.embed.weight", (2, 2), False),
        ("decoder.blocks.0.norm2kv.weight", (2,), False),
        ("encoder.blocks.0.attn.qkv.bias", (6,), False),
        ("anything.with_one_dimension", (2,), False),
    ],
)
def test_which_parameters_decay(name, shape, expected):
    assert decays(name, nn.Parameter(torch.zeros(shape))) is expected


def test_groups_hold_trained_parameters_only():
    model = SmallNet()
    held = {p for group in parameter_groups(model, WEIGHT_DECAY) for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}


def test_steps_equal_the_explicit_formulation():
    model = SmallNet()
    optimizer, explicit = build_adamw(model, WEIGHT_DECAY), ExplicitAdamW(model)
    for step, rate in enumerate([0.1, 0.02, 0.3, 0.05, 0.1]):
        set_random_gradients(model, seed=step)
        set_learning_rate(optimizer, rate)
        optimizer.step()
        explicit.step(model, rate)
        explicit.assert_equals(model)


def test_learning_rate_zero_until_it_is_set():
    model = SmallNet()
    before = copy.deepcopy(model.state_dict())
    optimizer = build_adamw(model, WEIGHT_DECAY)
    set_random_gradients(model, seed=0)
    optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("steps_before", [0, 2])
def test_found_inf_leaves_everything_untouched(steps_before):
    model = SmallNet()
    optimizer, explicit = build_adamw(model, WEIGHT_DECAY), ExplicitAdamW(model)
    set_learning_rate(optimizer, 0.1)

    def good_step(seed):
        set_random_gradients(model, seed)
        optimizer.found_inf = torch.tensor(0.0)
        optimizer.step()
        explicit.step(model, 0.1)

    for seed in range(steps_before):
        good_step(seed)
    weights = copy.deepcopy(model.state_dict())
    set_random_gradients(model, seed=50)
    model.linear.weight.grad[0, 0] = torch.inf
    model.cls_token.grad[:] = torch.nan
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()

    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    for index, state in optimizer.state_dict()["state"].items():
        assert state["step"] == steps_before
        for moment in ("exp_avg", "exp_avg_sq"):
            # Before the first step there are no moments yet; those made now must be the start.
            expected = moments[index][moment] if steps_before else torch.zeros_like(state[moment])
            assert torch.equal(state[moment], expected)
    # And the next good step is what it would have been without the bad one.
    good_step(seed=51)
    explicit.assert_equals(model)
