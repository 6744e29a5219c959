"""What a run would take, without training: parameters, FLOPs, memory, hours, dollars.

    python train_gpt2.py gpt2-xl --plan --micro_batch_size 8
    python train_gpt2.py gpt2 --plan --gpus 8 --gpu H100 --dollars_per_gpu_hour 2.5

The options are those of inference.py's Task. Nothing is read or written: the model and a step of
its training are made of tensors that have a shape and no content, and their bytes are counted.
"""

import math
import weakref
from dataclasses import replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt2 as trainer
from devices import PEAK_FLOPS, autocast_of, print0, resolve_device, resolve_dtype
from inference import Task

ASSUMED_MFU = 0.4  # of a GPU's peak; what a run reaches depends on its shapes and machines
PARTS = ("weights", "gradients", "optimizer state", "activations", "logits and loss")
HOLES = "malloc's holes"
# glibc keeps freed blocks below 32 MiB for new ones, which do not fill them: beyond its live
# tensors a process on a CPU was measured to hold half the bytes of activations that are so small
SMALL, HOLES_OF_SMALL = 2**25, 0.5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, from when they are made to when nobody
    holds them any more. Each belongs to the part that was being worked on, see `enter`."""

    def __init__(self, has_malloc: bool):
        super().__init__()
        self.owner = weakref.WeakKeyDictionary()  # a storage -> [its part]
        self.now = dict.fromkeys((*PARTS, HOLES) if has_malloc else PARTS, 0)
        self.peak = dict(self.now)  # the parts at the moment when they were the most together
        self.part = PARTS[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage):
        if storage not in self.owner:  # views share one
            owner = self.owner[storage] = [self.part]
            self.count(owner, storage.nbytes())
            weakref.finalize(storage, self.count, owner, -storage.nbytes())
            if sum(self.now.values()) > sum(self.peak.values()):
                self.peak = dict(self.now)

    def count(self, owner: list[str], n_bytes: int):
        self.now[owner[0]] += n_bytes
        if HOLES in self.now and owner[0] == "activations" and abs(n_bytes) < SMALL:
            self.now[HOLES] += HOLES_OF_SMALL * n_bytes

    def enter(self, part: str):
        """What is made from now on belongs to this part."""
        self.part = part

    def move(self, tensor: torch.Tensor, part: str):
        """The tensor belongs to this part."""
        storage = tensor.untyped_storage()
        owner = self.owner[storage]
        self.count(owner, -storage.nbytes())
        owner[0] = part
        self.count(owner, storage.nbytes())


def step_memory(config, dtype: torch.dtype, grad_accum_steps: int, device_type: str) -> dict:
    """Bytes of each of PARTS when a rank's step takes the most, with the real model and optimizer.
    Activations and logits are what is kept for backward, with their gradients; on a CPU, HOLES
    is what malloc takes for all of them."""
    with FakeTensorMode(), LiveBytes(has_malloc=device_type == "cpu") as live:
        model = trainer.GPT(config)
        if device_type == "cuda":
            for block in model.transformer.h:
                block.attn.dropout = 0.0  # it keeps a seed there, and the (T, T) weights on a CPU
        muon = trainer.configure_muon(model, config)
        optimizers = [trainer.configure_optimizer(model, config, "cpu"), *([muon] if muon else [])]

        # a step before: it leaves the optimizer its state, whatever that is
        live.enter("gradients")
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        live.enter("optimizer state")
        for optimizer in optimizers:
            optimizer.step()
        if grad_accum_steps == 1:  # else these stand for those of the micro-step before
            model.zero_grad(set_to_none=True)

        def after_hidden(module, inputs, output):
            live.enter("logits and loss")
            output.register_hook(lambda grad: live.enter("activations"))  # backward is through it

        model.transformer.ln_f.register_forward_hook(after_hidden)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: live.move(p.grad, "gradients"))
        live.peak = dict(live.now)
        live.enter("activations")
        x = torch.zeros(config.micro_batch_size, config.block_size, dtype=torch.int64)  # (B, T)
        # a CPU's operations, which keep what a GPU's do: fake ones of CUDA need a CUDA build
        with autocast_of(dtype, torch.device("cpu")):
            _, loss = model(x, x)
        loss.backward()
        live.enter("gradients")
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        live.enter("optimizer state")
        for optimizer in optimizers:
            optimizer.step()
    return live.peak


def plan(config, task: Task):
    """Print what the run would take. SystemExit, one line, if it could not be, or if --gpu is not
    in the table."""
    if task.gpu and task.gpu not in PEAK_FLOPS:
        known = ", ".join(PEAK_FLOPS)
        raise SystemExit(f"--gpu {task.gpu!r} is not in the table: give one of {known}")
    if task.dollars_per_gpu_hour and not (task.gpu or task.tokens_per_second):
        raise SystemExit("--dollars_per_gpu_hour needs hours: give --gpu or --tokens_per_second")
    if config.init_from in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        weights = trainer.PRESETS[config.init_from]
        config = replace(config, **{name: getattr(weights, name) for name in trainer.NETWORK})
    here = resolve_device("auto" if task.gpu else config.device)
    device_type = "cuda" if task.gpu else here.type
    if task.gpu and config.dtype == "auto":
        dtype = torch.float16 if task.gpu in ("V100", "T4") else torch.bfloat16
    else:
        dtype = resolve_dtype(config.dtype, here)
    if task.gpu and dtype == torch.float32 and not task.tokens_per_second:
        raise SystemExit(
            "--gpu's rates are those of 16-bit products: give --tokens_per_second too, or another "
            "--dtype"
        )
    chosen = config.micro_batch_size == "auto"
    B, T = trainer.resolve_micro_batch_size(config, task.gpus), config.block_size
    config = replace(config, micro_batch_size=B)
    grad_accum_steps = config.total_batch_size // (B * T * task.gpus)

    with torch.device("meta"):
        model = trainer.GPT(config)
    n_params = sum(p.numel() for p in model.parameters())
    padding = len(model.transformer.wte.weight) - config.vocab_size  # rows
    flops = trainer.flops_per_token(config, n_params)
    full = flops + 6 * config.n_layer * config.n_embd * T
    tokens = config.max_steps * config.total_batch_size
    memory = step_memory(config, dtype, grad_accum_steps, device_type)

    def line(name: str, value: str, remark: str = ""):
        print0(f"{name:<19}{value:>22}  {remark}".rstrip())

    where = task.gpu or here.type
    print0(f"{config.preset} on {task.gpus} x {where}, {str(dtype).removeprefix('torch.')}")
    line("parameters", f"{n_params:,}",
         f"{n_params - padding * config.n_embd:,} without the vocabulary's padding")  # fmt: skip
    line("tokens of the run", f"{tokens:,}",
         f"{config.max_steps:,} steps x {config.total_batch_size:,}")  # fmt: skip
    line("tokens of a step", f"{config.total_batch_size:,}",
         f"{task.gpus} ranks x {grad_accum_steps} micro-steps x {B} x {T:,}")  # fmt: skip
    line("FLOPs of a token", f"{flops:,}", f"causal attention counted as half; {full:,} in full")
    line("FLOPs of a step", f"{flops * config.total_batch_size:.4g}")
    line("FLOPs of the run", f"{flops * tokens:.4g}")
    if rate := task.tokens_per_second:
        source = "measured"
    elif task.gpu:
        peak = PEAK_FLOPS[task.gpu]
        rate = ASSUMED_MFU * peak * task.gpus / flops
        source = f"assumed: MFU {ASSUMED_MFU} of {peak / 1e12:.0f} TFLOP/s a GPU"
    if rate:
        hours = tokens / rate / 3600
        line("tokens a second", f"{rate:,.0f}", source)
        line("hours", f"{hours:,.2f}", "of training steps alone, without evaluations")
        if price := task.dollars_per_gpu_hour:
            dollars = hours * task.gpus * price
            line("dollars", f"{dollars:,.2f}", f"{task.gpus} x {price:,.2f} an hour")
    print0("memory of a rank when a step takes the most, in GiB")
    for name, n_bytes in memory.items():
        line(f"  {name}", f"{n_bytes / 2**30:,.2f}")
    line("  total", f"{sum(memory.values()) / 2**30:,.2f}")
    if memory["gradients"] < memory["weights"]:
        print0("not all gradients are there then: they come while activations go")
    print0("on top: what Python, torch and its libraries take, some hundred MB")
    if config.compile:
        print0("memory is that of uncompiled steps: on a GPU torch.compile needs less")
    if task.gpu and here.type != "cuda" and chosen:
        print0(f"--micro_batch_size {B} was chosen for the {here.type} here: give the GPU's")
    if config.init_from:
        print0(f"the weights of {config.init_from} were not read")
