"""OpenAI's weights, against transformers: a small random GPT-2 saved to disk, no download."""

import json

import pytest
import torch
import transformers

from train_gpt2 import GPT


def small_gpt2(folder, **parts):
    """A random GPT-2 as transformers has and saves it, with no part left at zero or one."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_layer=3, n_head=4, n_embd=48, **parts
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def test_logits_agree_with_transformers(tmp_path):
    theirs = small_gpt2(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(97, (2, 32))
    with torch.no_grad():
        assert torch.allclose(ours(idx)[0], theirs(idx).logits, atol=1e-4)


@pytest.mark.parametrize(
    "file, content, says",
    [
        ("config.json", "{", "delimiter|property name"),
        ("model.safetensors", "torn", "model|header|safetensors"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(tmp_path, file, content, says):
    small_gpt2(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(SystemExit, match=says) as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_another_network_under_the_name_is_refused(tmp_path):
    small_gpt2(tmp_path, activation_function="relu")
    with pytest.raises(SystemExit, match="activation_function"):
        GPT.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    small_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_embd": 64}))
    with pytest.raises(SystemExit, match="size mismatch") as error:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_openais_repositories_alone(monkeypatch, tmp_path):
    small_gpt2(tmp_path)
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert GPT.from_pretrained("gpt2-large").config.n_layer == 3
    assert asked == ["openai-community/gpt2-large"]
    with pytest.raises(SystemExit, match="no model 'gpt3'"):
        GPT.from_pretrained("gpt3")


def test_no_network_is_told_in_one_line(monkeypatch):
    def snapshot_download(repository, allow_patterns):
        raise ConnectionError("unreachable")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(SystemExit, match="connect once, or name a folder") as error:
        GPT.from_pretrained("gpt2")
    assert "\n" not in str(error.value)


def test_twenty_greedy_tokens_agree_with_transformers(tmp_path):
    theirs = small_gpt2(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(97, (2, 8))
    expected = theirs.generate(idx, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 20, temperature=0), expected)
