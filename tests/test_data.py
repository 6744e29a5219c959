"""Shards to batches, against slices made by numpy."""

import hashlib
import json
import threading

import numpy as np
import pytest
import torch

import fineweb
from train_gpt2 import Config, Windows, get_batch, prefetch

T = 4
LENGTHS = (30, 21, 3, 46)  # 7 + 5 + 0 + 11 windows: 23, a prime, so that no step fits an epoch
WORLDS = (1, 2, 3, 4, 8)


def shard_tokens(lengths=LENGTHS):
    """Shard k counts up from 1000 k, so that a window's first token says where it is from."""
    return [np.arange(1000 * k, 1000 * k + n, dtype=np.uint16) for k, n in enumerate(lengths)]


def write_npy(folder, shards, split="train"):
    for k, tokens in enumerate(shards):
        np.save(folder / f"data_{split}_{k:06d}.npy", tokens)


def write_bin(folder, shards, magic=20240520, version=1):
    """As llm.c's dataloader.h has it."""
    for k, tokens in enumerate(shards):
        header = np.zeros(256, dtype="<i4")
        header[:3] = magic, version, len(tokens)
        content = header.tobytes() + tokens.astype("<u2").tobytes()
        (folder / f"data_train_{k:06d}.bin").write_bytes(content)


def write_manifest(folder, facts, vocab_size=65536):
    for fact in facts:
        fact["sha256"] = hashlib.sha256((folder / fact["file"]).read_bytes()).hexdigest()
    manifest = {"encoding": "bytes", "vocab_size": vocab_size, "eot_token": 0, "shards": facts}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def open_windows(folder, block_size=T, vocab_size=65536):
    return Windows(str(folder), "train", block_size, vocab_size)


def config(**changes):
    return Config(**{"block_size": T, "total_batch_size": 24 * T, "micro_batch_size": 3} | changes)


