"""hub.py: what huggingface_hub itself makes of the stand-in, in a process of its own, since it
reads its settings when imported."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hub import COMMIT, Hub

FILE = "sample/10BT/000_00000.parquet"
DOWNLOAD = f"hf_hub_download('user/texts', '{FILE}', repo_type='dataset', local_dir='out')"
READ = f"read_group('datasets/user/texts/{FILE}', 1)"
# The value of each argument, or how it failed; without the pauses between the client's tries.
CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
from pyarrow.parquet import ParquetFile

fs = HfFileSystem()

def read_group(path, group):
    with fs.open(path, "rb", cache_type="none") as file:
        return ParquetFile(file).read_row_group(group, columns=["text"])["text"].to_pylist()

def value(expression):
    try:
        return eval(expression)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        return f"{type(error).__name__} {status}".strip()

print(json.dumps([value(expression) for expression in sys.argv[1:]]))
"""


@pytest.fixture
def folder(tmp_path):
    """One repository, with a parquet file of two row groups, of which the text is a small part."""
    file = tmp_path / "hub/user/texts" / FILE
    file.parent.mkdir(parents=True)
    columns = {"url": [os.urandom(50_000).hex() for _ in range(4)], "text": list("abcd")}
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    (tmp_path / "hub/user/texts/README.md").write_text("Texts")
    return tmp_path / "hub"


def start(hub, *expressions, **env):
    env = os.environ | hub.env(hub.folder.parent / "home") | env
    env |= {"HF_HUB_VERBOSITY": "error", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    command = [sys.executable, "-c", CLIENT, *expressions]
    return subprocess.Popen(command, cwd=hub.folder.parent, env=env, stdout=subprocess.PIPE)


def values(client):
    return json.loads(client.communicate(timeout=60)[0])


def test_lists(folder):
    path, size = f"datasets/user/texts/{FILE}", (folder / "user/texts" / FILE).stat().st_size
    tree = "HfApi().list_repo_tree('user/texts', repo_type='dataset', recursive=True)"
    expected = {
        "list(fs.glob('datasets/user/texts/*/10BT/*.parquet', detail=True))": [path],
        f"fs.info('{path}')['size']": size,
        "fs.glob('datasets/user/texts/other/*.parquet')": [],
        "[entry['type'] for entry in fs.ls('datasets/user/texts')]": ["file", "directory"],
        "fs.find('datasets/user/texts')": ["datasets/user/texts/README.md", path],
        f"len(fs.find('datasets/user/texts@{COMMIT}'))": 2,
        "fs.find('datasets/user/texts@other')": "FileNotFoundError",
        "HfApi().dataset_info('user/texts').sha": COMMIT,
        f"[e.path for e in {tree}]": ["README.md", "sample", "sample/10BT", FILE],
    }
    with Hub(folder) as hub:
        assert dict(zip(expected, values(start(hub, *expected)), strict=True)) == expected


def test_one_column_of_one_row_group(folder):
    """The end of the file, then nothing but that column: what was not asked for is not sent."""
    with Hub(folder) as hub:
        assert values(start(hub, READ)) == [["c", "d"]]
        asked = [wanted[6:].split("-") for _, path, wanted in hub.requests if "/cdn/" in path]
        sizes = [int(last) - int(first) + 1 for first, last in asked]
        assert sizes[0] == 65536 and len(sizes) == 2 and sizes[1] < 200


def test_download(folder, tmp_path):
    """A cut is noticed and made up for; of a file that is there, only the name is asked."""
    with Hub(folder, lambda number, *_: "cut" if number == 2 else None) as hub:
        assert values(start(hub, DOWNLOAD, DOWNLOAD)) == [str(tmp_path / "out" / FILE)] * 2
        assert (tmp_path / "out" / FILE).read_bytes() == (folder / "user/texts" / FILE).read_bytes()
        assert [method for method, _, _ in hub.requests] == ["HEAD", "GET", "GET", "HEAD"]


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (429, "HfHubHTTPError 429"),
        ((429, {"Retry-After": "1"}), "HfHubHTTPError 429"),
        ((429, {"RateLimit": '"resolvers";r=0;t=9'}), "HfHubHTTPError 429"),
        (500, "HfHubHTTPError 500"),
        (503, "HfHubHTTPError 503"),
        ("hang up", "RemoteProtocolError"),
        ("cut", "RemoteProtocolError"),
        ("reset", "ReadError"),
        ("stall", "ReadTimeout"),
    ],
)
def test_faults(folder, fault, error):
    """The client tries a read six times of itself, then tells; later the hub is well again."""
    faults = iter([fault] * 6)
    with Hub(folder, lambda *request: next(faults, None) if "/cdn/" in request[2] else None) as hub:
        assert values(start(hub, READ, READ)) == [error, ["c", "d"]]
        assert sum("/cdn/" in path for _, path, _ in hub.requests) == 6 + 2


def test_refusals(folder):
    other_file = [READ.replace("000_", "001_"), DOWNLOAD.replace("000_", "001_")]
    other_name = [READ.replace("texts", "other"), DOWNLOAD.replace("texts", "other")]
    with Hub(folder, gated=["user/texts"]) as hub:
        stranger = values(start(hub, READ, DOWNLOAD, *other_file, *other_name))
        known = values(start(hub, READ, DOWNLOAD, *other_file, *other_name, HF_TOKEN="hf_x"))
    none = ["FileNotFoundError", "RemoteEntryNotFoundError 404", "FileNotFoundError"]
    assert stranger == ["GatedRepoError 401"] * 2 + none + ["RepositoryNotFoundError 401"]
    assert known == ["GatedRepoError 403"] * 2 + none + ["RepositoryNotFoundError 404"]


def test_several_clients(folder):
    """Every fifth answer an error, and all have what they asked for."""

    def misbehave(number, method, path):  # the api: the client has no second try for all of it
        return 503 if number % 5 == 0 and not path.startswith("/api/") else None

    with Hub(folder, misbehave) as hub:
        clients = [start(hub, *[READ] * 5) for _ in range(3)]
        assert [values(client) for client in clients] == [[["c", "d"]] * 5] * 3
