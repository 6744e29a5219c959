"""A stand-in for the Hugging Face hub: dataset repositories in a folder, served on loopback.

    with Hub(folder) as hub:     # folder/USER/NAME/... are the files of the repository USER/NAME
        subprocess.run(command, env=os.environ | hub.env(tmp_path))
        hub.requests             # what was asked: (method, path, range)

It answers what huggingface_hub asks to list, read and download a dataset's files. As the hub does,
it sends whoever wants a file's bytes on to another server: first /datasets/..., which only knows
of the file, then /cdn/..., which has the bytes.

`misbehave(number, method, path)` is asked before each answer, by one thread at a time, and says
what goes wrong with it; requests are numbered from 1, over all clients:

    None                           nothing
    503                            an error of that status
    (429, {"Retry-After": "1"})    the same, with headers
    "hang up"                      no answer
    "cut"                          half the body, then the connection is closed
    "reset"                        half the body, then it breaks, as when a network fails
    "stall"                        half the body, then silence until the hub is closed
"""

import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # the one commit of every repository
API = "/api/datasets/([^/]+/[^/]+)(?:/(?:revision|tree)/([^/]+)(?:/(.+))?)?"
RESOLVE = "/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"


class Hub:
    """Serves `folder` while the context lasts. The files of the repositories in `gated` are
    listed, but refused, whoever asks."""

    def __init__(
        self, folder: Path, misbehave: Callable = lambda *_: None, gated: Collection[str] = ()
    ):
        self.folder, self.misbehave, self.gated = folder, misbehave, gated
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock, self.closing = threading.Lock(), threading.Event()

    def __enter__(self):
        self.servers = [Server(("127.0.0.1", 0), Handler) for _ in ("hub", "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)
        for server in self.servers:
            server.hub = self
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def env(self, home: Path) -> dict[str, str]:
        """What the environment must say before huggingface_hub is imported."""
        env = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "no_proxy": "127.0.0.1"}
        env |= {"HF_TOKEN": "", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return env | {"HF_HUB_DISABLE_XET": "1"}  # a protocol of its own, which is not spoken here


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default, 5, turns a crowd of workers away

    def handle_error(self, request, client_address):
        """Silence: clients may leave when they like."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept, as the hub keeps them
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Silence: Hub.requests is the log."""

    def do_GET(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.requests.append((self.command, path, self.headers.get("Range")))
            self.fault = hub.misbehave(len(hub.requests), self.command, path)
        if self.fault == "hang up":
            self.close_connection = True
        elif isinstance(self.fault, int):
            self.refuse(self.fault, "the hub misbehaves")
        elif isinstance(self.fault, tuple):
            self.refuse(self.fault[0], "the hub misbehaves", **self.fault[1])
        elif match := re.fullmatch("/cdn/(.+)", path):
            self.send_file(hub.folder / match[1])
        elif match := re.fullmatch(RESOLVE, path) or re.fullmatch(API, path):
            self.send_known(*match.groups(""))
        else:
            self.refuse(404, "no such page")

    do_HEAD = do_GET

    def send_known(self, name, revision, path):
        """What the hub knows of a repository, or of a folder or a file in it."""
        repository, known = self.server.hub.folder / name, "Authorization" in self.headers
        file, api = repository / path, self.path.startswith("/api")
        if not repository.is_dir():
            # the hub does not tell strangers which repositories are missing, and which private
            code = {"X-Error-Code": "RepoNotFound"}
            self.refuse(404 if known else 401, "Repository not found", **code)
        elif revision not in ("", "main", COMMIT):
            self.refuse(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        elif api and "/tree/" not in self.path:
            gated = "auto" if name in self.server.hub.gated else False
            files = [{"rfilename": entry["path"]} for entry in entries(repository, "", True)]
            self.send_json({"id": name, "sha": COMMIT, "gated": gated, "siblings": files})
        elif not (file.is_dir() if api else file.is_file()):
            code = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self.refuse(404, "Entry not found", **code)
        elif api:
            recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
            self.send_json(entries(repository, path, recursive))
        elif name in self.server.hub.gated:
            code = {"X-Error-Code": "GatedRepo"}
            self.refuse(403 if known else 401, f"Access to dataset {name} is restricted.", **code)
        else:
            headers = {"Location": f"{self.server.hub.cdn}/cdn/{quote(f'{name}/{path}')}"}
            headers |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": etag(file)}
            self.send(302, b"Found.", headers | {"X-Repo-Commit": COMMIT})

    def send_file(self, file):
        """A file's bytes, or the asked range of them."""
        content, status = file.read_bytes(), 200
        headers = {"ETag": etag(file), "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, size = int(match[1]), len(content)
            content = content[first : int(match[2] or size) + 1]
            status = 206 if content else 416
            last = f"{first}-{first + len(content) - 1}" if content else "*"
            headers["Content-Range"] = f"bytes {last}/{size}"
        self.send(status, content, headers)

    def send_json(self, value):
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def refuse(self, status, message, **headers):
        body = json.dumps({"error": message}).encode()
        self.send(status, body, {"X-Error-Message": message} | headers)

    def send(self, status, body, headers):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault not in ("cut", "reset", "stall"):
            self.wfile.write(body)
            return
        self.close_connection = True
        self.wfile.write(body[: len(body) // 2])
        if self.fault == "stall":
            self.server.hub.closing.wait()
        elif self.fault == "reset":  # closed without lingering, a connection ends by a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())


def entries(repository: Path, path: str, recursive: bool) -> list[dict]:
    """The files and folders in a repository's folder, as the hub describes them."""
    folder, found = repository / path, []
    for file in sorted(folder.rglob("*") if recursive else folder.iterdir()):
        entry = {"type": "directory", "path": file.relative_to(repository).as_posix(), "size": 0}
        if file.is_file():
            entry |= {"type": "file", "size": file.stat().st_size}
        found.append(entry | {"oid": hashlib.sha1(entry["path"].encode()).hexdigest()})
    return found


def etag(file: Path) -> str:
    """The hub's name of a large file's content."""
    return f'"{hashlib.sha256(file.read_bytes()).hexdigest()}"'
