"""What a run says of its speed."""

import math

import torch

from train_gpt2 import PRESETS, flops_per_token, peak_flops


def test_flops_of_a_token_are_those_of_its_matrix_products():
    """Counted by hand, product by product: 2 (out x in) forward, twice that backward."""
    c = PRESETS["gpt2"]
    C, T, V = c.n_embd, c.block_size, 50304
    block = 3 * C * C + C * C + 4 * C * C + 4 * C * C  # c_attn, c_proj, c_fc, c_proj
    products = c.n_layer * (block + 2 * C * (T / 2)) + V * C  # a causal row sees half of T
    n_params = 124_475_904  # counts positions, biases and norms too, less than 1%
    assert math.isclose(flops_per_token(c, n_params), 6 * products, rel_tol=0.01)


def test_peak_of_known_and_unknown_devices(monkeypatch):
    assert math.isnan(peak_flops(torch.device("cpu")))
    for name, peak in (("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == peak
