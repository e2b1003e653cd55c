"""Products by convolution are the products that they stand for."""

import pytest
import torch
from torch import nn

from models.linear import FEWEST_TOKENS, PixelLinear, PixelProduct, multiply_by_convolution
from models.vit import Encoder


@pytest.fixture
def any_number_of_tokens(monkeypatch):
    monkeypatch.setattr("models.linear.FEWEST_TOKENS", dict.fromkeys(FEWEST_TOKENS, 0))


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
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
@pytest.mark.usefixtures("any_number_of_tokens")
def test_as_the_linear_layer(layout, with_bias, precision, tolerance):
    torch.manual_seed(0)
    tokens = {
        "contiguous": lambda: torch.randn(8, 21, 448),
        "slice": lambda: torch.randn(8, 22, 448)[:, 1:],
        "transposed": lambda: torch.randn(8, 448, 21).transpose(1, 2),
        "expanded": lambda: torch.randn(1, 21, 448).expand(8, -1, -1),
        "one token": lambda: torch.randn(8, 1, 448),
    }[layout]()
    theirs = nn.Linear(448, 640, bias=with_bias)
    ours = nn.Linear(448, 640, bias=with_bias)
    ours.load_state_dict(theirs.state_dict())
    multiply_by_convolution(ours)
    assert type(ours) is PixelLinear
    results = []
    for layer in (theirs, ours):
        leaf = tokens.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = layer(leaf)
        # A gradient that is not contiguous, as a transposition after the layer leaves it.
        output.transpose(1, 2).square().sum().backward()
        results.append([output, leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        smallest = tolerance * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=smallest)


@pytest.mark.parametrize("dtype", FEWEST_TOKENS)
def test_few_tokens_are_multiplied_as_ever(dtype):
    layer = nn.Linear(512, 512)
    multiply_by_convolution(layer)
    for tokens, expected in (
        (FEWEST_TOKENS[dtype] - 1, "ViewBackward0 UnsafeViewBackward0 AddmmBackward0".split()),
        (FEWEST_TOKENS[dtype], ["PixelProductBackward"]),
    ):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            product = layer(torch.randn(1, tokens, 512))
        assert product.dtype == dtype and product.grad_fn.name() in expected


@pytest.mark.usefixtures("any_number_of_tokens")
def test_only_what_is_needed_is_computed():
    layer = nn.Linear(512, 512)
    multiply_by_convolution(layer)
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 3, 512)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.tolist() == [6.0] * 512
    with torch.no_grad():
        assert layer(torch.randn(2, 3, 512)).grad_fn is None


@pytest.mark.usefixtures("any_number_of_tokens")
def test_recomputing_and_repeating_change_no_bit():
    gradients = []
    for recompute in (False, True, False):
        torch.manual_seed(0)
        encoder = Encoder(
            grid_size=4, patch_size=4, embed_dim=512, depth=1, num_heads=8, recompute=recompute
        )
        multiply_by_convolution(encoder)
        tokens = encoder.forward_features(torch.randn(8, 5, 48), torch.arange(5).expand(8, -1))
        tokens.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for ours in gradients[1:]:
        assert all(map(torch.equal, ours, gradients[0]))


def test_there_and_back():
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 2))
    names = list(model.state_dict())
    multiply_by_convolution(model)
    assert [type(m) for m in model] == [PixelLinear, nn.LayerNorm, nn.Linear]  # 2 is too small
    assert list(model.state_dict()) == names
    assert model(torch.randn(5, 512)).shape == (5, 2)  # rows that are no token sequences
    multiply_by_convolution(model, on=False)
    assert [type(m) for m in model] == [nn.Linear, nn.LayerNorm, nn.Linear]
