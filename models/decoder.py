"""Decoders: from the visible latents and the masked positions alone to the masked latents.

`cross` is the published one: mask tokens attend to each other and to the visible latents, which
stay as they are. `self` puts visible and mask tokens through the same self-attention blocks, as MAE
does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from models.vit import LayerNorm, PositionTable, initialise_weights, run_blocks, transformer_block


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.fused_attn = True  # like timm's Attention
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        """queries [N, Q, D], context [N, K, D] -> [N, Q, D]"""
        query = self.q_proj(queries).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        keys_values = self.kv_proj(context).unflatten(2, (2, self.num_heads, -1))
        key, value = keys_values.permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:
            scaled = query / query.shape[-1] ** 0.5
            attended = (scaled @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.self_attn = Attention(dim=dim, num_heads=num_heads, qkv_bias=True)
        self.norm2q = LayerNorm(dim)
        self.norm2kv = LayerNorm(dim)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm3 = LayerNorm(dim)
        self.mlp = Mlp(in_features=dim, hidden_features=4 * dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        queries = queries + self.self_attn(self.norm1(queries))
        queries = queries + self.cross_attn(self.norm2q(queries), self.norm2kv(context))
        return queries + self.mlp(self.norm3(queries))


def visual_cue(
    positions: Tensor, visible_tokens: Tensor, visible_ids: Tensor, masked_ids: Tensor
) -> Tensor:
    """softmax(P_masked P_visible^T / sqrt(d)) X_visible: what is visible near a masked position.

    positions [L, d] (no class row), visible_tokens [N, V, d] (no class token, no positions added)
    -> [N, M, d]. It has no parameters."""
    # The table is shared by all images: its L x L products are made once, and rows and columns are
    # picked from them. In full precision: a softmax amplifies rounding, and this one is small.
    with torch.autocast(positions.device.type, enabled=False):
        affinity = positions @ positions.T / positions.shape[1] ** 0.5
        affinity = affinity[masked_ids[:, :, None], visible_ids[:, None, :]].softmax(dim=-1)
    return affinity.to(visible_tokens.dtype) @ visible_tokens


class Decoder(nn.Module):
    """What both share: embedding, positions, mask tokens with their visual cue, output layers."""

    block: Callable[[int, int], nn.Module]

    def __init__(
        self,
        *,
        grid_size: int,
        encoder_dim: int,
        target_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        visual_cue: bool,
        freeze_pe: bool,
        recompute: bool,
    ):
        super().__init__()
        self.visual_cue, self.recompute = visual_cue, recompute
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = PositionTable(dim, grid_size, freeze_pe)
        self.norm = LayerNorm(dim)
        self.head = nn.Linear(dim, target_dim)
        self.blocks = nn.ModuleList(self.block(dim, num_heads) for _ in range(depth))
        self.apply(initialise_weights)

    def embed_both(
        self, latents: Tensor, visible_ids: Tensor, masked_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """latents [N, 1 + V, encoder_dim] -> visible tokens [N, 1 + V, d], one token per masked
        position [N, M, d], all with their position rows."""
        embedded = self.embed(latents)
        class_row = self.pos_embed.class_row().expand(embedded.shape[0], -1, -1)
        positions = torch.cat([class_row, self.pos_embed.patch_rows(visible_ids)], dim=1)
        masked = self.mask_token + self.pos_embed.patch_rows(masked_ids)
        if self.visual_cue:
            table = self.pos_embed.pos_embeds[1:]
            masked = masked + visual_cue(table, embedded[:, 1:], visible_ids, masked_ids)
        return embedded + positions, masked

    def project(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(tokens))


class CrossDecoder(Decoder):
    block = CrossBlock

    def __init__(self, **options):
        super().__init__(**options)
        self.cls_token = nn.Parameter(torch.empty_like(self.mask_token))
        nn.init.normal_(self.cls_token, std=0.02)

    def embed_tokens(
        self, latents: Tensor, visible_ids: Tensor, masked_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> queries [N, 1 + M, d], context [N, 1 + V, d]"""
        context, masked = self.embed_both(latents, visible_ids, masked_ids)
        cls_token = self.cls_token + self.pos_embed.class_row()
        return torch.cat([cls_token.expand(len(masked), -1, -1), masked], dim=1), context

    def forward(self, latents: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """latents [N, 1 + V, encoder_dim] -> [N, 1 + M, target_dim], its own class token first."""
        queries, context = self.embed_tokens(latents, visible_ids, masked_ids)
        queries = run_blocks(self.blocks, queries, context, recompute=self.recompute)
        return self.project(queries)


class SelfDecoder(Decoder):
    block = staticmethod(transformer_block)

    def embed_tokens(self, latents: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """-> [N, 1 + V + M, d]"""
        return torch.cat(self.embed_both(latents, visible_ids, masked_ids), dim=1)

    def forward(self, latents: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
        """latents [N, 1 + V, encoder_dim] -> [N, 1 + M, target_dim], the encoder's token first."""
        tokens = self.embed_tokens(latents, visible_ids, masked_ids)
        tokens = run_blocks(self.blocks, tokens, recompute=self.recompute)
        return self.project(torch.cat([tokens[:, :1], tokens[:, latents.shape[1] :]], dim=1))


DECODERS = {"cross": CrossDecoder, "self": SelfDecoder}
