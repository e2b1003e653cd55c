"""One thread per test process: small tensors gain nothing from more, and threads that share cores
with other processes make each other wait."""

import torch

torch.set_num_threads(1)
