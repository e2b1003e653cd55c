"""Latent MIM written a second time, slowly: explicit loops and matrix products, no module classes.

The tests hold the fast code against it, mostly in float64. Weights come in as a flat dictionary
with the key names of the state dict; every function is differentiable by autograd.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def below(weights: Weights, prefix: str) -> Weights:
    """The entries of one sub-module, without its prefix."""
    prefix += "."
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def count_blocks(weights: Weights) -> int:
    return len({key.split(".")[1] for key in weights if key.startswith("blocks.")})


def first_blocks(weights: Weights, depth: int) -> Weights:
    """An encoder's entries without the blocks from `depth` on."""
    cut = [key for key in weights if key.startswith("blocks.") and int(key.split(".")[1]) >= depth]
    return {key: value for key, value in weights.items() if key not in cut}


# --- patches and positions ---


def patch_corners(grid: int, patch_size: int, gap: int, row_offsets, column_offsets, image: int):
    """The top left pixel of each patch of one image, in the order of the patch ids."""
    corners = []
    for i in range(grid):
        for j in range(grid):
            row, column = i * (patch_size + gap), j * (patch_size + gap)
            if gap > 0:
                row += int(row_offsets[image, i, j])
                column += int(column_offsets[image, i, j])
            corners.append((row, column))
    return corners


def extract_patches(images, patch_size, gap=0, row_offsets=None, column_offsets=None) -> Tensor:
    grid = images.shape[2] // (patch_size + gap)
    batch = []
    for n in range(len(images)):
        patches = []
        corners = patch_corners(grid, patch_size, gap, row_offsets, column_offsets, n)
        for top, left in corners:
            values = []
            for row in range(top, top + patch_size):
                for column in range(left, left + patch_size):
                    values.extend(images[n, channel, row, column] for channel in range(3))
            patches.append(torch.stack(values))
        batch.append(torch.stack(patches))
    return torch.stack(batch)


