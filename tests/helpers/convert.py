"""Helpers for tests of `moebox quantize`: hashes of folders, child processes to kill, a local hub."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from moebox.errors import MoeboxError
from moebox.quantize.convert import quantize
from moebox.quantize.synth.write import synth

SHARD_BYTES = 60_000


def make_source(folder: Path, format: str = "fp8", **options) -> Path:
    """A tiny checkpoint in several shards, with tokenizer and licence files and remote code beside it."""
    options = {"layers": 4, "experts": 12, "shard_bytes": 200_000} | options
    synth(folder, "tiny", format=format, **options)
    (folder / "tiktoken.model").write_bytes(b"AA== 0\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TikTokenTokenizer"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 163586}')
    (folder / "LICENSE").write_text("a licence")
    (folder / "README.md").write_text("not copied")
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('remote code')")
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` -> SHA-256."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights_map(folder: Path) -> dict[str, str]:
    """The index's tensor name -> file."""
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


_FORKS = multiprocessing.get_context("forkserver")  # imports torch once, not once per child
_FORKS.set_forkserver_preload(["moebox.quantize.convert"])


class Child:
    """A `quantize` in a process of its own."""

    def __init__(self, process, errors: Path) -> None:
        self._process, self._errors = process, errors
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 180) -> str:
        """Wait for its end; what it wrote to stderr."""
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError("the child did not end")
        text = self._errors.read_text()
        self._errors.unlink()
        return text


def start(src: Path | str, dst: Path, *, delay_s: float = 0.0, setup: str = "", **options) -> Child:
    """Start `quantize` in a child, after `setup`; every progress report takes `delay_s`."""
    descriptor, errors = tempfile.mkstemp(suffix=".stderr")
    os.close(descriptor)
    options = {"shard_bytes": SHARD_BYTES} | options
    process = _FORKS.Process(target=_child, args=(str(src), str(dst), delay_s, setup, errors, options))
    process.start()
    return Child(process, Path(errors))


def _child(src: str, dst: str, delay_s: float, setup: str, errors: str, options: dict) -> None:
    with Path(errors).open("w") as file:
        os.dup2(file.fileno(), 2)
        exec(setup, {})
        try:
            quantize(src, dst, progress=lambda _: time.sleep(delay_s), **options)
        except MoeboxError as error:
            sys.exit(f"{type(error).__name__}: {error}")


def kill_when(child: Child, condition: Callable[[], bool], timeout_s: float = 180) -> bool:
    """SIGKILL `child` as soon as `condition` holds; False if it ended by itself before."""
    deadline = time.monotonic() + timeout_s
    while child.poll() is None:
        if condition():
            child.send_signal(signal.SIGKILL)
            child.wait()
            return True
        if time.monotonic() > deadline:
            child.send_signal(signal.SIGKILL)
            raise TimeoutError("the condition was never met")
        time.sleep(0.001)
    child.wait()
    return False


class Hub:
    """A local server with the hub's API for one model; it can cut connections.

    Attributes:
        folder: what it serves; `sha` is its commit.
        requests: (method, path, Range header) of each request.
        drop_after: file name -> bytes after which the connection is cut, once per entry of the list.
        token: if set, requests must carry it.
        bytes_per_s: speed limit of file bodies.
    """

    def __init__(self, folder: Path, repo: str = "org/tiny") -> None:
        self.folder, self.repo, self.sha = folder, repo, "1" * 40
        self.requests: list[tuple[str, str, str | None]] = []
        self.drop_after: dict[str, list[int]] = {}
        self.token: str | None = None
        self.bytes_per_s: float | None = None
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def info(self) -> dict:
        siblings = []
        for path in sorted(self.folder.iterdir()):
            data = path.read_bytes()
            entry = {"rfilename": path.name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if path.suffix == ".safetensors":
                entry["lfs"] = {
                    "sha256": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 134,
                }
            siblings.append(entry)
        return {
            "id": self.repo,
            "modelId": self.repo,
            "sha": self.sha,
            "siblings": siblings,
            "tags": [],
            "private": False,
            "downloads": 0,
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server_hub, urlsplit(self.path).path
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith(f"/api/models/{hub.repo}"):
            return self._send(200, json.dumps(hub.info()).encode(), {"Content-Type": "application/json"})
        prefix = f"/{hub.repo}/resolve/"
        if path.startswith(prefix):
            revision, _, name = path.removeprefix(prefix).partition("/")
            file = hub.folder / name
            if revision in (hub.sha, "main") and file.is_file():
                return self._file(file, body)
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _file(self, file: Path, body: bool) -> None:
        hub, data = self.server_hub, file.read_bytes()
        etag = (
            hashlib.sha256(data).hexdigest()
            if file.suffix == ".safetensors"
            else hashlib.sha1(data).hexdigest()
        )
        headers = {"X-Repo-Commit": hub.sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        status, begin = 200, 0
        if self.headers.get("Range"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin, end = int(first), int(last) + 1 if last else len(data)
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
            status, data = 206, data[begin:end]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self._body(file.name, data)

    def _body(self, name: str, data: bytes) -> None:
        hub = self.server_hub
        faults = hub.drop_after.get(name, [])
        limit = faults.pop(0) if faults and len(data) > 100_000 else None
        for begin in range(0, len(data), 16384):
            if limit is not None and begin >= limit:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            try:
                self.wfile.write(data[begin : begin + 16384])
            except OSError:
                self.close_connection = True
                return
            if hub.bytes_per_s:
                time.sleep(16384 / hub.bytes_per_s)
