"""Products by convolution are the products that they stand for."""

import pytest
import torch
from torch import nn

from models.linear import PixelLinear, PixelProduct, multiply_by_convolution


@pytest.mark.parametrize("with_bias", [True, False])
def test_against_finite_differences(with_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5, 4), (6, 4), (6,)] if with_bias else [(3, 5, 4), (6, 4)]
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in shapes
    ]
    assert torch.autograd.gradcheck(
        lambda tokens, weight, bias=None: PixelProduct.apply(tokens, weight, bias), inputs
    )


@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed", "expanded", "one token"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_as_the_linear_layer(layout, with_bias):
    torch.manual_seed(0)
    tokens = {
        "contiguous": lambda: torch.randn(8, 21, 48),
        "slice": lambda: torch.randn(8, 22, 48)[:, 1:],
        "transposed": lambda: torch.randn(8, 48, 21).transpose(1, 2),
        "expanded": lambda: torch.randn(1, 21, 48).expand(8, -1, -1),
        "one token": lambda: torch.randn(8, 1, 48),
    }[layout]()
    theirs = nn.Linear(48, 80, bias=with_bias)
    ours = nn.Linear(48, 80, bias=with_bias)
    ours.load_state_dict(theirs.state_dict())
    multiply_by_convolution(ours)
    assert type(ours) is PixelLinear
    results = []
    for layer in (theirs, ours):
        leaf = tokens.clone(memory_format=torch.preserve_format).requires_grad_()
        output = layer(leaf)
        # A gradient that is not contiguous, as a transposition after the layer leaves it.
        output.transpose(1, 2).square().sum().backward()
        results.append([output, leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_only_what_is_needed_is_computed():
    layer = nn.Linear(4, 4)
    multiply_by_convolution(layer)
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 3, 4)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.tolist() == [6.0] * 4
    assert not layer(torch.randn(2, 3, 4).detach()).detach().requires_grad
    with torch.no_grad():
        assert layer(torch.randn(2, 3, 4)).grad_fn is None


def test_there_and_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    names = list(model.state_dict())
    multiply_by_convolution(model)
    assert [type(m) for m in model] == [PixelLinear, nn.LayerNorm, PixelLinear]
    assert list(model.state_dict()) == names
    assert model(torch.randn(5, 4)).shape == (5, 2)  # rows that are no token sequences
    multiply_by_convolution(model, on=False)
    assert [type(m) for m in model] == [nn.Linear, nn.LayerNorm, nn.Linear]
