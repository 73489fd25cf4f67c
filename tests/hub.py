"""A stand-in of the hub's API on this machine: one repository, which is uploaded and read."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

REPOSITORY = "you/smaller"
COMMIT = "0" * 40


@contextmanager
def hub() -> Iterator[SimpleNamespace]:
    """Inside, it runs; gives the `environment` that sends huggingface_hub there, and the `files` of
    the repository, name -> bytes."""
    files: dict[str, bytes] = {}

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            if self.path.endswith("/repos/create"):
                self._answer({"url": f"{address}/{REPOSITORY}", "name": REPOSITORY})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                kinds = {"uploadMode": "regular", "shouldIgnore": False}
                self._answer({"files": [{"path": name, **kinds} for name in names]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        files[line["value"]["path"]] = content
                self._answer({"commitUrl": f"{address}/{REPOSITORY}/commit/1", "commitOid": COMMIT})
            else:  # /validate-yaml
                self._answer({"errors": [], "warnings": []})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = path.partition("/resolve/")[2].partition("/")[2]
            if path.startswith("/api/whoami"):
                self._answer({"type": "user", "name": "you", "orgs": []})
            elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                sizes = {name: len(content) for name, content in files.items()}
                self._answer(
                    [{"type": "file", "path": n, "size": s, "oid": "1"} for n, s in sizes.items()]
                )
            elif path.startswith(f"/api/models/{REPOSITORY}"):
                siblings = [{"rfilename": name} for name in files]
                self._answer({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings})
            elif name in files:
                self._send(200, files[name])
            else:
                self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def _answer(self, content: object) -> None:
            self._send(200, json.dumps(content).encode())

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_of_nobody", "HF_HUB_OFFLINE": "0"}
    try:
        yield SimpleNamespace(environment=environment, files=files)
    finally:
        server.shutdown()
        server.server_close()
