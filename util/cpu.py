"""What makes training faster on CPUs (docs/results.md has the figures): memory that is kept; in
fp32 with AVX-512, large matrix products by convolution; in bf16, attention written out.

A linear layer is a convolution with one pixel, tokens in place of pixels. torch hands convolutions
to oneDNN, and float32 matrix products to a library that is slower where there is AVX-512, faster
where there is not. The gradient of the weights stays a matrix product: there that is the faster.
"""

import ctypes
from contextlib import suppress

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.decoder import CrossAttention

# Entries of a weight matrix; below, calling a convolution costs more than it saves.
SMALLEST = 2**18
# oneDNN reorders the weights in each call, which pays off from this many tokens on.
FEWEST_TOKENS = 512
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>
ONE_PIXEL = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
ONE_PIXEL |= {"transposed": False, "output_padding": [0, 0]}


def as_pixels(tokens: Tensor) -> Tensor:
    """[N, L, D] -> [N, D, L, 1] over the same memory: channels last, as oneDNN wants them."""
    return tokens.contiguous()[:, :, None].permute(0, 3, 1, 2)


def as_tokens(pixels: Tensor) -> Tensor:
    """[N, D, L, 1] -> [N, L, D]"""
    return pixels.permute(0, 2, 3, 1)[:, :, 0]


class PixelProduct(torch.autograd.Function):
    """tokens [N, L, D], weight [E, D], bias [E] or None -> [N, L, E]"""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return as_tokens(F.conv2d(as_pixels(tokens), weight[:, :, None, None], bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        for_tokens = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            # torch.nn.grad.conv2d_input would do, but makes and copies an input of its own.
            pixels, _, _ = torch.ops.aten.convolution_backward(
                as_pixels(gradient),
                as_pixels(tokens),
                weight[:, :, None, None],
                bias_sizes=None,
                **ONE_PIXEL,
                output_mask=[True, False, False],
            )
            for_tokens = as_tokens(pixels)
        if ctx.needs_input_grad[1]:
            for_weight = gradient.flatten(0, 1).T @ tokens.flatten(0, 1)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(dim=(0, 1))
        return for_tokens, for_weight, for_bias


class PixelLinear(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        is_large = tokens.dim() == 3 and tokens.shape[:2].numel() >= FEWEST_TOKENS
        if not is_large or tokens.dtype != torch.float32:
            return super().forward(tokens)
        return PixelProduct.apply(tokens, self.weight, self.bias)


def tune_for_cpu(model: nn.Module, precision: str, compiled: bool) -> None:
    """Parameters and their names stay as they are."""
    keep_freed_memory()
    if precision == "bf16":
        write_out_attention(model)  # the fused one takes up to twice as long
    elif not compiled and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # Not where it is compiled: the compiler chooses its own products.
        multiply_by_convolution(model)


def multiply_by_convolution(model: nn.Module) -> None:
    """In the large linear layers of the model."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALLEST:
            module.__class__ = PixelLinear


def write_out_attention(model: nn.Module) -> None:
    """As matrix products and a softmax, instead of one fused operation."""
    for module in model.modules():
        if isinstance(module, Attention | CrossAttention):
            module.fused_attn = False


def keep_freed_memory() -> None:
    """Each step frees what the next one needs again. The C library hands large pieces back to the
    system, which then clears and maps every page again (glibc only)."""
    with suppress(AttributeError, OSError):
        malloc_option = ctypes.CDLL(None).mallopt
        # Not a high M_MMAP_THRESHOLD: where that is refused, the other option alone makes it worse.
        malloc_option(M_MMAP_MAX, 0)  # no pieces of their own
        malloc_option(M_TRIM_THRESHOLD, -1)  # never give back
