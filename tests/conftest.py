"""What all tests share."""

import torch

# The models here are tiny: a second thread only waits, ten times as long where another process has the core.
torch.set_num_threads(1)
