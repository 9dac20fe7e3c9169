"""`probe.py` of a repository, on a server of a few lines."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image

from lemica_trt.triton import probe

pytestmark = pytest.mark.null


class Stream(BaseHTTPRequestHandler):
    """Answers with one step."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"inputs": [{"name": "prompt"}, {"name": "image"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with Image.open(io.BytesIO(base64.b64decode(body["image"]))) as image:
            image.load()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"step": [1]}\n\n')

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_the_probe_does_not_ask_a_proxy() -> None:
    with HTTPServer(("127.0.0.1", 0), Stream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            done = subprocess.run(
                [sys.executable, probe.__file__, "--timeout", "60", "--url", f"http://127.0.0.1:{server.server_port}"],
                env={**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": ""},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            server.shutdown()
            thread.join()
    assert done.returncode == 0, done.stderr
