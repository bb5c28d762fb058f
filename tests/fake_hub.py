"""A local server that answers like the Hugging Face hub, at the few addresses that the hub's client uses."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {"gated/data": (403, "GatedRepo"), "moved/data": (404, "RepoNotFound")}


class FakeHub:
    """Serves the files of a folder as the dataset repository "some/data" at one commit."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked, self.wrong_sha = root, [], False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlparse(request.path).path)
        self.asked.append((request.command, path))
        for repo, (status, code) in REFUSALS.items():
            if repo in path:
                return self.send(request, status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})
        place = path.partition("some/data/")[2]
        if path.startswith("/api/datasets/some/data/revision/") or path == "/api/datasets/some/data":
            if place not in ("", "revision/main", f"revision/{COMMIT}"):
                return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            body = {"id": "some/data", "sha": COMMIT, "siblings": [], "tags": [], "private": False, "downloads": 0}
            return self.send(request, 200, json.dumps(body).encode())
        if place.startswith(f"tree/{COMMIT}"):
            return self.send(request, 200, json.dumps([self.entry(p) for p in self.files()]).encode())
        if place.startswith("paths-info/"):
            return self.send(request, 200, json.dumps([self.entry(p) for p in self.files()]).encode())
        file = self.root / place.partition(f"resolve/{COMMIT}/")[2]
        if not file.is_file():
            return self.send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self.send_file(request, file)

    def files(self) -> list[Path]:
        return sorted(p for p in self.root.rglob("*") if p.is_file())

    def entry(self, path: Path) -> dict:
        digest = "0" * 64 if self.wrong_sha else hashlib.sha256(path.read_bytes()).hexdigest()
        size = path.stat().st_size
        lfs = {"oid": digest, "size": size, "pointerSize": 130}
        name = path.relative_to(self.root).as_posix()
        return {"type": "file", "path": name, "size": size, "oid": "a" * 40, "lfs": lfs}

    def send_file(self, request: BaseHTTPRequestHandler, file: Path) -> None:
        content, status, headers = file.read_bytes(), 200, {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        wanted = request.headers.get("Range")
        if wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            total, start, end = len(content), int(start), int(end or len(content) - 1)
            content, status = content[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(content) - 1}/{total}"
        self.send(request, status, content, headers)

    def send(self, request, status: int, content: bytes, headers: dict | None = None) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command == "GET" or request.command == "POST":
            request.wfile.write(content)
