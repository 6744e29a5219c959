"""OpenAI's weights in, ours out, against transformers. No network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import train_gpt2
from runs import CheckpointWriter
from train_gpt2 import GPT, Config, configure_optimizer, load_model

ROOT = Path(train_gpt2.__file__).resolve().parent


def reference():
    """A small GPT-2 of transformers with no weight at a trivial value, biases and norms neither."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 97, "n_positions": 32, "n_layer": 3, "n_head": 4, "n_embd": 48}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=96, eos_token_id=96)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.2)
    return model


def exported(folder):
    """The same as a folder, and itself."""
    model = reference()
    model.save_pretrained(folder)
    return model


def ours(**changes):
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 65}
    torch.manual_seed(2)
    model = GPT(Config(**sizes | changes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if "ln_" in name and name.endswith("weight") else 0.0, std=0.2)
    return model


def tokens(*shape, vocab_size):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(3))


def assert_same_logits(model, other, vocab_size, T):
    """model, of this project, computes what other, of transformers, does."""
    idx = tokens(4, T, vocab_size=vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(model(idx)[0], other(idx).logits, rtol=0, atol=1e-4)


def error_of(source):
    """The message of the SystemExit that loading must raise: one line of text, so status 1."""
    with pytest.raises(SystemExit) as error:
        GPT.from_pretrained(source)
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    return error.value.code


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_logits_are_transformers_logits(tmp_path):
    other = exported(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.config.block_size == 32 and model.config.vocab_size == 97
    assert_same_logits(model, other, 97, 32)


def test_20_greedy_tokens_are_transformers_tokens(tmp_path):
    other, idx = exported(tmp_path), tokens(4, 5, vocab_size=97)
    expected = idx
    with torch.no_grad():
        for _ in range(20):
            likeliest = other(expected).logits[:, -1].argmax(dim=-1, keepdim=True)
            expected = torch.cat((expected, likeliest), dim=1)
    got = GPT.from_pretrained(tmp_path).generate(idx, 20, temperature=0)
    assert torch.equal(got, expected)
    assert len(got[:, 5:].unique()) > 5  # and not one token over and over


def test_the_hubs_file_without_prefix_and_with_mask_buffers_loads(tmp_path):
    other = exported(tmp_path)
    weights = {}
    for name, w in other.state_dict().items():
        if name != "lm_head.weight":
            weights[name.removeprefix("transformer.")] = w.contiguous()
    for layer in range(3):
        weights[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path), other, 97, 32)


def test_a_file_with_prefix_and_head_loads(tmp_path):
    other = exported(tmp_path)
    weights = {name: w.clone() for name, w in other.state_dict().items()}
    assert "transformer.wte.weight" in weights and "lm_head.weight" in weights
    save_file(weights, tmp_path / "model.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path), other, 97, 32)


def test_an_mlp_said_to_be_four_times_as_wide_is_gpt2s(tmp_path):
    other = exported(tmp_path)
    change_config(tmp_path, n_inner=4 * 48)
    assert_same_logits(GPT.from_pretrained(tmp_path), other, 97, 32)


def test_weights_that_are_whole_numbers_are_named(tmp_path):
    exported(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    assert f"{name} is of torch.int8" in error_of(tmp_path)


def test_loaded_weights_stay_tied(tmp_path):
    exported(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_transformers_loads_what_save_pretrained_writes(tmp_path):
    model = ours()
    model.save_pretrained(tmp_path / "hf")
    other, info = GPT2LMHeadModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_logits(model, other.eval(), 65, 16)


def test_the_padding_rows_do_not_go_out(tmp_path):
    model = ours()
    assert len(model.transformer.wte.weight) == 128
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (65, 32)
    assert torch.equal(weights["transformer.wte.weight"], model.transformer.wte.weight[:65])


def test_out_and_in_again_is_bit_identical(tmp_path):
    model, idx = ours(), tokens(2, 16, vocab_size=65)
    model.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert torch.equal(back(idx)[0], model(idx)[0])
    for name, w in model.state_dict().items():
        real = 65 if name.endswith(("wte.weight", "lm_head.weight")) else len(w)
        assert torch.equal(back.state_dict()[name][:real], w[:real]), name


def test_an_unknown_name_is_one_line_with_the_known_ones():
    message = error_of("gpt3")
    assert "gpt3" in message and "gpt2-xl" in message


def test_a_folder_without_files_is_one_line(tmp_path):
    assert str(tmp_path) in error_of(tmp_path)


def test_a_folder_without_weights_is_one_line(tmp_path):
    exported(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 100, 20_000])
def test_truncated_weights_are_one_line(tmp_path, size):
    exported(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert str(tmp_path) in error_of(tmp_path)


@pytest.mark.parametrize("text", ["", '{"n_layer": 3', "[]", "{}"])
def test_a_damaged_config_is_one_line(tmp_path, text):
    exported(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path) in error_of(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"model_type": "llama"},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
        {"n_inner": 100},
        {"add_cross_attention": True},
        {"quantization_config": {"load_in_8bit": True}},
    ],
)
def test_another_network_than_gpt2_is_one_line_that_names_the_difference(tmp_path, change):
    exported(tmp_path)
    change_config(tmp_path, **change)
    assert next(iter(change)) in error_of(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 2},
        {"n_layer": 4},
        {"n_layer": "3"},
        {"n_embd": 64},
        {"n_positions": 16},
        {"vocab_size": 90},
    ],
)
def test_a_config_that_contradicts_the_weights_is_one_line(tmp_path, change):
    exported(tmp_path)
    change_config(tmp_path, **change)
    assert str(tmp_path) in error_of(tmp_path)


