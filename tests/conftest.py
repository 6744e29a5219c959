"""What all tests share."""

import os

# in models as small as the tests', threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start

import torch  # noqa: E402

torch.set_num_threads(1)