def position_table(dim: int, grid: int) -> Tensor:
    """[1 + grid^2, dim] in float64: zeros, then sine / cosine of column and row of each cell."""
    rows = [[0.0] * dim]
    frequencies = [10000 ** (-4 * k / dim) for k in range(dim // 4)]
    for i in range(grid):
        for j in range(grid):
            x, y = j * grid / (grid - 1), i * grid / (grid - 1)
            row = [math.sin(x * w) for w in frequencies] + [math.cos(x * w) for w in frequencies]
            row += [math.sin(y * w) for w in frequencies] + [math.cos(y * w) for w in frequencies]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


# --- layers ---


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def layer_norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    standard = centred / torch.sqrt(variance + eps)
    return standard * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def softmax(x: Tensor) -> Tensor:
    exponentials = torch.exp(x - x.max(dim=-1, keepdim=True).values)
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """query [N, Q, D], key and value [N, K, D], head by head."""
    width = query.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        outputs.append(softmax(scores) @ value[..., part])
    return torch.cat(outputs, dim=-1)


def self_attention(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    query, key, value = linear(x, weights, f"{name}.qkv").chunk(3, dim=-1)
    return linear(attend(query, key, value, heads), weights, f"{name}.proj")


def cross_attention(q: Tensor, kv: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    query = linear(q, weights, f"{name}.q_proj")
    key, value = linear(kv, weights, f"{name}.kv_proj").chunk(2, dim=-1)
    return linear(attend(query, key, value, heads), weights, f"{name}.proj")


def mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def vit_block(x: Tensor, weights: Weights, name: str, heads: int) -> Tensor:
    x = x + self_attention(layer_norm(x, weights, f"{name}.norm1"), weights, f"{name}.attn", heads)
    return x + mlp(layer_norm(x, weights, f"{name}.norm2"), weights, f"{name}.mlp")


def projection_head(x: Tensor, weights: Weights) -> Tensor:
    """weights: those of the head alone. No entry, no head."""
    depth = sum(key.startswith("linear") for key in weights)
    for layer in range(depth):
        x = linear(x, weights, f"linear{layer}")
        x = layer_norm(x, weights, f"norm{layer}", eps=1e-5)
        if layer < depth - 1:
            x = gelu(x)
    return x


# --- networks ---


def pick(rows: Tensor, ids: Tensor) -> Tensor:
    """rows [N, L, D], ids [N, K] -> [N, K, D], image by image."""
    picked = []
    for own, wanted in zip(rows, ids, strict=True):
        picked.append(torch.stack([own[int(k)] for k in wanted]))
    return torch.stack(picked)


def pick_positions(table: Tensor, ids: Tensor) -> Tensor:
    """Row 0 of the table is the class token's."""
    return torch.stack([torch.stack([table[1 + int(k)] for k in wanted]) for wanted in ids])


def encoder(weights: Weights, patches: Tensor, ids: Tensor, heads: int, depth=None) -> Tensor:
    """patches [N, K, patch_dim] at the positions ids -> [N, 1 + K, D]."""
    table = weights["pos_embed.pos_embeds"]
    tokens = linear(patches, weights, "embed.proj") + pick_positions(table, ids)
    cls_token = (weights["cls_token"] + table[0]).expand(len(patches), 1, -1)
    tokens = torch.cat([cls_token, tokens], dim=1)
    for block in range(count_blocks(weights) if depth is None else depth):
        tokens = vit_block(tokens, weights, f"blocks.{block}", heads)
    return projection_head(layer_norm(tokens, weights, "norm"), below(weights, "head"))


def visual_cue(table: Tensor, visible: Tensor, visible_ids: Tensor, masked_ids: Tensor) -> Tensor:
    """visible [N, V, d] -> [N, M, d]; one mask token at a time."""
    cues = []
    for tokens, seen, wanted in zip(visible, visible_ids, masked_ids, strict=True):
        own = []
        for q in wanted:
            products = [table[1 + q] @ table[1 + v] / math.sqrt(table.shape[1]) for v in seen]
            own.append(softmax(torch.stack(products)) @ tokens)
        cues.append(torch.stack(own))
    return torch.stack(cues)


def decoder_streams(weights: Weights, latents, visible_ids, masked_ids, cue: bool):
    """-> the visible tokens (class token first) and the mask tokens, both with positions added."""
    table = weights["pos_embed.pos_embeds"]
    embedded = linear(latents, weights, "embed")
    class_rows = table[0].expand(len(latents), 1, -1)
    visible = embedded + torch.cat([class_rows, pick_positions(table, visible_ids)], dim=1)
    masked = weights["mask_token"] + pick_positions(table, masked_ids)
    if cue:
        masked = masked + visual_cue(table, embedded[:, 1:], visible_ids, masked_ids)
    return visible, masked


def cross_decoder(weights: Weights, latents, visible_ids, masked_ids, heads: int, cue: bool):
    """-> [N, 1 + M, D]. The decoder has a class token of its own."""
    visible, masked = decoder_streams(weights, latents, visible_ids, masked_ids, cue)
    cls_token = weights["cls_token"] + weights["pos_embed.pos_embeds"][0]
    q = torch.cat([cls_token.expand(len(latents), 1, -1), masked], dim=1)
    for block in range(count_blocks(weights)):
        name = f"blocks.{block}"
        normed = layer_norm(q, weights, f"{name}.norm1")
        q = q + self_attention(normed, weights, f"{name}.self_attn", heads)
        normed = layer_norm(q, weights, f"{name}.norm2q")
        context = layer_norm(visible, weights, f"{name}.norm2kv")
        q = q + cross_attention(normed, context, weights, f"{name}.cross_attn", heads)
        q = q + mlp(layer_norm(q, weights, f"{name}.norm3"), weights, f"{name}.mlp")
    return linear(layer_norm(q, weights, "norm"), weights, "head")


def self_decoder(weights: Weights, latents, visible_ids, masked_ids, heads: int, cue: bool):
    """-> [N, 1 + M, D]. All tokens in one stream; the class token is the encoder's."""
    visible, masked = decoder_streams(weights, latents, visible_ids, masked_ids, cue)
    tokens = torch.cat([visible, masked], dim=1)
    for block in range(count_blocks(weights)):
        tokens = vit_block(tokens, weights, f"blocks.{block}", heads)
    tokens = torch.cat([tokens[:, :1], tokens[:, visible.shape[1] :]], dim=1)
    return linear(layer_norm(tokens, weights, "norm"), weights, "head")


DECODERS = {"cross": cross_decoder, "self": self_decoder}


def latent_mim(weights: Weights, config: dict, images: Tensor, views):
    """-> predictions [N, M, D], targets [N, M, D], visible [N, V, D]; the names of LatentMIM's
    arguments are the keys of config.
    """
    visible_ids, masked_ids, row_offsets, column_offsets = views
    gap = config["patch_gap"]
    patches = extract_patches(images, config["patch_size"], gap, row_offsets, column_offsets)
    online = below(weights, "encoder")
    heads = config["num_heads"]
    visible = encoder(online, pick(patches, visible_ids), visible_ids, heads)
    kind = config["target"]
    target = below(weights, "target_encoder") if kind in ("ema", "frozen") else online
    target_ids = masked_ids
    if not config["mask_target"]:
        target_ids = torch.cat([visible_ids, masked_ids], dim=1)
    targets = encoder(target, pick(patches, target_ids), target_ids, heads, config["target_depth"])
    if kind != "joint":
        targets = targets.detach()
    predictions = DECODERS[config["decoder"]](
        below(weights, "decoder"),
        visible,
        visible_ids,
        masked_ids,
        config["decoder_num_heads"],
        config["avg_vis_mask_token"],
    )
    return predictions[:, 1:], targets[:, -masked_ids.shape[1] :], visible[:, 1:]


# --- objective ---


def unit(vector: Tensor) -> Tensor:
    return vector / torch.sqrt((vector**2).sum())


def infonce_patches(predictions: Tensor, targets: Tensor, tau: float) -> Tensor:
    losses = []
    for predicted, target in zip(predictions, targets, strict=True):
        count = len(predicted)
        mean = sum(predicted) / count
        std = torch.sqrt(sum((token - mean) ** 2 for token in predicted) / (count - 1))
        for own in range(count):
            query = unit((predicted[own] - mean) / (std + 1e-4))
            logits = torch.stack([query @ unit(other) / tau for other in target])
            losses.append(torch.log(torch.exp(logits).sum()) - logits[own])
    return 2 * tau * sum(losses) / len(losses)


def norm_l2(predictions: Tensor, targets: Tensor) -> Tensor:
    errors = []
    pairs = zip(predictions.flatten(0, 1), targets.flatten(0, 1), strict=True)
    for predicted, target in pairs:
        mean = target.sum() / len(target)
        variance = ((target - mean) ** 2).sum() / (len(target) - 1)
        errors.append(((predicted - (target - mean) / torch.sqrt(variance + 1e-6)) ** 2).mean())
    return sum(errors) / len(errors)


def average_similarity(tokens: Tensor) -> Tensor:
    """The full L x L matrix of each image, pair by pair."""
    means = []
    for image in tokens:
        units = [unit(token) for token in image]
        means.append(torch.stack([a @ b for a in units for b in units]).mean())
    return torch.stack(means).mean()


# --- updates ---


def moving_average(target: Weights, online: Weights, momentum: float) -> Weights:
    """The online encoder may have more entries than its target."""
    return {name: momentum * target[name] + (1 - momentum) * online[name] for name in target}


def adamw_step(parameter, gradient, state: dict, lr: float, weight_decay: float) -> Tensor:
    """One step of AdamW, betas (0.9, 0.95), eps 1e-8; state starts as {} and is updated."""
    state["step"] = state.get("step", 0) + 1
    state["mean"] = 0.9 * state.get("mean", 0) + 0.1 * gradient
    state["square"] = 0.95 * state.get("square", 0) + 0.05 * gradient**2
    mean = state["mean"] / (1 - 0.9 ** state["step"])
    square = state["square"] / (1 - 0.95 ** state["step"])
    decayed = parameter * (1 - lr * weight_decay)
    return decayed - lr * mean / (torch.sqrt(square) + 1e-8)
