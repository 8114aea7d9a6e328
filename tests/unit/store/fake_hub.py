"""A small Hugging Face Hub on 127.0.0.1: model information, files, ranges, redirects, faults."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_INFO = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([^?/]+))?(?:\?.*)?")
_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")

# A commit this Hub answers for with another one.
WRONGLY_KNOWN = "c" * 40


@dataclass
class Repo:
    """One repository at one commit; files ending in safetensors or gguf are kept by LFS."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    card: dict[str, Any] = field(default_factory=lambda: {"license": "mit"})
    is_gated: bool = False

    def info(self, repo_id: str) -> dict[str, Any]:
        siblings = [_sibling(path, content) for path, content in self.files.items()]
        return {"id": repo_id, "sha": self.commit, "siblings": siblings, "cardData": self.card}


@dataclass
class Request:
    """One request as the server saw it, and how many bytes of a file it answered."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0


@dataclass
class FakeHub:
    """What the server holds, what it does wrong, and what it was asked.

    Attributes:
        cuts: path of a file -> after how many bytes to drop the connection, request by request.
        has_ranges: False for a server that always sends the whole file.
        altered: path of a file -> what is sent instead of its content.
        cdn: the address of another server, to which LFS files are redirected.
        answer: a body that is sent for anything, where it is not empty.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    has_ranges: bool = True
    altered: dict[str, bytes] = field(default_factory=dict)
    cdn: str = ""
    answer: bytes = b""
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def requests_of(self, name: str) -> list[Request]:
        """The requests for a file, by the end of its path."""
        return [request for request in self.requests if request.path.endswith(name)]


def git_blob_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf"))


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path, "size": len(content)}
    sibling["blobId"] = git_blob_sha1(content)
    if _is_lfs(path):
        sha256 = hashlib.sha256(content).hexdigest()
        sibling["blobId"] = git_blob_sha1(sha256.encode())
        sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return sibling


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        request = Request("GET", self.path, {key.lower(): v for key, v in self.headers.items()})
        self.hub.requests.append(request)
        if self.hub.answer:
            self._reply(200, self.hub.answer)
        elif match := _INFO.fullmatch(self.path):
            self._info(match[1], match[2])
        elif match := _FILE.fullmatch(self.path):
            self._file(request, *match.groups())
        else:
            self._reply(404, error="RepoNotFound")

    def _info(self, repo_id: str, revision: str | None) -> None:
        repo = self.hub.repos.get(repo_id)
        if repo is None:
            self._reply(404, error="RepoNotFound")
        elif revision not in (None, "main", "v1", WRONGLY_KNOWN, repo.commit):
            self._reply(404, error="RevisionNotFound")
        else:
            self._reply(200, json.dumps(repo.info(repo_id)).encode())

    def _file(self, request: Request, repo_id: str, commit: str, path: str) -> None:
        repo = self.hub.repos[repo_id]
        if repo.is_gated:
            self._reply(403, error="GatedRepo")
        elif repo.commit != commit or path not in repo.files:
            self._reply(404, error="EntryNotFound")
        elif self.hub.cdn and _is_lfs(path):
            self._reply(302, location=f"{self.hub.cdn}{self.path}")
        else:
            self._content(request, path, self.hub.altered.get(path, repo.files[path]))

    def _content(self, request: Request, path: str, content: bytes) -> None:
        first = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        start = int(first[1]) if first and self.hub.has_ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        cuts = self.hub.cuts.get(path)
        body = content[start:][: cuts.pop(0)] if cuts else content[start:]
        request.sent = len(body)
        self.wfile.write(body)

    def _reply(self, status: int, body: bytes = b"", error: str = "", location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Run the hub in a thread while the block lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
