"""Tokenizes documents and counts their tokens. Every document begins
with end-of-text.

    python fineweb.py                        # FineWeb-Edu sample-10BT
    python fineweb.py FILES                  # .parquet and .txt files
"""

import functools
import sys
from pathlib import Path

import numpy as np
import tiktoken

BATCH = 128  # documents that are tokenized at a time
EDU = "hf://datasets/HuggingFaceFW/fineweb-edu/sample/"


def read_rows(path: str):
    """Yields the rows of a file as dictionaries; a text file is one row."""
    import pyarrow.parquet

    if path.endswith(".parquet"):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(BATCH, columns=["text"]):
            yield from batch.to_pylist()
    else:
        yield {"text": Path(path).read_text(encoding="utf-8")}


def read_files(files: list[str]):
    """Yields {"text": text or None} for each document of the files."""
    for path in files:
        yield from read_rows(path)


def load_documents(files: list[str], source: str):
    """Returns a datasets.IterableDataset with one column, of local files or a source on the web."""
    import datasets

    if files:
        return datasets.IterableDataset.from_generator(read_files, gen_kwargs={"files": files})
    arguments = {"data_files": source, "columns": ["text"]}  # no other column is downloaded
    return datasets.load_dataset("parquet", split="train", streaming=True, **arguments)


@functools.cache
def get_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding "gpt2" (50,257 tokens) or "bytes" (256 byte values and end-of-text)."""
    if name == "bytes":
        ranks = {bytes([value]): value for value in range(256)}
        return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": 256})  # longer ones are slow (quadratic)  # fmt: skip
    return tiktoken.get_encoding(name)


def tokenize(texts: list[str | None], encoding: str) -> np.ndarray:
    """Returns the tokens of all texts, (n,) uint16."""
    enc = get_encoding(encoding)
    arrays = [np.empty(0, dtype=np.uint16)]  # 50,257 tokens < 2**16
    for text in filter(None, texts):  # "<|endoftext|>" in a text is ordinary text
        arrays.append([enc.eot_token])
        arrays.append(enc.encode_to_numpy(text, disallowed_special=()))
    return np.concatenate(arrays, dtype=np.uint16, casting="unsafe")


def main(files: list[str]) -> None:
    """Prints the number of documents, and of their tokens in both encodings."""
    n_documents, n_tokens = 0, {"gpt2": 0, "bytes": 0}
    for batch in load_documents(files, EDU + "10BT/*.parquet").iter(BATCH):
        n_documents += len(batch["text"])
        for encoding in n_tokens:
            n_tokens[encoding] += len(tokenize(batch["text"], encoding))
    counts = [f"{n:,} tokens with {encoding}" for encoding, n in n_tokens.items()]
    print(f"{n_documents:,} documents", *counts, sep=", ")


if __name__ == "__main__":
    main(sys.argv[1:])
