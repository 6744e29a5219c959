"""Bad input: one line that says what is wrong and what to do, and exit status 1."""

import pytest

from train_gpt2 import PRESETS, main, parse_arguments


def complaint(*arguments):
    """The line with which the script leaves."""
    with pytest.raises(SystemExit) as error:
        main(parse_arguments([*arguments]))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


def test_a_bare_call_means_gpt2_and_flags_keep_their_underscores():
    assert parse_arguments([]) == PRESETS["gpt2"]
    assert parse_arguments(["--max_steps", "7", "--no-compile"]).max_steps == 7
    assert parse_arguments(["gpt2-xl", "--max_steps", "7"]).n_layer == 48


def test_an_unknown_preset_is_answered_with_the_known_ones():
    assert "no preset 'gtp2': choose one of gpt2, gpt2-medium" in complaint("gtp2")


@pytest.mark.parametrize("flags", [["--learning_rate", "1"], ["--lr", "fast"], ["--dtype", "int8"]])
def test_unknown_flags_and_wrong_types_exit_with_status_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        parse_arguments(["gpt2", *flags])
    assert error.value.code == 2


@pytest.mark.parametrize(
    "name, value", [("n_layer", 0), ("max_steps", -1), ("lr", -0.1), ("dropout", 1.5), ("beta2", 1)]
)
def test_a_number_that_makes_no_sense_is_named(name, value):
    assert f"--{name} {value}" in complaint(f"--{name}", str(value))


def test_channels_that_heads_do_not_share_evenly_are_named():
    assert "--n_embd 768 does not divide into --n_head 7" in complaint("--n_head", "7")


def test_missing_shards_are_named_with_the_commands_that_make_them():
    small = "--n_layer 1 --n_embd 64 --n_head 1 --block_size 16 --total_batch_size 64 --device cpu"
    line = complaint(*small.split(), "--data_dir", "nowhere")
    assert "no train shards in nowhere/" in line and "python fineweb.py" in line
