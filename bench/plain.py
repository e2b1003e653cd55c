"""The same training step written down in the plainest way, for comparison: softmax attention as
matrices, the moving average and AdamW parameter by parameter, the numbers read after each step."""

import torch
from torch import Tensor

from engine_pretrain import Training
from models.views import Views
from util.cpu import write_out_attention


def make_plain(training: Training) -> Training:
    """In place."""
    write_out_attention(training.model)
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in training.optimizer.param_groups
    ]
    training.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    return training


def plain_step(training: Training, images: Tensor, views: Views, epoch: float) -> list[float]:
    """A step of one micro-step."""
    learning_rate = training.schedule.learning_rate(epoch)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate
    momentum = training.schedule.target_momentum(epoch)
    online = dict(training.model.encoder.named_parameters())
    with torch.no_grad():
        for name, target in training.model.target_encoder.named_parameters():
            target.mul_(momentum).add_(online[name], alpha=1 - momentum)
    with training.autocast():
        latents = training.network(images, views)
    loss, metrics = training.objective(latents, training.schedule.similarity_goal(epoch))
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    return [number.item() for number in metrics]
