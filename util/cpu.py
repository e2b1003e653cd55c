"""What makes training faster on CPUs (docs/results.md has the figures): memory that is kept; in
bf16, attention written out.
"""

import ctypes
from contextlib import suppress

from timm.models.vision_transformer import Attention
from torch import nn

from models.decoder import CrossAttention

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # <malloc.h>


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
