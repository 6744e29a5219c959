"""The model, its files, sampling, the optimizers, the schedule and the choice of the device.

Every test compares with something independent: transformers, numpy or a formula.
"""

import functools
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

import fineweb
import train_gpt2
from train_gpt2 import GPT, PRESETS, CausalSelfAttention, Config, GPTConfig

SMALL = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=4, n_embd=32)


def randomize(model):
    """Give every parameter a nontrivial value: no zero biases, no LayerNorms of ones."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.2)
    return model.eval()


def small_gpt(**changes) -> GPT:
    return randomize(GPT(replace(SMALL, **changes)))


def small_transformers_gpt2() -> GPT2LMHeadModel:
    shape = {"vocab_size": 97, "n_positions": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}
    return randomize(GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=96, eos_token_id=96)))


def random_tokens(*shape, vocab_size=65):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(2))


def exit_message(function, *args) -> str:
    """The one-line message with which the call must exit."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    message = error.value.code
    assert isinstance(message, str) and message and "\n" not in message
    return message


# ---- model ---------------------------------------------------------------------------------------

N_PARAMS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168}
N_PARAMS |= {"gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
N_PARAMS |= dict.fromkeys(("gpt2-40B", "gpt2-lr3x", "gpt2-fast", "finetune"), 124_439_808)


def meta_model(preset: str) -> tuple[GPT, int]:
    """The model of a preset, with shapes only, and its parameters without the padding rows."""
    gpt = PRESETS[preset].gpt
    with torch.device("meta"):
        model = GPT(gpt)
    n_padding = (model.lm_head.out_features - gpt.vocab_size) * gpt.n_embd
    return model, sum(p.numel() for p in model.parameters()) - n_padding


@pytest.mark.parametrize("preset", N_PARAMS)
def test_presets_have_the_parameters_of_gpt2(preset):
    model, n_params = meta_model(preset)
    assert n_params == N_PARAMS[preset]
    config = model.config
    with torch.device("meta"):
        shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
        reference = GPT2LMHeadModel(GPT2Config(**shape))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in reference.named_parameters()]


# the parameters in table 2.1 of GPT-3's paper, its tokens per step in units of 2**19, its rate
GPT3 = {"small": (125e6, 1, 6e-4), "medium": (350e6, 1, 3e-4), "large": (760e6, 1, 2.5e-4)}
GPT3 |= {"xl": (1.3e9, 2, 2e-4), "2.7b": (2.7e9, 2, 1.6e-4), "6.7b": (6.7e9, 4, 1.2e-4)}
GPT3 |= {"13b": (13e9, 4, 1e-4)}


@pytest.mark.parametrize("size", GPT3)
def test_presets_of_gpt3(size):
    config, (n_params, n_batch, lr) = PRESETS[f"gpt3-{size}"], GPT3[size]
    assert meta_model(f"gpt3-{size}")[1] == pytest.approx(n_params, rel=0.025)
    assert (config.gpt.block_size, config.gpt.vocab_size) == (2048, 50257)
    assert (config.total_batch_size, config.lr) == (n_batch * 2**19, lr)
    assert config.min_lr == pytest.approx(lr / 10)  # section 2.3: to 10%, warmup of 375M tokens
    assert config.warmup_steps * config.total_batch_size == pytest.approx(375e6, rel=0.005)
    assert config.max_steps * config.total_batch_size == pytest.approx(300e9, rel=1e-5)


def test_presets_of_gpt1_and_mingpt():
    # GPT-1 has 116,534,784 parameters with a vocabulary of 40,478, and no LayerNorm at the end
    with torch.device("meta"):
        gpt1 = transformers.OpenAIGPTModel(transformers.OpenAIGPTConfig())
    n_params = sum(p.numel() for p in gpt1.parameters())
    assert n_params == 116_534_784
    assert meta_model("gpt1")[1] == n_params + (50257 - 40478) * 768 + 2 * 768
    # minGPT's README has no such counts: 12 C**2 + 13 C per block, 257 tokens, 128 positions
    for preset, L, C in (("gpt-mini", 6, 192), ("gpt-micro", 4, 128), ("gpt-nano", 3, 48)):
        n_params = L * (12 * C * C + 13 * C) + (257 + 128 + 2) * C
        assert meta_model(preset)[1] == n_params and PRESETS[preset].gpt.n_head == L


