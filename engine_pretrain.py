"""The training step of Latent MIM: accum_iter micro-steps and one update.

Nothing in a step waits for the device: losses and similarities stay on it until they are logged.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.views import Views
from util.build import Training

SCALER_SEARCHES = 20  # halvings of fp16's loss scale, from 65,536 to less than 1


def begin_step(training: Training, epoch: float) -> None:
    """Step 1: the schedules at this fractional epoch; the target moves towards the encoder, unless
    it did so before this step failed."""
    learning_rate = training.schedule.learning_rate(epoch)
    for group in training.optimizer.param_groups:
        group["lr"] = learning_rate
    training.similarity_goal.fill_(training.schedule.similarity_goal(epoch))
    if not training.target_is_ahead:
        training.half_done = True
        training.model.move_target(training.schedule.target_momentum(epoch))
        training.half_done = False
    training.target_is_ahead = True


def micro_step(training: Training, images: Tensor, views: Views, last_of_step: bool) -> Tensor:
    """Step 2: predict the latents of the masked patches, and add to the gradient."""
    network = training.network
    # Gradients need to be summed over the processes only once per step, at its last micro-step.
    keep_local = isinstance(network, DistributedDataParallel) and not last_of_step
    with network.no_sync() if keep_local else nullcontext():
        with training.autocast():
            latents = network(images, views)
        loss, metrics = training.objective(latents, training.similarity_goal)
        if training.sigreg is not None:
            statistic = training.sigreg(latents.visible)
            loss = loss + training.sigreg.weight * statistic
            metrics = torch.cat([loss[None], metrics[1:], statistic[None]]).detach()
        training.scaler.scale(loss / training.accum_iter).backward()
    training.meters.add_micro_step(metrics)
    return metrics


def end_step(training: Training, step: int) -> None:
    """Step 3: one optimiser step, left out on the device if the gradient is not finite."""
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    training.scaler.unscale_(training.optimizer)
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients, foreach=True)
    if training.clip_grad is not None:
        nn.utils.clip_grads_with_norm_(parameters, training.clip_grad, grad_norm, foreach=True)
    # A scaler leaves bad steps out itself, routinely while it looks for its scale.
    is_routine = training.scaler.is_enabled()
    if not is_routine:
        # The gradient is the same on all ranks by now, so they leave out the same steps.
        training.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
    training.half_done = True
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.half_done = training.target_is_ahead = False
    # DistributedDataParallel keeps the gradients inside its buckets, and None would detach them.
    is_alone = not isinstance(training.network, DistributedDataParallel)
    training.optimizer.zero_grad(set_to_none=is_alone)
    training.meters.add_step(step, grad_norm, SCALER_SEARCHES if is_routine else 0)


def train_step(
    training: Training,
    batches: Iterator[Tensor],
    draw_views: Callable[[int, int, int], Views],
    step: int,
    epoch: float,
) -> None:
    """One step of the optimiser, numbered from the start of training, at a fractional epoch.
    batches: images [N, 3, side, side], uint8 or normalised; their views: draw_views(step,
    micro_step, N)."""
    begin_step(training, epoch)
    if training.sigreg is not None:
        training.sigreg.draw(step)
    for micro in range(training.accum_iter):
        images = next(batches)
        views = draw_views(step, micro, len(images))
        micro_step(training, images, views, last_of_step=micro == training.accum_iter - 1)
    end_step(training, step)
