"""Linear heads on frozen features: pooling, batch norm over all processes, one linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.backbone import Tokens
from eval.features import pool, pooled_width
from util.distributed import all_reduce

ATTENTIVE = "attentive"
CHANNELS_PER_QUERY = 64


def probe_features(tokens: Tokens, pooling: str) -> Tensor:
    """What the heads of one pooling start from: [B, D or 2 D], or tokens [B, L, D]."""
    if pooling == ATTENTIVE:
        return F.layer_norm(tokens.patches.float(), tokens.patches.shape[-1:])
    return pool(tokens, pooling).float()


class SumOverProcesses(torch.autograd.Function):
    """Each process gets the sum; gradients come back from all of them."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return all_reduce(values.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce(gradient.clone())


class GlobalBatchNorm(nn.Module):
    """BatchNorm1d(affine=False) whose statistics are those of the images of all processes.

    In float64, so that the split into processes is lost in the rounding to float32. (torch's own
    SyncBatchNorm needs a GPU.) All processes have the same number of images.
    """

    def __init__(self, dim: int, world_size: int, eps: float = 1e-6, momentum: float = 0.1):
        super().__init__()
        self.world_size, self.eps, self.momentum = world_size, eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(dim, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, D]"""
        features = features.double()
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = self.statistics(features)
        return ((features - mean) * (var + self.eps).rsqrt()).float()

    def statistics(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Of this batch; they also move the running ones."""
        count = len(features) * self.world_size
        mean = SumOverProcesses.apply(features.sum(dim=0)) / count
        var = SumOverProcesses.apply((features - mean).square().sum(dim=0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)
        return mean, var


class AttentivePool(nn.Module):
    """Attention of learned queries to the patch tokens, one query per 64 channels.

    A key projection would be absorbed by the queries, and values are projected after the pooling:
    both are linear, so this is multi-head attention with a learned query, at a small share of its
    cost.
    """

    def __init__(self, dim: int, generator: torch.Generator):
        super().__init__()
        most = max(1, dim // CHANNELS_PER_QUERY)
        self.queries = next(count for count in range(most, 0, -1) if dim % count == 0)
        self.query = nn.Parameter(torch.empty(self.queries, dim))
        self.value = nn.Parameter(torch.empty(dim, dim))
        nn.init.normal_(self.query, std=0.02, generator=generator)
        nn.init.xavier_uniform_(self.value, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, D] -> [B, D]"""
        attention = (tokens @ self.query.T).softmax(dim=1)  # [B, L, queries]
        pooled = attention.transpose(1, 2) @ tokens  # [B, queries, D]
        value = self.value.unflatten(0, (self.queries, -1))  # [queries, D / queries, D]
        return torch.einsum("bqd,qed->bqe", pooled, value).flatten(1)


class ProbeHead(nn.Module):
    """One pooling, trained with one learning rate."""

    def __init__(self, pooling: str, dim: int, classes: int, world_size: int, seed: int):
        super().__init__()
        # The start of a head does not depend on its learning rate or on other heads.
        generator = torch.Generator().manual_seed(seed)
        self.pooling = pooling
        self.pool = AttentivePool(dim, generator) if pooling == ATTENTIVE else nn.Identity()
        width = pooled_width(dim, pooling)
        self.norm = GlobalBatchNorm(width, world_size)
        self.linear = nn.Linear(width, classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """-> logits [B, classes]"""
        return self.linear(self.norm(self.pool(features[self.pooling])))
