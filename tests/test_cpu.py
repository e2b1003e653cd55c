"""Products by convolution are the products that they stand for."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn

from models.decoder import CrossAttention
from models.vit import Encoder
from tests.published import published_model
from util.cpu import (
    FEWEST_TOKENS,
    PixelLinear,
    PixelProduct,
    multiply_by_convolution,
    tune_for_cpu,
)


@pytest.fixture
def any_number_of_tokens(monkeypatch):
    monkeypatch.setattr("util.cpu.FEWEST_TOKENS", 0)


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
@pytest.mark.usefixtures("any_number_of_tokens")
def test_as_the_linear_layer(layout, with_bias):
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
        output = layer(leaf)
        # A gradient that is not contiguous, as a transposition after the layer leaves it.
        output.transpose(1, 2).square().sum().backward()
        results.append([output, leaf.grad, *(p.grad for p in layer.parameters())])
    for expected, found in zip(*results, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        smallest = 1e-5 * float(expected.detach().abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=smallest)


@pytest.mark.parametrize(
    "tokens, dtype, is_convolution",
    [
        (FEWEST_TOKENS, torch.float32, True),
        (FEWEST_TOKENS - 1, torch.float32, False),
        (FEWEST_TOKENS, torch.float64, False),
    ],
)
def test_few_tokens_and_other_types_are_multiplied_as_ever(tokens, dtype, is_convolution):
    layer = nn.Linear(512, 512, dtype=dtype)
    multiply_by_convolution(layer)
    product = layer(torch.randn(1, tokens, 512, dtype=dtype))
    assert (product.grad_fn.name() == "PixelProductBackward") == is_convolution


@pytest.mark.parametrize(
    "precision, compiled, processor, is_convolution, is_fused",
    [
        ("fp32", False, "AVX512", True, True),
        ("fp32", False, "AVX2", False, True),
        ("fp32", True, "AVX512", False, True),
        ("bf16", False, "AVX512", False, False),
    ],
)
def test_what_is_tuned(monkeypatch, precision, compiled, processor, is_convolution, is_fused):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: processor)
    model = published_model(depth=1, embed_dim=768, decoder_depth=1)
    tune_for_cpu(model, precision, compiled)
    assert any(isinstance(m, PixelLinear) for m in model.modules()) == is_convolution
    fused = {m.fused_attn for m in model.modules() if isinstance(m, Attention | CrossAttention)}
    assert fused == {is_fused}


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
            grid_size=4,
            patch_size=4,
            embed_dim=512,
            depth=1,
            num_heads=8,
            freeze_pe=True,
            mlp_dim=4096,
            mlp_depth=3,
            recompute=recompute,
        )
        multiply_by_convolution(encoder)
        tokens = encoder.forward_features(torch.randn(8, 5, 48), torch.arange(5).expand(8, -1))
        tokens.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    for ours in gradients[1:]:
        assert all(map(torch.equal, ours, gradients[0]))


def test_names_stay_and_small_layers_do():
    model = nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 2))
    names = list(model.state_dict())
    multiply_by_convolution(model)
    assert [type(m) for m in model] == [PixelLinear, nn.LayerNorm, nn.Linear]  # 2 is too small
    assert list(model.state_dict()) == names
    assert model(torch.randn(5, 512)).shape == (5, 2)  # rows that are no token sequences
