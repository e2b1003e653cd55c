"""Features of whole images, from any subset of processes, in the order of the dataset."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from models.views import extract_patches
from models.vit import Encoder


def patch_tokens(encoder: Encoder, images: Tensor) -> Tensor:
    """All patches, no gap, before the final norm, without the class token. -> [N, L, D]"""
    patches = extract_patches(images, encoder.patch_size)
    ids = torch.arange(patches.shape[1], device=images.device).expand(len(patches), -1)
    return encoder.forward_features(patches, ids)[:, 1:]


@torch.inference_mode()
def pooled_features(encoder: Encoder, batches, normalise: Callable[[Tensor], Tensor]):
    """Mean of the patch tokens, L2-normalised, for the images of this process.

    batches yields (images uint8, labels, indices) -> features [n, D] and labels [n].
    """
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for batch in batches:
        tokens = patch_tokens(encoder, normalise(batch.images))
        features.append(F.normalize(tokens.mean(dim=1).float(), dim=-1))
        labels.append(batch.labels)
    encoder.train(was_training)
    return torch.cat(features), torch.cat(labels)