def test_initialization_statistics():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=512, n_layer=8, n_head=2, n_embd=192))
    stds = {"wte": 0.02, "wpe": 0.01, "c_attn": 0.02, "c_fc": 0.02, "c_proj": 0.02 / math.sqrt(16)}
    for name, p in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            assert (p == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            std = stds[name.split(".")[-2]]
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    _, loss = model(*random_tokens(2, 4, 64, vocab_size=512))
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)  # a uniform guess


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    B, T, C, nh = 2, 8, 48, 4
    attn = CausalSelfAttention(GPTConfig(n_head=nh, n_embd=C, block_size=T))
    x = torch.randn(B, T, C)
    w, b = (p.detach().double().numpy() for p in attn.c_attn.parameters())
    q, k, v = np.split(x.double().numpy() @ w.T + b, 3, axis=-1)
    y = np.zeros((B, T, C))
    for head in range(nh):
        part = slice(head * C // nh, (head + 1) * C // nh)
        for t in range(T):  # a position attends to the positions 0..t
            scores = np.einsum("bc,bsc->bs", q[:, t, part], k[:, : t + 1, part])
            weights = np.exp(scores / math.sqrt(C // nh))
            weights /= weights.sum(axis=1, keepdims=True)
            y[:, t, part] = np.einsum("bs,bsc->bc", weights, v[:, : t + 1, part])
    w, b = (p.detach().double().numpy() for p in attn.c_proj.parameters())
    np.testing.assert_allclose(attn(x).detach().numpy(), y @ w.T + b, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    model, idx = small_gpt(), random_tokens(2, 16)
    for t in (1, 7, 15):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 65
        before, after = model(idx)[0], model(changed)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t:] != after[:, t:]).any(dim=-1).all()


def test_loss_is_the_mean_negative_log_probability():
    model, (idx, targets) = small_gpt(), random_tokens(2, 3, 16)
    logits, loss = model(idx, targets)
    p = np.exp(logits.detach().double().numpy())  # (B, T, vocab_size)
    p /= p.sum(axis=-1, keepdims=True)
    nll = -np.log(np.take_along_axis(p, targets.numpy()[..., None], axis=-1)[..., 0])
    assert loss.item() == pytest.approx(nll.mean(), rel=1e-5)
    targets[0, :5] = targets[2, 3] = -100  # F.cross_entropy's ignore_index
    expected = nll[targets.numpy() != -100].mean()
    assert model(idx, targets)[1].item() == pytest.approx(expected, rel=1e-5)
    assert model(idx)[1] is None


def test_padded_vocabulary_entries_have_no_effect():
    model, (idx, targets) = small_gpt(), random_tokens(2, 3, 16)
    logits, loss = model(idx, targets)
    loss.backward()
    assert model.lm_head.weight.shape == (128, 32) and logits.shape == (3, 16, 65)
    assert (model.lm_head.weight.grad[65:] == 0).all()
    with torch.no_grad():
        model.lm_head.weight[65:] = 100.0  # would dominate if they took part
    assert torch.equal(model(idx, targets)[0], logits)
    assert torch.equal(model(idx, targets)[1], loss)
    generator = torch.Generator().manual_seed(0)
    assert model.generate(idx, 50, temperature=3.0, generator=generator).max() < 65


def test_dropout_is_active_in_training_only():
    model, idx = small_gpt(dropout=0.5), random_tokens(2, 16)
    expected = small_gpt()(idx)[0]
    assert torch.equal(model(idx)[0], expected)
    # each of the places where GPT-2 has dropout works alone
    for active in ("transformer.drop", "attn", "resid_dropout", "mlp.dropout"):
        for name, module in model.named_modules():
            module.training = name.endswith(active)
        assert not torch.equal(model(idx)[0], expected), active
    y = model.train().transformer.drop(torch.ones(100_000))
    assert set(y.tolist()) == {0.0, 2.0}  # rescaled by 1 / (1 - 0.5)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)


def test_bfloat16_autocast_is_close_to_float32():
    model, (idx, targets) = small_gpt(), random_tokens(2, 3, 16)
    expected, expected_loss = model(idx, targets)
    _, autocast = train_gpt2.get_autocast("bfloat16", "cpu")
    with autocast:
        logits, loss = model(idx, targets)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (logits - expected).norm() < 0.02 * expected.norm()  # a bfloat16 has 8 bits: 2**-8
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_flops_are_those_of_the_matmuls():
    with torch.device("meta"):
        model, idx = GPT(GPTConfig()), torch.zeros(1, 1024, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    # the counter does not know the causal mask: subtract half of the attention, 12 * L * C * T
    counted = counter.get_total_flops() / 1024 - 6 * 12 * 768 * 1024
    # biases, LayerNorms and positions have parameters, but no matmuls: below 1%
    assert counted < model.flops_per_token(1024) < 1.01 * counted


# ---- files ---------------------------------------------------------------------------------------


def assert_same_logits(model: GPT, reference: GPT2LMHeadModel):
    """The logits of 4 full contexts agree."""
    config = model.config
    idx = random_tokens(4, config.block_size, vocab_size=config.vocab_size)
    with torch.no_grad():
        expected = reference(idx).logits
        torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-4)


@pytest.fixture
def folder(tmp_path):
    """A folder with small_transformers_gpt2(), written by transformers."""
    small_transformers_gpt2().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_from_pretrained_agrees_with_transformers(folder):
    reference, model = small_transformers_gpt2(), GPT.from_pretrained(folder, dropout=0.1).eval()
    assert model.config == GPTConfig(32, 97, 3, 4, 48, dropout=0.1)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same_logits(model, reference)
    tokens = random_tokens(3, 32, vocab_size=97)
    _, loss = model(tokens[:, :-1], tokens[:, 1:])
    expected = reference(tokens, labels=tokens).loss  # transformers shifts the labels itself
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, p in reference.named_parameters():
        grad = grads[name][:97] if "wte" in name else grads[name]
        grad = grad.t() if name.endswith(train_gpt2.TRANSPOSED) else grad
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_save_pretrained_is_exact_and_transformers_loads_it(tmp_path):
    model = small_gpt()
    model.save_pretrained(tmp_path / "hf")
    reference, info = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(model, reference.eval())
    weights = GPT.from_pretrained(tmp_path / "hf").state_dict()
    for name, w in model.state_dict().items():
        n_rows = 65 if name.endswith(("wte.weight", "lm_head.weight")) else len(w)
        assert torch.equal(weights[name][:n_rows], w[:n_rows]), name
    for vocab_size, eot in ((257, 256), (50304, 50256)):
        folder = tmp_path / "below" / str(vocab_size)
        small_gpt(vocab_size=vocab_size, n_embd=4).save_pretrained(folder)
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
        hf = transformers.AutoConfig.from_pretrained(folder)
        assert (hf.vocab_size, hf.bos_token_id, hf.eos_token_id) == (vocab_size, eot, eot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_files_with_and_without_prefix_load_as_float32(folder, prefix, dtype):
    reference = small_transformers_gpt2().to(dtype)
    weights = {}
    for name, w in reference.state_dict().items():
        weights[name.replace("transformer.", prefix)] = w.clone()
    if not prefix:  # the hub's file has no lm_head, but attention masks
        del weights["lm_head.weight"]
        for i in range(3):
            weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
            weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, folder / "model.safetensors")
    model = GPT.from_pretrained(folder)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_same_logits(model, reference.float())


def write_bin(folder: Path, legacy: bool, n_files: int):
    """Replace model.safetensors by pytorch_model.bin, or by several files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    files = [f"pytorch_model-{i + 1:05d}-of-{n_files:05d}.bin" for i in range(n_files)]
    files = ["pytorch_model.bin"] if n_files == 1 else files
    weight_map = {name: files[i % n_files] for i, name in enumerate(weights)}
    for file in files:
        part = {name: w for name, w in weights.items() if weight_map[name] == file}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
    index = {"metadata": {}, "weight_map": weight_map}
    if n_files > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMATS = {
    "sharded": lambda folder, model: model.save_pretrained(folder, max_shard_size="20KB"),
    "bfloat16": lambda folder, model: model.bfloat16().save_pretrained(folder),
    "bin": lambda folder, model: write_bin(folder, legacy=False, n_files=1),
    "legacy bin": lambda folder, model: write_bin(folder, legacy=True, n_files=1),
    "sharded bin": lambda folder, model: write_bin(folder, legacy=False, n_files=3),
    "added tokens": lambda folder, model: (
        model.resize_token_embeddings(131, mean_resizing=False),
        model.save_pretrained(folder),
    ),
    "another task": lambda folder, model: transformers.GPT2DoubleHeadsModel.from_pretrained(
        folder
    ).save_pretrained(folder),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_transformers_loads(folder, tmp_path, name):
    FORMATS[name](folder, small_transformers_gpt2())
    if name == "sharded":
        (folder / "model.safetensors").unlink()
        assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    reference = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    model = GPT.from_pretrained(folder).eval()
    assert_same_logits(model, reference)
    # a model with added tokens keeps its vocabulary in training, sampling and export
    vocab_size = 131 if name == "added tokens" else 97
    assert model.config.vocab_size == vocab_size
    idx = random_tokens(1, 4)
    assert model.generate(idx, 9, temperature=9.0).max() < vocab_size
    model.save_pretrained(tmp_path / "export")
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "export")
    assert exported.get_input_embeddings().weight.shape == (vocab_size, 48)
    assert_same_logits(model, exported.eval())


def test_names_on_the_hub(folder, monkeypatch):
    """A stand-in for the hub has two repositories, and notes the files that are asked for."""
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append((repo_id, allow_patterns))
        if repo_id not in ("openai-community/gpt2-xl", "user/name"):
            raise ConnectionError("no route\nto host")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_logits(GPT.from_pretrained("gpt2-xl"), small_transformers_gpt2())
    safetensors = ["config.json", "model*.safetensors"]
    assert asked == [("openai-community/gpt2-xl", safetensors)]
    write_bin(folder, legacy=True, n_files=1)
    assert_same_logits(GPT.from_pretrained("user/name"), small_transformers_gpt2())
    assert asked[1:] == [("user/name", safetensors), ("user/name", "pytorch_model*.bin")]
    for name in ("gpt5", "user/other"):
        assert name in exit_message(GPT.from_pretrained, name)


def test_bin_files_run_no_code(folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    (folder / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload()}, folder / "pytorch_model.bin")
    assert "UnpicklingError" in exit_message(GPT.from_pretrained, str(folder))
    assert not (tmp_path / "executed").exists()


def test_an_untied_head_is_named(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["transformer.wte.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight is not equal" in exit_message(GPT.from_pretrained, str(folder))


def test_two_names_of_the_same_function(folder):
    path = folder / "config.json"
    hf = json.loads(path.read_text()) | {"activation_function": "gelu_pytorch_tanh"}
    path.write_text(json.dumps(hf | {"n_inner": 4 * 48}))
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert_same_logits(GPT.from_pretrained(folder), reference)


OTHER_NETWORKS = [
    *[("activation_function", "relu"), ("model_type", "llama"), ("layer_norm_epsilon", 1e-6)],
    *[("scale_attn_by_inverse_layer_idx", True), ("tie_word_embeddings", False), ("n_inner", 100)],
    *[("scale_attn_weights", False), ("add_cross_attention", True)],
    # these contradict the weights
    *[("n_layer", 2), ("n_layer", 4), ("n_layer", "3"), ("n_head", 5), ("n_embd", 64)],
    *[("n_positions", 16), ("vocab_size", 90)],
]


@pytest.mark.parametrize("name, value", OTHER_NETWORKS)
def test_folders_of_other_networks_are_one_line(folder, name, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    if name == "n_inner":
        GPT2LMHeadModel(GPT2Config.from_pretrained(folder)).save_pretrained(folder)
    message = exit_message(GPT.from_pretrained, str(folder))
    assert str(folder) in message
    if (name, value) in OTHER_NETWORKS[:8]:
        assert f"GPT-2 does not have {{'{name}': {value!r}}}" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("size", [None, 0, 100, -100])
def test_missing_and_truncated_files_are_one_line(folder, name, size):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    assert str(folder) in exit_message(GPT.from_pretrained, str(folder))


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias"])
def test_missing_tensors_and_wrong_shapes_are_one_line(folder, name):
    weights = load_file(folder / "model.safetensors")
    w = weights.pop(name)
    for wrong in (weights, weights | {name: w[:-1].clone()}):
        save_file(wrong, folder / "model.safetensors")
        message = exit_message(GPT.from_pretrained, str(folder))
        assert str(folder) in message and name in message


TEXTS = ["Hello, I'm a language model,", "  two spaces,\ttabs\r\n\n\n and   newlines \n", ""]
TEXTS += ["it's DON'T we'LL 'tis 1234567 x=½*٣ naïve 日本語 e\u0301 \u00a0\u3000\u200b\ufeff"]
TEXTS += ["🙂 👩\u200d👧, a control character \0, and -->_<|endoftext|>after the end"]


def test_save_pretrained_writes_the_tokenizer_of_gpt2(tmp_path):
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: no GPT-2 vocabulary without a network")
    enc, model = fineweb.get_encoding("gpt2"), small_gpt(vocab_size=50257, n_embd=4)
    model.save_pretrained(tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]  # no temporary folder
    assert_same_logits(model, GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval())
    for tokenizer_class in (transformers.AutoTokenizer, transformers.GPT2Tokenizer):
        tokenizer = tokenizer_class.from_pretrained(tmp_path / "hf")
        assert len(tokenizer) == 50257
        assert tokenizer.eos_token_id == tokenizer.bos_token_id == enc.eot_token
        for text in TEXTS:
            tokens = tokenizer(text)["input_ids"]
            assert tokens == enc.encode(text, allowed_special="all")
            assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_save_pretrained_overwrites_nothing(tmp_path):
    for folder in (tmp_path / "folder", tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        for file in (tmp_path / "folder" / "important", tmp_path / "file"):
            file.write_text("important")
        assert str(folder) in exit_message(small_gpt().save_pretrained, folder)
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["important"]
        assert (tmp_path / "file").read_text() == "important"


# ---- sampling ------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(model, idx, max_new_tokens):
    """Greedy generation without a cache: a full forward pass for each token. When block_size is
    exceeded, the last half of the tokens becomes the new context."""
    block_size = model.config.block_size
    context = idx[:, -block_size:]
    for _ in range(max_new_tokens):
        if context.size(1) > block_size:
            context = idx[:, -(block_size // 2) :]
        token = model(context)[0][:, -1].argmax(dim=-1, keepdim=True)
        idx, context = torch.cat((idx, token), dim=1), torch.cat((context, token), dim=1)
    return idx


@pytest.mark.parametrize("T", [1, 5, 16, 30])  # block_size is 16
def test_greedy_generation_equals_full_forward_passes(T):
    model, idx = small_gpt(), random_tokens(3, T)
    generated = model.generate(idx, 40, temperature=0)
    assert torch.equal(generated, greedy(model, idx, 40))
    assert len(generated[:, T:].unique()) > 2  # not one token repeated
    for i in range(3):  # the rows of a batch are independent
        row = model.generate(idx[i : i + 1], 40, temperature=0)
        assert torch.equal(row, generated[i : i + 1])


@torch.no_grad()
def test_cache_gives_the_same_hidden_states():
    model, idx, cache = small_gpt(), random_tokens(3, 17), {}
    parts = [model.hidden(part, cache) for part in idx[:, :16].split([6] + [1] * 10, dim=1)]
    expected = model.hidden(idx[:, :16])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)
    for args in ((idx,), (idx[:, 16:], cache)):
        with pytest.raises(AssertionError, match="17 tokens.*16"):
            model.hidden(*args)


def test_generation_stops_when_each_row_has_sampled_end_of_text():
    model, idx = small_gpt(), random_tokens(3, 5)
    rows = model.generate(idx, 30, temperature=0)
    lengths = set()
    for eot in rows[:, 5:].unique().tolist():
        ends = []
        for row in rows:
            found = [t for t in range(5, 35) if row[t] == eot]  # not in the prompt
            ends.append(found[0] + 1 if found else 35)
        got = model.generate(idx, 30, temperature=0, eot=eot)
        assert torch.equal(got, rows[:, : max(ends)])
        lengths.add(max(ends))
    assert min(lengths) < 35  # at least once all rows ended early


def reference_probs(logits, temperature, top_k, top_p):
    """The probabilities of top-k and then nucleus sampling, in numpy."""
    order = np.argsort(-logits)[: top_k or None]
    p = np.exp((logits[order] - logits.max()) / max(temperature, 1e-3))
    p /= p.sum()
    n_kept = next((n for n in range(1, len(p)) if p[:n].sum() >= top_p), len(p))
    probs = np.zeros_like(logits)
    probs[order[:n_kept]] = p[:n_kept] / p[:n_kept].sum()
    return probs


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 100])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_samples_have_the_reference_frequencies(temperature, top_k, top_p):
    n, generator = 20_000, torch.Generator().manual_seed(0)
    for logits in np.random.default_rng(0).normal(size=(2, 12)):
        probs = reference_probs(logits, temperature, top_k, top_p)
        rows = torch.from_numpy(logits).expand(n, -1)
        samples = train_gpt2.sample_token(rows, temperature, top_k, top_p, generator)  # (n, 1)
        frequencies = np.bincount(samples[:, 0].numpy(), minlength=12) / n
        # 5 standard deviations of a frequency; tokens with probability 0 never occur
        assert (abs(frequencies - probs) <= 5 * np.sqrt(probs * (1 - probs) / n) + 1e-12).all()
        assert set(frequencies.nonzero()[0]) == set((probs > 1e-9).nonzero()[0])


def test_samples_depend_on_the_seed_and_not_on_dropout():
    enc, config = fineweb.get_encoding("bytes"), Config(max_new_tokens=20, num_samples=2)
    model = small_gpt(vocab_size=257, dropout=0.5).train()
    texts = list(train_gpt2.sample_texts(model, enc, "def ", config))
    without_dropout = small_gpt(vocab_size=257)
    torch.manual_seed(3)  # the global generator has no influence
    assert texts == list(train_gpt2.sample_texts(without_dropout, enc, "def ", config))
    assert model.training and texts[0] != texts[1]  # their seeds differ


# ---- optimizers and learning rate schedule -------------------------------------------------------


def set_random_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(optimizer):
    model = small_gpt()
    config = Config(weight_decay=0.25, optimizer=optimizer, lr=0.1, muon_lr=0.03)
    groups = {}
    for opt in model.configure_optimizers(config):
        for group in opt.param_groups:
            for p in group["params"]:
                assert p not in groups
                groups[p] = (type(opt), group["weight_decay"], group["lr_scale"])
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    for name, p in model.named_parameters():
        decay = 0.25 if name.endswith((*matrices, "wte.weight", "wpe.weight")) else 0.0
        expected = (torch.optim.AdamW, decay, 1.0)
        if optimizer == "muon" and name.endswith(matrices):
            expected = (train_gpt2.Muon, 0.25, pytest.approx(0.3))
        assert groups.pop(p) == expected, name
    assert not groups


def test_adamw_equals_numpy():
    model, lr, beta1, beta2 = small_gpt(), 1e-2, 0.8, 0.9
    config = Config(lr=lr, beta1=beta1, beta2=beta2, weight_decay=0.25)
    [adamw] = model.configure_optimizers(config)
    expected = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    m, v = dict.fromkeys(expected, 0.0), dict.fromkeys(expected, 0.0)
    for t in range(1, 5):
        set_random_grads(model, seed=t)
        adamw.step()
        for name, p in model.named_parameters():
            grad = p.grad.double().numpy()
            m[name] = beta1 * m[name] + (1 - beta1) * grad
            v[name] = beta2 * v[name] + (1 - beta2) * grad**2
            m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
            w = expected[name] * (1 - lr * 0.25 * (p.dim() == 2))  # decoupled decay
            expected[name] = w - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), expected[name], atol=1e-6, err_msg=name)


def newton_schulz(G):
    """Five steps of the quintic iteration of Jordan et al. 2024, for a matrix (m, n)."""
    X = (G.T if G.shape[0] > G.shape[1] else G) / np.linalg.norm(G)
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def test_muon_equals_numpy():
    model, config = small_gpt(), Config(optimizer="muon", muon_lr=0.1, weight_decay=0.25)
    [_, muon] = model.configure_optimizers(config)
    [group] = muon.param_groups
    group["lr"] = config.lr * group["lr_scale"]  # as the training loop does
    momentum = dict.fromkeys(group["params"], 0.0)
    for t in range(2):
        set_random_grads(model, seed=t)
        before = {p: p.detach().double().numpy() for p in group["params"]}
        muon.step()
        for p in group["params"]:
            grad, (n_out, n_in) = p.grad.double().numpy(), p.shape
            momentum[p] = 0.95 * momentum[p] + 0.05 * grad
            update = newton_schulz(0.95 * momentum[p] + 0.05 * grad)  # Nesterov
            update *= 0.1 * math.sqrt(max(1, n_out / n_in))
            got = before[p] * (1 - 0.1 * 0.25) - p.detach().double().numpy()
            assert np.linalg.norm(got - update) < 1e-4 * np.linalg.norm(update)


def test_learning_rates_of_gpt2():
    expected = {0: 6e-4 / 715, 1: 2 * 6e-4 / 715, 714: 6e-4, 19_073: 6e-5, 25_000: 6e-5}
    for step in range(715, 19_074, 67):
        cosine = np.cos(np.pi * (step - 715) / (19_073 - 715))  # from 1 to -1
        expected[step] = 6e-5 + (6e-4 - 6e-5) * (1 + cosine) / 2
    for step, lr in expected.items():
        assert train_gpt2.get_lr(step, PRESETS["gpt2"]) == pytest.approx(lr, rel=1e-6)


def test_learning_rates_with_cooldown_and_without_warmup():
    config = Config(lr=0.3, min_lr=0.1, warmup_steps=5, max_steps=100, cooldown=0.4)
    steps = [0, 4, 5, 59, 60, 70, 80, 90, 100]
    expected = [0.06, 0.3, 0.3, 0.3, 0.3, 0.25, 0.2, 0.15, 0.1]
    assert [train_gpt2.get_lr(step, config) for step in steps] == pytest.approx(expected)
    for warmup, step in ((0, 0), (100, 99)):  # no warmup, warmup only
        config = replace(config, warmup_steps=warmup, cooldown=0.0)
        assert train_gpt2.get_lr(step, config) == pytest.approx(0.3)


# ---- devices -------------------------------------------------------------------------------------


PEAK_TFLOPS = {"NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA A100-SXM4-80GB": 312}
PEAK_TFLOPS |= {"NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362, "NVIDIA A40": 150}
PEAK_TFLOPS |= {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835}
PEAK_TFLOPS |= {"NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA GH200 480GB": 989}
PEAK_TFLOPS |= {
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA RTX A6000": 155,
    "NVIDIA RTX A4000": math.nan,
}
PEAK_TFLOPS |= {"Tesla V100-SXM2-16GB": 125, "Tesla V100-PCIE-16GB": 112, "Tesla T4": 65}
PEAK_TFLOPS |= {"NVIDIA T400 4GB": math.nan, "NVIDIA A100-SXM4-40GB MIG 3g.20gb": math.nan}


@pytest.mark.parametrize("name", PEAK_TFLOPS)
def test_peak_flops_by_name(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    flops = train_gpt2.peak_flops("cuda:0")
    assert flops == pytest.approx(PEAK_TFLOPS[name] * 1e12, nan_ok=True)
    assert math.isnan(train_gpt2.peak_flops("cpu"))


def test_device_is_the_first_available_one(monkeypatch):
    def get_device(name, n_gpus=0, mps=False, rank=0, n_ranks=1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(n_ranks))
        return train_gpt2.get_device(name)

    assert get_device("auto") == get_device("cpu", n_gpus=1, mps=True) == "cpu"
    assert get_device("auto", mps=True) == "mps"
    assert get_device("auto", n_gpus=1, mps=True) == get_device("cuda", n_gpus=1) == "cuda:0"
    assert get_device("auto", n_gpus=4, rank=3, n_ranks=4) == "cuda:3"
    for name in ("cuda", "mps"):
        assert f"--device {name}" in exit_message(get_device, name)
    # every rank exits, not only the one without a GPU
    assert "3" in exit_message(get_device, "cuda", 2, False, 1, 3)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_dtype_is_bfloat16_where_the_gpu_has_it(monkeypatch, has_bfloat16):
    def is_bf16_supported(including_emulation=True):  # every GPU can emulate it
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    expected = torch.bfloat16 if has_bfloat16 else torch.float16
    monkeypatch.setattr(torch, "autocast", lambda *args, enabled: enabled)  # needs the device
    assert train_gpt2.get_autocast("auto", "cuda:0") == (expected, True)
    for args in (("float32", "cuda:0"), ("auto", "cpu"), ("auto", "mps")):
        assert train_gpt2.get_autocast(*args) == (torch.float32, False)


class SmallMemory(GPT):
    """Runs out of memory with more than `limit` sequences."""

    def forward(self, idx, targets=None):
        self.tried.append(idx.size(0))
        if idx.size(0) > self.limit:
            raise torch.OutOfMemoryError("simulated")
        return super().forward(idx, targets)


@pytest.mark.parametrize(
    "limit, n_sequences, free, tried",
    [
        (5, 32, 1e9, [32, 16, 8, 4]), (99, 32, 1e9, [32]), (5, 24, 1e9, [8, 4]),
        (0, 8, 1e9, [8, 4, 2]), (9, 7, 1e9, []), (5, 32, 123_200, [4]),  # 8 cannot fit
    ],
)  # fmt: skip
def test_micro_batch_size_is_halved_until_it_fits(monkeypatch, limit, n_sequences, free, tried):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 0))
    model = SmallMemory(SMALL)
    model.limit, model.tried = limit, []
    config = Config(gpt=SMALL, total_batch_size=2 * n_sequences * 16)  # two ranks
    find_micro_batch_size = functools.partial(train_gpt2.find_micro_batch_size, config, model, 2)
    B = find_micro_batch_size("cuda:0", train_gpt2.get_autocast("float32", "cpu")[1])
    assert model.tried == tried
    assert B == (tried[-1] if tried and limit else 1) and n_sequences % B == 0
    assert all(p.grad is None for p in model.parameters())
    assert find_micro_batch_size("cpu", None) == math.gcd(n_sequences, 4)  # nothing to try
