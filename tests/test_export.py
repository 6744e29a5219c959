"""Weights for other programs: what transformers makes of an export is what is ours."""

import json
import os
import random
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fineweb
from inference import Task, export
from train_gpt2 import GPT, Config, load_model, main

TINY = Config(
    preset="tiny", n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=257,
    total_batch_size=256, micro_batch_size=8, max_steps=40, lr=1e-2, min_lr=1e-3, warmup_steps=2,
    data_dir="data", out_dir="run", device="cpu", dtype="float32", compile=False, val_interval=0,
    hellaswag_interval=0, sample_interval=40, checkpoint_interval=20, keep_checkpoints=0,
)  # fmt: skip
WORDS = "the cat sat on a mat and saw two red birds fly over green hills".split()
WEIGHTS = ["config.json", "generation_config.json", "model.safetensors"]
TOKENIZER = ["merges.txt", "tokenizer_config.json", "vocab.json"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: checkpoints after 20 and 40 updates, and hf/."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rng = random.Random(0)
        documents = [" ".join(rng.choices(WORDS, k=rng.randint(3, 30))) for _ in range(300)]
        fineweb.write_shards(documents, "data", "bytes", val_tokens=2000, workers=1)
        main(TINY)
    return folder / "run"


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An empty working folder, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2's encoding."""
    try:
        return fineweb.get_encoding("gpt2")
    except SystemExit as error:
        pytest.skip(str(error))


def small_model(vocab_size, seed=0):
    torch.manual_seed(seed)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 4, "block_size": 64, "vocab_size": vocab_size}
    return GPT(Config(**sizes)).eval()


def export_of(source, folder="mine"):
    """What --export writes."""
    main(replace(TINY, init_from=str(source)), Task(export=str(folder)))
    return Path(folder)


def small_export(vocab_size):
    small_model(vocab_size).save_pretrained(f"source{vocab_size}")
    return export_of(f"source{vocab_size}")


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def contents(folder) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def error_of(function, *args) -> str:
    """The message of the SystemExit that a call must raise: one line; as text it means status 1."""
    with pytest.raises(SystemExit) as error:
        function(*args)
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    return error.value.code


# ---- the weights ---------------------------------------------------------------------------------


def assert_same(run, checkpoint, folder, capsys):
    """A folder has the checkpoint's weights, as transformers understands them: the logits, and the
    text that --prompt prints."""
    weights = torch.load(run / checkpoint, weights_only=True)["model"]
    model = GPT(TINY)
    model.load_state_dict(weights)
    other, info = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    idx = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(idx)[0], other.eval()(idx).logits, rtol=0, atol=1e-4
        )

    capsys.readouterr()
    prompt = "the cat saw "
    config = replace(TINY, init_from=str(run / checkpoint))
    main(config, Task(prompt=(prompt,), num_samples=1, max_new_tokens=20, temperature=0.0))
    idx = torch.tensor([[*prompt.encode()]])
    theirs = other.generate(
        idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False
    )
    text = bytes(t for t in theirs[0].tolist() if t < 256).decode(errors="replace")
    assert capsys.readouterr().out == f"> {text}\n"
    assert len(set(text)) > 5


def test_the_hf_folder_of_a_run_has_its_last_weights(run, capsys):
    assert_same(run, "step_000040.pt", run / "hf", capsys)
    assert names(run / "hf") == WEIGHTS


def test_a_checkpoint_between_is_exported_too(run, capsys):
    folder = export_of(run / "step_000020.pt")
    assert capsys.readouterr().out == f"mine has {run}/step_000020.pt for transformers\n"
    assert_same(run, "step_000020.pt", folder, capsys)
    last, before = (load_file(f / "model.safetensors") for f in (run / "hf", folder))
    assert not any(torch.equal(last[name], before[name]) for name in last)


def test_a_run_and_its_export_are_exported_alike_and_bit_for_bit(run):
    first = contents(run / "hf")
    for i, source in enumerate((run, run / "hf", run / "step_000040.pt", "0")):
        assert [*contents(export_of(source, str(i))).values()] == [*first.values()]


def test_an_export_makes_the_folders_that_lead_to_it(run):
    assert names(export_of(run, "a/b/c")) == WEIGHTS
    assert names("a/b") == ["c"]


@pytest.mark.parametrize("vocab_size, end", [(257, 256), (97, 96), (50257, 50256), (50304, 50256)])
def test_a_document_begins_and_ends_with_end_of_text(vocab_size, end):
    small_model(vocab_size).save_pretrained("mine")
    for kind in (transformers.AutoConfig, transformers.GenerationConfig):
        config = kind.from_pretrained("mine")
        assert (config.bos_token_id, config.eos_token_id) == (end, end)
    assert transformers.AutoConfig.from_pretrained("mine").vocab_size == vocab_size


# ---- the tokenizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [257, 97, 50257, 50304])
def test_the_tokenizer_is_there_exactly_where_the_encoding_is_gpt2s(vocab_size, gpt2, capsys):
    has = vocab_size >= 50257
    folder = small_export(vocab_size)
    assert names(folder) == sorted(WEIGHTS + TOKENIZER * has)
    assert capsys.readouterr().out.endswith(", with its tokenizer\n" if has else "transformers\n")


@pytest.fixture(scope="module")
def tokenizer(gpt2, tmp_path_factory):
    """An export's, as transformers has it."""
    folder = tmp_path_factory.mktemp("tokenizer") / "mine"
    export(small_model(50257), folder, gpt2, "it again")
    return transformers.AutoTokenizer.from_pretrained(folder)


