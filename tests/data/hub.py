"""A stand-in for the hub of Hugging Face, on loopback: as much of its interface as reading data sets takes."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_INFO = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?")
_PATHS = re.compile(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)")
_FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class StandInHub:
    """Data sets by name, each with its commits, of which ``heads`` says the newest.

    files: ``{name: {commit: {path: content}}}``. before: called with the path of each file, before it is sent. asked: method and
    address of all that was asked for.
    """

    def __init__(self, files: dict[str, dict[str, dict[str, bytes]]], heads: dict[str, str]) -> None:
        self.files, self.heads = files, heads
        self.before: Callable[[str], None] = lambda path: None
        self.asked: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            stand_in = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    def environment(self, home: Path) -> dict[str, str]:
        """The variables by which a process finds this hub and no other; home: where it keeps what it has asked for."""
        others = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        return others | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandInHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.stand_in.asked.append((self.command, path))
        answers: tuple[tuple[re.Pattern[str], Callable[..., None]], ...] = (
            (_FILE, self._file),
            (_TREE, self._tree),
            (_PATHS, self._paths),
            (_INFO, self._info),
        )
        for pattern, answer in answers:
            found = pattern.fullmatch(path)
            if found is None:
                continue
            name, revision, *rest = found.groups()
            commits = self.stand_in.files.get(name)
            if commits is None:
                return self._refuse(401, "RepoNotFound")
            commit = self.stand_in.heads[name] if revision in (None, "main") else revision
            if commit not in commits:
                return self._refuse(404, "RevisionNotFound")
            return answer(name, commit, commits[commit], *rest, body)
        return self._refuse(404, "EntryNotFound")

    def _info(self, name: str, commit: str, files: dict[str, bytes], body: bytes) -> None:
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings})

    def _tree(self, name: str, commit: str, files: dict[str, bytes], folder: str | None, body: bytes) -> None:
        inside = f"{folder}/" if folder else ""
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        found = [path for path in files if path.startswith(inside)]
        if not found:
            return self._refuse(404, "EntryNotFound")
        parents = {path[: at.start()] for path in found for at in re.finditer("/", path) if at.start() >= len(inside)}
        entries = [self._entry(files, path) for path in sorted({*found, *parents})]
        return self._json([each for each in entries if recursive or "/" not in each["path"][len(inside) :]])

    def _paths(self, name: str, commit: str, files: dict[str, bytes], body: bytes) -> None:
        wanted = parse_qs(body.decode())["paths"]
        folders = {path[: at.start()] for path in files for at in re.finditer("/", path)}
        self._json([self._entry(files, path) for path in wanted if path in files or path in folders])

    def _entry(self, files: dict[str, bytes], path: str) -> dict[str, Any]:
        kind = "file" if path in files else "directory"
        return {"type": kind, "path": path, "oid": f"{len(path):040x}", "size": len(files.get(path, b""))}

    def _file(self, name: str, commit: str, files: dict[str, bytes], path: str, body: bytes) -> None:
        if path not in files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        if self.command == "GET":
            self.stand_in.before(path)
        content, code, headers = files[path], 200, {}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            start, stop = int(part[1]), min(len(content), int(part[2] or len(content)) + 1)
            code, headers = 206, {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content = content[start:stop]
        headers |= {"X-Repo-Commit": commit, "ETag": f'"{commit}-{path}"', "Accept-Ranges": "bytes"}
        return self._send(code, content, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, code: int, why: str, headers: dict[str, str] | None = None) -> None:
        self._send(code, b"{}", {"X-Error-Code": why, "X-Error-Message": why, **(headers or {})})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
