"""The encoder: a ViT that accepts any subset of an image's patches. Online and target are two."""

from collections import OrderedDict
from collections.abc import Collection, Iterable

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.views import extract_patches, take_tokens


class LayerNorm(nn.LayerNorm):
    """Of bf16 or fp16 under autocast on a GPU: in that type, with sums in float32, as on a CPU.
    CUDA's autocast would return float32, which takes two to four times the memory traffic."""

    def __init__(self, dim: int, eps: float = 1e-6, **options):
        super().__init__(dim, eps=eps, **options)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dtype == torch.float32 or not torch.is_autocast_enabled("cuda"):
            return super().forward(tokens)
        weight, bias = self.weight.to(tokens.dtype), self.bias.to(tokens.dtype)
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps)


def sine_cosine_positions(dim: int, grid_size: int) -> Tensor:
    """[1 + grid_size^2, dim]: row 0 is the class token's (zeros), then one row per cell.

    A cell's row is [sin(x w), cos(x w), sin(y w), cos(y w)]; cells run row by row over the grid.
    Coordinates go from 0 to grid_size inclusive (and not to grid_size - 1): the published weights
    were trained with these."""
    coordinate = torch.linspace(0, 1, grid_size, dtype=torch.float64) * grid_size
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = coordinate[:, None] * frequency  # [grid, dim / 4]
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, dim / 2]
    along_x = wave[None, :, :].expand(grid_size, -1, -1)
    along_y = wave[:, None, :].expand(-1, grid_size, -1)
    cells = torch.cat([along_x, along_y], dim=2).reshape(grid_size**2, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), cells]).float()


class PositionTable(nn.Module):
    """One row per position. Frozen: a buffer; otherwise a parameter with the same start."""

    def __init__(self, dim: int, grid_size: int, freeze: bool):
        super().__init__()
        self.grid_size = grid_size
        table = sine_cosine_positions(dim, grid_size)
        if freeze:
            self.register_buffer("pos_embeds", table)
        else:
            self.pos_embeds = nn.Parameter(table)

    def class_row(self) -> Tensor:
        """[1, 1, D]"""
        return self.pos_embeds[None, :1]

    def patch_rows(self, ids: Tensor) -> Tensor:
        """ids [N, K] -> [N, K, D]"""
        return take_tokens(self.pos_embeds[None, 1:], ids)

    def grid_rows(self, grid: tuple[int, int]) -> Tensor:
        """Of all patches of rows x columns, [1, L, D]: interpolated unless that is the own grid."""
        own, table = [self.grid_size, self.grid_size], self.pos_embeds[None, 1:]
        return resample_abs_pos_embed(table, list(grid), own, num_prefix_tokens=0)


def initialise_weights(module: nn.Module) -> None:
    """For Module.apply: every linear layer xavier-uniform with zero bias, every LayerNorm 1 / 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def transformer_block(dim: int, num_heads: int) -> Block:
    return Block(dim=dim, num_heads=num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=LayerNorm)


def run_blocks(blocks: Iterable[nn.Module], tokens: Tensor, *context: Tensor, recompute: bool):
    """One block after the other. recompute: keep nothing of a block's inside for the backward pass,
    which runs it again: a third more work for a fraction of the memory."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            tokens = checkpoint(block, tokens, *context, use_reentrant=False)
        else:
            tokens = block(tokens, *context)
    return tokens


class ProjectionHead(nn.Sequential):
    """The MLP on top of the encoder while it is pre-trained; evaluations take it off.

    mlp_depth linear layers without bias, dim -> mlp_dim -> ... -> mlp_dim -> dim, each followed by
    LayerNorm (eps 1e-5), GELU after every hidden one. mlp_depth 0 is the identity."""

    def __init__(self, dim: int, mlp_dim: int, mlp_depth: int):
        super().__init__()
        widths = [dim] + [mlp_dim] * (mlp_depth - 1) + [dim]
        # Named linear0, norm0, ...: the key names of the published checkpoint.
        for layer in range(mlp_depth):
            if layer > 0:
                self.add_module(f"gelu{layer}", nn.GELU())
            linear = nn.Linear(widths[layer], widths[layer + 1], bias=False)
            self.add_module(f"linear{layer}", linear)
            self.add_module(f"norm{layer}", LayerNorm(widths[layer + 1], eps=1e-5))


class Encoder(nn.Module):
    def __init__(
        self,
        *,
        grid_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        freeze_pe: bool,
        mlp_dim: int,
        mlp_depth: int,
        recompute: bool,
    ):
        super().__init__()
        self.grid_size, self.patch_size, self.embed_dim = grid_size, patch_size, embed_dim
        self.recompute = recompute
        # Named `proj`: the key name of the published checkpoint.
        self.embed = nn.Sequential(OrderedDict(proj=nn.Linear(3 * patch_size**2, embed_dim)))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = PositionTable(embed_dim, grid_size, freeze_pe)
        self.blocks = nn.ModuleList(transformer_block(embed_dim, num_heads) for _ in range(depth))
        self.norm: nn.Module = LayerNorm(embed_dim)
        self.head: nn.Module = ProjectionHead(embed_dim, mlp_dim, mlp_depth)
        self.apply(initialise_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed_tokens(self, patches: Tensor, positions: Tensor) -> Tensor:
        """patches [N, K, patch_dim] and their rows of the position table, [N, K, D] or [1, K, D]
        -> [N, 1 + K, D], class token first."""
        tokens = self.embed(patches) + positions
        cls_token = self.cls_token + self.pos_embed.class_row()
        return torch.cat([cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def forward_features(self, patches: Tensor, ids: Tensor, depth: int | None = None) -> Tensor:
        """The first `depth` blocks (None: all), before the final norm. -> [N, 1 + K, D]"""
        tokens = self.embed_tokens(patches, self.pos_embed.patch_rows(ids))
        return run_blocks(self.blocks[:depth], tokens, recompute=self.recompute)

    def forward_layers(
        self, patches: Tensor, ids: Tensor, layers: Collection[int], tap: str
    ) -> list[Tensor]:
        """Of the blocks `layers`, counted from 0, the output, or (tap=mlp) what its MLP adds to it.
        -> [N, 1 + K, D] each"""
        tokens, found = self.embed_tokens(patches, self.pos_embed.patch_rows(ids)), []
        for index, block in enumerate(self.blocks[: max(layers) + 1]):
            if tap == "mlp":
                tokens = tokens + block.attn(block.norm1(tokens))
                tapped = block.mlp(block.norm2(tokens))
                tokens = tokens + tapped
            else:
                tokens = tapped = run_blocks([block], tokens, recompute=self.recompute)
            if index in layers:
                found.append(tapped)
        return found

    def encode_images(self, images: Tensor) -> Tensor:
        """Whole images [N, 3, H, W], of any number of patches: all of them, without a gap, before
        the final norm. -> [N, 1 + L, D]"""
        height, width = images.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        patches = extract_patches(images, self.patch_size)
        tokens = self.embed_tokens(patches, self.pos_embed.grid_rows(grid))
        return run_blocks(self.blocks, tokens, recompute=self.recompute)

    def project(self, tokens: Tensor) -> Tensor:
        """The final norm and the head."""
        return self.head(self.norm(tokens))

    def forward(self, patches: Tensor, ids: Tensor, depth: int | None = None) -> Tensor:
        """patches [N, K, patch_dim], ids [N, K] -> latents [N, 1 + K, D]"""
        return self.project(self.forward_features(patches, ids, depth))
