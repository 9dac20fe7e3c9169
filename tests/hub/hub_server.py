"""A hub on loopback: what `huggingface_hub` needs of its HTTP interface to commit, list and download small files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


class Repositories:
    """What the server holds.

    Attributes:
        files: repository → path → content.
        commits: messages, in order.
        broken: a path that is served with other bytes.
        refuse: status that everything is answered with; None: as it should.
        hidden: whether they are private, and the token may not read them: they are not found.
        meanwhile: what somebody else does before the next thing is written.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.broken: str | None = None
        self.refuse: int | None = None
        self.hidden = False
        self.meanwhile: Callable[[], None] | None = None
        self.url = ""

    def revision(self, name: str) -> str:
        """The newest commit, which changes with the content."""
        content = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in self.files[name].items())
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repositories: Repositories
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self) -> None:
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_POST(self) -> None:
        held, body = self.repositories, self.rfile.read(int(self.headers["Content-Length"]))
        if held.meanwhile is not None:
            held.meanwhile()
            held.meanwhile = None
        if held.refuse is not None:
            self.answer(held.refuse, {"error": "no"})
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            there = name in held.files
            held.files.setdefault(name, {})
            self.answer(409 if there else 200, {"url": f"{held.url}/{name}", "error": "exists"})
        elif self.path == "/api/validate-yaml":  # a card's metadata, which the client has cut out
            self.answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.path):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(200, {"files": files})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self.path):
            changed = dict(held.files[match[1]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    if value.get("parentCommit", held.revision(match[1])) != held.revision(match[1]):
                        return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
                    held.commits.append(value["summary"])
                elif line["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "deletedFile":
                    del changed[value["path"]]
            held.files[match[1]] = changed
            revision = held.revision(match[1])
            self.answer(
                200, {"success": True, "commitOid": revision, "commitUrl": f"{held.url}/{match[1]}/commit/{revision}"}
            )
        else:
            self.answer(500, {"error": f"no POST {self.path}"})

    def do_GET(self) -> None:
        held, path = self.repositories, unquote(self.path.partition("?")[0])
        if held.refuse is not None:
            self.answer(held.refuse, {"error": "no"})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/.*)?", path):
            if held.hidden or match[1] not in held.files:
                return self.missing()
            files = held.files[match[1]]
            if (match[2] or "").startswith("/tree"):
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return self.answer(200, listed)
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            self.answer(200, {"id": match[1], "sha": held.revision(match[1]), "siblings": siblings, "private": False,
                              "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = held.files.get(match[1], {}).get(match[2])
            if content is None:
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha1(content).hexdigest()
            if match[2] == held.broken:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": held.revision(match[1])})
        else:
            self.answer(500, {"error": f"no GET {path}"})

    do_HEAD = do_GET


@contextmanager
def serving() -> Iterator[Repositories]:
    """A running hub."""
    held = Repositories()
    handler = type("Handler", (_Handler,), {"repositories": held})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        held.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield held
        finally:
            server.shutdown()
            thread.join()
