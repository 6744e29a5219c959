"""Where a run runs: its device and dtype, and torchrun's ranks."""

import math
import os
from contextlib import nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist


def print0(text: str):
    """Print on the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        with suppress(OSError):  # standard output may be a file on a full disk
            print(text, flush=True)


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """auto, cpu, cuda or mps to a device: with CUDA, to each rank of a machine its own."""
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and local_rank >= torch.cuda.device_count() or name == "mps" and not has_mps:
        raise SystemExit(f"no {name} device for rank {local_rank} here: give --device cpu")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto, float32, bfloat16 or float16 to the dtype of the matrix products."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    # GPUs before Ampere only emulate bfloat16, slowly
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def autocast_of(dtype: torch.dtype, device: torch.device):
    """The context in which matrix products have this dtype."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def start_ranks(world_size: int, device: torch.device, timeout: float):
    """Ready the GPU, and let torchrun's processes meet."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, where autocast leaves float32
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        # torchrun's own store still has the addresses of the ranks before a restart (PyTorch's
        # issue 135712): meet in a new one, a port further
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    if world_size > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        # longer than the watchdog waits, and than rank 0 takes to prepare
        dist.init_process_group(backend, timeout=timedelta(seconds=max(1800, 2 * timeout)))


def sum_over_ranks(*values: float, device: torch.device) -> list[float]:
    """Each value summed over all ranks."""
    where = device if device.type == "cuda" else "cpu"  # what nccl reaches, and what gloo
    totals = torch.tensor(values, dtype=torch.float64, device=where)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals.tolist()


def fits_memory(model: torch.nn.Module, B: int, T: int, autocast) -> bool:
    """Whether every rank's GPU has room for the forward and backward pass of B sequences of T
    tokens. Compiled they take less."""
    device = next(model.parameters()).device

    def failures() -> int:
        try:
            # what a step will find there: two moments, DDP's buckets, and a reserve like these
            held = [torch.empty_like(p) for p in model.parameters() for _ in range(4)]
            idx = torch.zeros(B, T, dtype=torch.int64, device=device)
            with autocast:
                _, loss = model(idx, idx)
            loss.backward()
            del held
        except torch.OutOfMemoryError:
            return 1
        return 0

    failed = failures()
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return not any(sum_over_ranks(failed, device=device))


# dense rates of bfloat16 products (V100 and T4: float16) in FLOP/s, from the vendors' data sheets
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12,
    "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def peak_flops(device: torch.device) -> float:
    """The GPU's peak in FLOP/s; nan where the table does not have it, and for CPUs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for gpu, rate in PEAK_FLOPS.items() if gpu in name), math.nan)
