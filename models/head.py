"""Projection head: the MLP on top of the encoder, present while pre-training and removed for
evaluation.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """mlp_depth linear layers without bias, each followed by LayerNorm (eps 1e-5), GELU after every
    hidden one.

    dim -> mlp_dim -> ... -> mlp_dim -> dim; mlp_depth 1 is dim -> dim; mlp_depth 0 is the identity.
    """

    def __init__(self, dim: int, mlp_dim: int, mlp_depth: int):
        super().__init__()
        self.depth = mlp_depth
        widths = [dim] + [mlp_dim] * (mlp_depth - 1) + [dim]
        # Named linear0, norm0, ... and not held in a list: these are the key names of the published
        # checkpoint.
        for layer in range(mlp_depth):
            linear = nn.Linear(widths[layer], widths[layer + 1], bias=False)
            self.add_module(f"linear{layer}", linear)
            self.add_module(f"norm{layer}", nn.LayerNorm(widths[layer + 1], eps=1e-5))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [N, L, dim] -> [N, L, dim]"""
        for layer in range(self.depth):
            if layer > 0:
                tokens = F.gelu(tokens)
            tokens = self.get_submodule(f"linear{layer}")(tokens)
            tokens = self.get_submodule(f"norm{layer}")(tokens)
        return tokens
