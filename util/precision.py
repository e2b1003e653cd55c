"""Which arithmetic the networks use, and what makes it faster on CPUs."""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch
from timm.models.vision_transformer import Attention
from torch import nn

from launch.config import ConfigError
from models.decoder import CrossAttention

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>


def choose_precision(wanted: str, device: torch.device) -> str:
    """bf16, fp16 or fp32; auto is what the device is fast at."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        possible = ["bf16", "fp16", "fp32"] if has_bf16 else ["fp16", "fp32"]
    else:
        possible = ["bf16", "fp32"] if processor_is_fast_at_bf16() else ["fp32", "bf16"]
    if wanted == "auto":
        return possible[0]
    if wanted not in possible:
        raise ConfigError(
            f"precision={wanted}: expected auto, {' or '.join(possible)} on {device.type}"
        )
    return wanted


def processor_is_fast_at_bf16() -> bool:
    """Without these instructions bf16 is emulated, and slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def tune_for_cpu(model: nn.Module, precision: str) -> None:
    """Parameters and their names stay as they are."""
    keep_freed_memory()
    if precision == "bf16":
        write_out_attention(model)  # the fused one takes up to twice as long


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
