"""What is tuned on a CPU, when, and that it is the same attention."""

import pytest
import torch
from timm.models.vision_transformer import Attention

from models.decoder import CrossAttention
from tests.test_models import random_inputs, small_model
from util.precision import tune_for_cpu


@pytest.mark.parametrize("precision, is_fused", [("fp32", True), ("bf16", False)])
def test_attention_is_written_out_in_bf16(precision, is_fused):
    model, config = small_model()
    inputs, names = random_inputs(config), list(model.state_dict())
    expected = model(*inputs)
    tune_for_cpu(model, precision)
    fused = {m.fused_attn for m in model.modules() if isinstance(m, Attention | CrossAttention)}
    assert fused == {is_fused} and list(model.state_dict()) == names
    for found, wanted in zip(model(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
