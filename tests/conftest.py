"""One thread for each process: the tensors here are small, and pytest-xdist has processes enough."""

import torch

torch.set_num_threads(1)
