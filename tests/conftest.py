"""What all tests share."""

import torch

torch.set_num_threads(1)  # in models as small as the tests', threads only wait for each other
