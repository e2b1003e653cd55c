"""Which arithmetic the networks use."""

from pathlib import Path

import torch

from launch.config import ConfigError


def choose_precision(wanted: str, device: torch.device) -> str:
    """bf16, fp16 or fp32; auto is what the device is fast at."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if wanted == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise ConfigError(f"precision=bf16: {name} has no bf16; expected auto, fp16 or fp32")
        fastest = "bf16" if has_bf16 else "fp16"
    else:
        if wanted == "fp16":
            raise ConfigError(f"precision=fp16: expected auto, bf16 or fp32 on {device.type}")
        fastest = "bf16" if processor_is_fast_at_bf16() else "fp32"
    return fastest if wanted == "auto" else wanted


def processor_is_fast_at_bf16() -> bool:
    """Without these instructions bf16 is emulated, and slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not words.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})