def one_step(windows, settings, step, world_size=1):
    """The windows, (24, T + 1), that all ranks and micro-steps of an update take together."""
    share = settings.micro_batch_size * world_size
    rows = []
    for micro_step in range(24 // share):
        for rank in range(world_size):
            x, y = get_batch(windows, settings, step, micro_step, rank, world_size)
            assert x.shape == y.shape == (settings.micro_batch_size, T)
            rows.append(torch.cat((x, y[:, -1:]), dim=1).numpy())
    return np.concatenate(rows)


def numpys_windows():
    """All windows of a pass over LENGTHS in the stream's order, (23, T + 1)."""
    starts = [(s, i * T) for s in shard_tokens() for i in range((len(s) - 1) // T)]
    return np.stack([shard[i : i + T + 1] for shard, i in starts])


def splits():
    """Every world size with every micro-batch that divides its share of 24 sequences."""
    return [(w, b) for w in WORLDS for b in range(1, 25) if 24 % (w * b) == 0]


def error_of(folder, **changes):
    """The message of the SystemExit that opening must raise: one line of text, so status 1."""
    with pytest.raises(SystemExit) as error:
        open_windows(folder, **changes)
    assert isinstance(error.value.code, str) and len(error.value.code.splitlines()) == 1
    return error.value.code


# ---- batches


def test_y_is_x_moved_by_one(tmp_path):
    write_npy(tmp_path, shard_tokens())
    x, y = get_batch(open_windows(tmp_path), config(), 0, 0)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)  # the text counts up


def test_in_order_a_step_is_the_streams_next_windows_for_every_split(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    stream = np.concatenate([numpys_windows()] * 4)
    for world_size, B in splits():
        settings = config(shuffle=False, micro_batch_size=B)
        for step in range(3):
            got = one_step(windows, settings, step, world_size)
            np.testing.assert_array_equal(got, stream[24 * step : 24 * step + 24])


def test_shuffled_a_step_takes_the_same_windows_for_every_split(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    for step in (0, 5):
        expected = sorted(one_step(windows, config(micro_batch_size=24), step).tolist())
        for world_size, B in splits():
            got = one_step(windows, config(micro_batch_size=B), step, world_size)
            assert sorted(got.tolist()) == expected


def test_shuffled_an_epoch_takes_every_window_once(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    starts = np.concatenate([one_step(windows, config(), step)[:, 0] for step in range(23)])
    expected = numpys_windows()[:, 0]
    for epoch in starts.reshape(24, 23):  # 23 steps of 24 windows are 24 epochs of 23
        np.testing.assert_array_equal(np.sort(epoch), expected)


def test_every_epoch_has_its_own_order(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    starts = np.concatenate([one_step(windows, config(), step)[:, 0] for step in range(3)])
    orders = [starts[:23], starts[23:46], starts[46:69], numpys_windows()[:, 0]]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_a_seed_an_order(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    first, other, again = (one_step(windows, config(seed=seed), 0) for seed in (1, 2, 1))
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first)


@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_stay_in_step_over_the_ends_of_shards_and_epochs(tmp_path, shuffle):
    # where each rank decides alone when its shard is over, some take one batch more than others,
    # and from there on tokens are repeated and left out
    write_npy(tmp_path, shard_tokens())
    windows, settings = open_windows(tmp_path), config(shuffle=shuffle, micro_batch_size=1)
    for step in range(12):
        single = one_step(windows, settings, step)
        for world_size in WORLDS:
            got = one_step(windows, settings, step, world_size)
            np.testing.assert_array_equal(np.sort(got[:, 0]), np.sort(single[:, 0]))


def test_a_batch_is_a_function_of_its_arguments(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    # (step, micro_step, rank, world_size); the steps lie in many epochs
    calls = [(step, micro, rank, 2) for step in (0, 3, 40) for micro in (0, 3) for rank in (0, 1)]
    first = [get_batch(windows, config(), *call) for call in calls]
    backwards = [get_batch(open_windows(tmp_path), config(), *call) for call in calls[::-1]]
    for (x, y), (x_again, y_again) in zip(first, backwards[::-1], strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)


def test_a_batch_may_be_written_to(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    x, _ = get_batch(windows, config(), 0, 0)
    first = x.clone()
    x.zero_()  # neither the file nor y is behind it
    assert torch.equal(get_batch(windows, config(), 0, 0)[0], first)


def test_no_window_crosses_shards(tmp_path):
    write_npy(tmp_path, shard_tokens())
    windows = open_windows(tmp_path)
    assert len(windows) == 7 + 5 + 0 + 11
    for i in range(len(windows)):
        window = windows[i].astype(int)
        assert len(window) == T + 1 and window[-1] - window[0] == T  # else it would leap


@pytest.mark.parametrize("n_tokens, n_windows", [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_a_shards_last_window_needs_a_token_to_predict(tmp_path, n_tokens, n_windows):
    write_npy(tmp_path, shard_tokens([n_tokens]))
    assert len(open_windows(tmp_path)) == n_windows


def test_llmc_shards_give_the_same_batches(tmp_path):
    (tmp_path / "npy").mkdir()
    (tmp_path / "bin").mkdir()
    write_npy(tmp_path / "npy", shard_tokens())
    write_bin(tmp_path / "bin", shard_tokens())
    npy, llmc = open_windows(tmp_path / "npy"), open_windows(tmp_path / "bin")
    assert len(npy) == len(llmc)
    for step in range(3):
        expected = one_step(npy, config(), step)
        np.testing.assert_array_equal(one_step(llmc, config(), step), expected)


def test_tokens_beyond_32767_survive(tmp_path):
    large = np.array([0, 32767, 32768, 50256, 65535], dtype=np.uint16)
    write_npy(tmp_path, [large])
    settings = config(total_batch_size=T, micro_batch_size=1)
    x, y = get_batch(open_windows(tmp_path), settings, 0, 0)
    assert x.tolist() == [[0, 32767, 32768, 50256]]
    assert y.tolist() == [[32767, 32768, 50256, 65535]]


@pytest.mark.parametrize("name", ["my_train_set", "my_val_set"])
def test_a_datas_name_does_not_mix_the_splits(tmp_path, name):
    # fineweb.py names shards after their folder
    np.save(tmp_path / f"{name}_val_000000.npy", np.full(9, 1, dtype=np.uint16))
    np.save(tmp_path / f"{name}_train_000001.npy", np.full(9, 2, dtype=np.uint16))
    for split, token in (("val", 1), ("train", 2)):
        windows = Windows(str(tmp_path), split, T, 257)
        assert {int(token) for i in range(len(windows)) for token in windows[i]} == {token}


# ---- prefetch


def test_prefetch_yields_in_order():
    arguments = [(a, b) for a in range(5) for b in range(4)]
    assert list(prefetch(lambda a, b: 10 * a + b, arguments)) == [10 * a + b for a, b in arguments]


def test_prefetch_of_nothing_is_empty():
    assert list(prefetch(abs, [])) == []


def test_prefetch_fetches_the_next_while_its_reader_is_busy():
    fetched = [threading.Event() for _ in range(3)]
    batches = prefetch(lambda i: fetched[i].set(), [(0,), (1,), (2,)], ahead=1)
    next(batches)
    assert fetched[1].wait(timeout=10)  # nobody has asked for it yet
    batches.close()


def test_prefetch_keeps_no_more_than_ahead_in_flight():
    asked = []
    arguments = ((asked.append(i) or i,) for i in range(20))
    for read, got in enumerate(prefetch(lambda i: i, arguments, ahead=3), start=1):
        assert got == read - 1
        assert len(asked) <= read + 3


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_prefetch_hands_an_error_on_in_its_place(error):
    def fetch(i):
        if i == 2:
            raise error("here")
        return i

    batches = prefetch(fetch, [(i,) for i in range(5)])
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(error, match="here"):
        next(batches)


# ---- what is wrong with shards is said in one line, at the start


def test_no_folder(tmp_path):
    message = error_of(tmp_path / "nowhere")
    assert "nowhere" in message and "fineweb.py" in message


def test_an_empty_folder(tmp_path):
    assert "fineweb.py" in error_of(tmp_path)


def test_the_other_split_alone(tmp_path):
    write_npy(tmp_path, shard_tokens(), split="val")
    assert "train" in error_of(tmp_path)


def test_an_int32_shard(tmp_path):
    write_npy(tmp_path, [np.arange(100, dtype=np.int32)])
    assert "data_train_000000.npy" in error_of(tmp_path)


def test_a_shard_of_two_dimensions(tmp_path):
    write_npy(tmp_path, [np.zeros((10, 10), dtype=np.uint16)])
    assert "data_train_000000.npy" in error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 6, 40, 150])
def test_a_truncated_npy_shard(tmp_path, size):
    write_npy(tmp_path, shard_tokens())
    path = tmp_path / "data_train_000001.npy"
    path.write_bytes(path.read_bytes()[:size])
    assert path.name in error_of(tmp_path)


@pytest.mark.parametrize("size", [0, 6, 40, 1024, 1030])
def test_a_truncated_bin_shard(tmp_path, size):
    write_bin(tmp_path, shard_tokens())
    path = tmp_path / "data_train_000001.bin"
    path.write_bytes(path.read_bytes()[:size])
    assert path.name in error_of(tmp_path)


@pytest.mark.parametrize("header", [{"magic": 20240519}, {"version": 2}])
def test_a_bin_shard_with_another_header(tmp_path, header):
    write_bin(tmp_path, shard_tokens(), **header)
    assert "data_train_000000.bin" in error_of(tmp_path)


def test_a_token_beyond_the_vocabulary_without_a_manifest(tmp_path):
    write_npy(tmp_path, shard_tokens())
    message = error_of(tmp_path, vocab_size=3045)  # the largest token is 3045
    assert "data_train_000003.npy" in message and "3045" in message
    assert len(open_windows(tmp_path, vocab_size=3046)) == 23


def test_a_token_beyond_the_vocabulary_by_the_manifest(tmp_path):
    write_npy(tmp_path, shard_tokens([30]))
    facts = [{"file": "data_train_000000.npy", "tokens": 30, "largest": 29}]
    write_manifest(tmp_path, facts, vocab_size=29)
    message = error_of(tmp_path, vocab_size=29)
    assert "data_train_000000.npy" in message and "29" in message


def test_another_vocabulary_than_the_manifests(tmp_path):
    write_npy(tmp_path, shard_tokens([30]))
    facts = [{"file": "data_train_000000.npy", "tokens": 30, "largest": 29}]
    write_manifest(tmp_path, facts, vocab_size=257)
    message = error_of(tmp_path, vocab_size=50257)
    assert "257" in message and "--vocab_size" in message


def test_a_shard_of_another_size_than_the_manifests(tmp_path):
    write_npy(tmp_path, shard_tokens([30]))
    facts = [{"file": "data_train_000000.npy", "tokens": 31, "largest": 29}]
    write_manifest(tmp_path, facts)
    message = error_of(tmp_path)
    assert "data_train_000000.npy" in message and "30" in message and "31" in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"shards": [{"tokens": 30}]}',
        '{"shards": [{"file": "data_train_000000.npy"}]}',
    ],
)
def test_a_damaged_manifest(tmp_path, text):
    write_npy(tmp_path, shard_tokens([30]))
    (tmp_path / "manifest.json").write_text(text)
    assert "manifest.json" in error_of(tmp_path)


def test_too_little_text_for_one_window(tmp_path):
    write_npy(tmp_path, shard_tokens([4, 4]))  # a window of 4 is 5 tokens
    assert "--block_size 4" in error_of(tmp_path)


# ---- a folder of several kinds of shards


def numbers(vocab_size, n=2000):
    """Tokens as an encoding of that vocabulary might give them."""
    return np.random.default_rng(0).integers(0, vocab_size, n).astype(np.uint16)


def test_npy_and_bin_of_several_sizes_in_one_folder(tmp_path):
    shards = [numbers(50257, n) for n in (1500, 4000, 20)]
    write_bin(tmp_path, shards)
    shards.append(numbers(50257, 3001))
    np.save(tmp_path / "data_train_000003.npy", shards[-1])
    opened = fineweb.open_shards(tmp_path, "train", 50257)
    for shard, expected in zip(opened, shards, strict=True):
        np.testing.assert_array_equal(shard, expected)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("vocab_sizes", [(257, 50257), (50257, 257)])
@pytest.mark.parametrize("write", [write_npy, write_bin])
def test_shards_of_two_encodings_are_refused(tmp_path, write, vocab_sizes, split):
    write(tmp_path, [numbers(vocab_sizes[0])])
    np.save(tmp_path / f"more_{split}_000009.npy", numbers(vocab_sizes[1]))
    error = error_of(tmp_path)
    assert "several encodings" in error and "(bytes)" in error and "(gpt2)" in error


def test_a_shard_of_another_encoding_beside_a_manifest_is_refused(tmp_path):
    fineweb.write_shards(["some text " * 200], tmp_path, "bytes", val_tokens=1000, workers=1)
    open_windows(tmp_path, vocab_size=257)
    np.save(tmp_path / "more_train_000009.npy", numbers(50257))
    assert "more_train_000009.npy (gpt2)" in error_of(tmp_path, vocab_size=257)


def test_a_few_tokens_do_not_tell_their_encoding(tmp_path):
    write_npy(tmp_path, [numbers(257, n=900), numbers(50257)])
    open_windows(tmp_path)


def test_shards_that_are_not_finished_are_not_trained_on(tmp_path):
    def documents():
        yield "some text " * 500_000  # more than is read at a time
        raise SystemExit("stopped")

    settings = {"shard_size": 10**6, "val_tokens": 1000, "workers": 1}
    with pytest.raises(SystemExit, match="stopped"):
        fineweb.write_shards(documents(), tmp_path, "bytes", **settings)
    assert list(tmp_path.glob("*_train_*.npy"))
    assert "not finished" in error_of(tmp_path, vocab_size=257)
