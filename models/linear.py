"""Linear layers for training on CPUs in float32: faster matrix products.

A linear layer is a convolution with one pixel, tokens in place of pixels. torch hands convolutions
to oneDNN, and float32 matrix products to a library that is slower on some processors
(bench/RESULTS.md). The gradient of the weights stays a matrix product: there that is the faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input


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
            shape = as_pixels(tokens).shape
            pixels = conv2d_input(shape, weight[:, :, None, None], as_pixels(gradient))
            for_tokens = as_tokens(pixels)
        if ctx.needs_input_grad[1]:
            for_weight = gradient.flatten(0, 1).T @ tokens.flatten(0, 1)
        if ctx.needs_input_grad[2]:
            for_bias = gradient.sum(dim=(0, 1))
        return for_tokens, for_weight, for_bias


class PixelLinear(nn.Linear):
    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 3:
            return super().forward(tokens)
        return PixelProduct.apply(tokens, self.weight, self.bias)


def multiply_by_convolution(model: nn.Module, on: bool = True) -> None:
    """In all linear layers of the model. Parameters and their names stay as they are."""
    was, becomes = (nn.Linear, PixelLinear) if on else (PixelLinear, nn.Linear)
    for module in model.modules():
        if type(module) is was:
            module.__class__ = becomes