def test_heads_that_do_not_divide_the_channels_are_one_line(tmp_path):
    exported(tmp_path)
    change_config(tmp_path, n_head=5)  # of 48 channels; no weight's shape shows it
    assert str(tmp_path) in error_of(tmp_path)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias"])
def test_a_missing_tensor_is_one_line_that_names_it(tmp_path, name):
    exported(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    assert name in error_of(tmp_path)


def test_gpt2_comes_from_openais_repository_on_the_hub(tmp_path, monkeypatch):
    other, asked = exported(tmp_path), []

    def deliver(repo_id, *args, **settings):
        asked.append(repo_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", deliver)
    assert_same_logits(GPT.from_pretrained("gpt2"), other, 97, 32)
    assert asked == ["openai-community/gpt2"]


# the hub's own errors are of several families
@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_a_hub_out_of_reach_is_one_line_with_advice(monkeypatch, error):
    def refuse(*args, **settings):
        raise error("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    message = error_of("gpt2")
    assert "gpt2" in message and "folder" in message


# ---- whatever has weights ------------------------------------------------------------------------


def run_of(folder, **models):
    """A run's folder with these models as its checkpoints, and as hf/."""
    folder.mkdir()
    for name, model in models.items():
        if name == "hf":
            model.save_pretrained(folder / "hf")
            continue
        writer = CheckpointWriter(folder, model.config, "data")
        optimizer = configure_optimizer(model, model.config, "cpu")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        writer.save(int(name.removeprefix("step_")), model, optimizer, scaler)
        writer.wait()
        assert not writer.failure
    return folder


def another(factor):
    model = ours()
    with torch.no_grad():
        for p in model.parameters():
            p *= factor
    return model


def test_a_path_has_that_checkpoint_and_a_run_has_its_newest(tmp_path):
    models = {"step_9": another(0.9), "step_10": another(1.1), "hf": another(1.3)}
    run, idx = run_of(tmp_path / "run", **models), tokens(2, 16, vocab_size=65)
    sources = {run / "step_000009.pt": "step_9", run / "step_000010.pt": "step_10"}
    for source, name in (sources | {run: "step_10", run / "hf": "hf"}).items():
        assert torch.equal(load_model(str(source))(idx)[0], models[name](idx)[0]), source
    os.rename(run / "step_000009.pt", tmp_path / "best.pt")  # whatever its name is, and place
    assert torch.equal(load_model(str(tmp_path / "best.pt"))(idx)[0], models["step_9"](idx)[0])
    (run / "step_000010.pt").unlink()
    assert torch.equal(load_model(str(run))(idx)[0], models["hf"](idx)[0])


def test_a_folder_may_be_named_as_a_checkpoint_is(tmp_path):
    model, idx = ours(), tokens(2, 16, vocab_size=65)
    model.save_pretrained(tmp_path / "gpt2.pt")
    run_of(tmp_path / "run.pt", step_1=model)
    for name in ("gpt2.pt", "run.pt"):
        assert torch.equal(load_model(str(tmp_path / name))(idx)[0], model(idx)[0])


def test_a_checkpoint_from_when_the_prompt_was_a_hyperparameter_loads(tmp_path):
    path, model = run_of(tmp_path / "run", step_1=ours()) / "step_000001.pt", ours()
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["prompt"] = ""
    torch.save(checkpoint, path)
    idx = tokens(2, 16, vocab_size=65)
    for source in (path, path.parent):
        assert torch.equal(load_model(str(source))(idx)[0], model(idx)[0])
    checkpoint["config"]["prompts"] = ""  # which no version had
    torch.save(checkpoint, path)
    with pytest.raises(SystemExit, match="another version of this script"):
        load_model(str(path))


def test_dropout_is_the_callers(tmp_path):
    run = run_of(tmp_path / "run", step_1=ours(), hf=ours())
    for source in (run, run / "step_000001.pt", run / "hf"):
        assert load_model(str(source)).config.dropout == 0.0
        assert load_model(str(source), dropout=0.25).transformer.drop.p == 0.25


def test_importing_the_trainer_does_nothing_and_takes_no_optional_library():
    optional = ["transformers", "wandb", "datasets", "matplotlib", "huggingface_hub"]
    code = f"import sys, train_gpt2; print([n for n in {optional} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (run.stdout, run.returncode) == ("[]\n", 0), run.stderr
