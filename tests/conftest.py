"""What all tests share."""

import os

# in models as small as the tests', threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network

import torch  # noqa: E402

torch.set_num_threads(1)