# what the pattern and the merges have rules for, and what no rule is for
PIECES = [
    *(
        "'s",
        "'LL",
        "don't",
        "1234",
        "½",
        "٣",
        "naïve",
        "日本",
        "🙂",
        "👩\u200d👧",
        "e\u0301",
        "-->",
    ),
    *(
        " ",
        "   ",
        "\t",
        "\r\n",
        "\n\n",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\ufeff",
        "\u200b",
        "\0",
        "_",
    ),
    *("<|endoftext|>", "<|endoftext", "\ufffd", "\U0010ffff"),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=12).map("".join)


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_the_tokenizer_encodes_as_ours_and_decodes_what_it_encoded(tokenizer, gpt2, text):
    tokens = tokenizer(text)["input_ids"]
    assert tokens == gpt2.encode(text, allowed_special="all")
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


def test_the_tokenizer_has_the_vocabulary_and_its_one_special_token(tokenizer, gpt2):
    assert len(tokenizer) == gpt2.n_vocab and tokenizer.model_max_length == 64
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == gpt2.eot_token
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == gpt2.eot_token
    assert tokenizer.all_special_ids == [gpt2.eot_token]
    for token in random.Random(0).sample(range(50256), 2000):
        content = gpt2.decode_single_token_bytes(token)
        assert tokenizer.decode([token], clean_up_tokenization_spaces=False) == content.decode(
            errors="replace"
        )


def test_transformers_pipeline_continues_as_the_prompt_does(gpt2, capsys):
    folder = small_export(50257)
    capsys.readouterr()
    prompt = "Hello, I'm a language model,"
    main(
        replace(TINY, init_from=str(folder)),
        Task(prompt=(prompt,), num_samples=1, max_new_tokens=5, temperature=0.0),
    )
    generate = transformers.pipeline("text-generation", str(folder), device="cpu")
    [said] = generate(prompt, max_new_tokens=5, do_sample=False)
    assert capsys.readouterr().out == f"> {said['generated_text']}\n"


def test_without_the_vocabulary_at_hand_the_weights_are_exported_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    fineweb.get_encoding.cache_clear()
    assert names(small_export(50257)) == WEIGHTS
    assert "TIKTOKEN_CACHE_DIR" in error_of(
        main, replace(TINY, init_from="mine"), Task(prompt=("a",))
    )


def test_a_vocabulary_that_is_gone_since_the_start_costs_the_tokenizer_alone(
    gpt2, tmp_path, monkeypatch
):
    # tiktoken keeps it below /tmp, which others clean up while a run takes days
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    export(small_model(50257), Path("mine"), gpt2, "it again")
    assert load_model("mine").config.vocab_size == 50257
    assert names("mine") in (WEIGHTS, sorted(WEIGHTS + TOKENIZER))


# ---- a disk that does not take it ----------------------------------------------------------------


@pytest.fixture
def limit():
    """A function that sets the largest size of a file, as a full disk has one; None: any size."""

    def limit(n_bytes=None):
        size = resource.RLIM_INFINITY if n_bytes is None else n_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    yield limit
    limit()


@pytest.mark.parametrize("n_bytes", [0, 50, 500, 5000, 900_000])
def test_an_export_is_whole_or_not_there(n_bytes, gpt2, limit):
    small_model(50257).save_pretrained("source")  # 0.8 MB; and vocab.json has 1 MB
    limit(n_bytes)
    error = error_of(export_of, "source")
    limit()
    assert error.startswith("mine cannot be written") and "the same command again" in error
    assert not Path("mine").exists()
    assert names(export_of("source")) == sorted(WEIGHTS + TOKENIZER)  # the same command again


def test_an_export_that_breaks_leaves_the_one_before(limit):
    export(small_model(257), Path("hf"), None, "it again")
    before = contents("hf")
    limit(500)
    assert "it again" in error_of(export, small_model(257, seed=1), Path("hf"), None, "it again")
    limit()
    assert contents("hf") == before
    export(small_model(257, seed=1), Path("hf"), None, "it again")
    assert contents("hf").keys() == before.keys() and contents("hf") != before


def test_what_a_broken_export_left_gets_into_no_other_one(gpt2, limit):
    limit(900_000)
    error_of(export, small_model(50257), Path("mine"), gpt2, "it again")
    limit()
    assert names(small_export(257)) == WEIGHTS


@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a file", "a link to nowhere"])
def test_what_exists_is_not_written_over(what, run):
    if what == "a file":
        Path("mine").write_text("a letter")
    elif what == "a link to nowhere":
        Path("mine").symlink_to("nowhere")
    else:
        Path("mine").mkdir()
    if what == "a folder":
        shutil.copy(run / "hf/config.json", "mine")
    before, kind = contents("."), os.lstat("mine")
    assert "mine exists" in error_of(export_of, run)
    assert contents(".") == before and os.lstat("mine") == kind
    assert names(".") == ["mine"]


@pytest.mark.parametrize("place", ["file/mine", "x" * 300])
def test_a_place_that_cannot_be_written_is_named(place, run):
    Path("file").write_text("in the way")  # permissions would not stop root
    before = contents(".")
    assert f"{place} cannot be written" in error_of(export_of, run, place)
    assert contents(".") == before


@pytest.mark.parametrize("rank", [0, 1])
def test_of_torchruns_processes_the_first_one_exports(rank, run, monkeypatch):
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert export_of(run).exists() == (rank == 0)


def test_the_configuration_says_what_openais_does(run):
    ours = json.loads((run / "hf/config.json").read_text())
    theirs = transformers.GPT2Config().to_dict()
    assert ours["model_type"] == transformers.GPT2Config.model_type
    for key in ("activation_function", "layer_norm_epsilon", "n_inner", "tie_word_embeddings"):
        assert ours[key] == theirs[key]
