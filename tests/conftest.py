"""One thread per test process: two torch threads collapse when anything else wants a core."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import torch

torch.set_num_threads(1)
