"""A small Hugging Face hub on loopback: enough of its HTTP interface for datasets, with range requests."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """repos: {"org/name": {"file": bytes}}. The first download of `cut_file` breaks after `cut` bytes."""

    def __init__(self, repos: dict[str, dict[str, bytes]], cut_file: str = "", cut: int = 0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.cut_file, self.cut = repos, cut_file, cut
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, range)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = unquote(urlparse(self.path).path)
        wanted = self.headers.get("Range")
        self.server.requests.append((self.command, path, wanted))
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(/(revision|tree)/([^/]+))?.*", path):
            return self.describe(found[1], found[3], found[4])
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(found[1], found[3], wanted, body)
        if found := re.fullmatch(r"/plain/([^/]+/[^/]+)/(.+)", path):  # an ordinary web server
            return self.file(found[1], found[2], wanted, body)
        return self.reply(404, b"{}")

    def describe(self, repo: str, kind: str | None, revision: str | None) -> None:
        files = self.server.repos.get(repo)
        if files is None:
            return self.reply(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", "v1", COMMIT):
            return self.reply(404, b'{"error": "Invalid rev"}', {"X-Error-Code": "RevisionNotFound"})
        if kind == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return self.reply(200, json.dumps(entries).encode())
        siblings = [{"rfilename": name, "size": len(data), "blobId": "0"} for name, data in files.items()]
        info = {"_id": "1", "id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        return self.reply(200, json.dumps(info).encode())

    def file(self, repo: str, name: str, wanted: str | None, body: bool) -> None:
        data = self.server.repos.get(repo, {}).get(name)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        status, part = 200, data
        if wanted:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()
            stop = min(int(last) + 1 if last else len(data), len(data))
            status, part = 206, data[int(first) : stop]
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(data)}"
        if body and name == self.server.cut_file and self.server.cut:
            cut, self.server.cut = self.server.cut, 0
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(part))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(part[:cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return None
        return self.reply(status, part, headers, body)

    def reply(self, status: int, data: bytes, headers: dict | None = None, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(repos: dict[str, dict[str, bytes]], **options):
    server = Hub(repos, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
