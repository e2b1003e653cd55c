"""Numbers of a run: summed on the device, then written to the console, log.txt and TensorBoard."""

import torch
from torch import Tensor

from models.losses import METRICS


class DeviceMeters:
    """Sums since the last log point, on the device. Only `read` and `faults` wait for it."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(METRICS), dtype=torch.float64, device=device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=device)
        self.micro_steps = self.windows = 0
        self.window_loss = torch.zeros((), dtype=torch.float64, device=device)
        # Since the start of the process. The loss is this rank's own; the gradient is common to all.
        self.bad_losses = FaultCounter(device)
        self.bad_gradients = FaultCounter(device)

    def add_micro_step(self, metrics: Tensor) -> None:
        self.sums += metrics
        self.window_loss += metrics[0]
        self.micro_steps += 1

    def count_bad_gradient(self, step: int, is_bad: Tensor) -> None:
        self.bad_gradients.count(step, is_bad)

    def add_window(self, step: int, grad_norm: Tensor) -> None:
        self.bad_losses.count(step, ~self.window_loss.isfinite())
        self.window_loss.zero_()
        self.grad_norm += grad_norm
        self.windows += 1

    def read(self) -> dict[str, float]:
        """Means since the last call, on this rank; then start again."""
        means = [self.sums / max(self.micro_steps, 1), self.grad_norm[None] / max(self.windows, 1)]
        values = torch.cat(means).tolist()
        self.sums.zero_()
        self.grad_norm.zero_()
        self.micro_steps = self.windows = 0
        return dict(zip((*METRICS, "grad_norm"), values, strict=True))


class FaultCounter:
    """How many steps went wrong and which was the first, without asking the device."""

    def __init__(self, device: torch.device):
        self.state = torch.tensor([0, -1], dtype=torch.int64).to(device)  # how many, first step

    def count(self, step: int, is_bad: Tensor) -> None:
        is_first = is_bad & (self.state[0] == 0)
        self.state[1] += is_first * (step + 1)  # from -1 to step
        self.state[0] += is_bad
