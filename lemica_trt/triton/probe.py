#!/usr/bin/env python3
"""Ask the server of this repository for something real: exit code 0 if it answers, 1 and a line if it does not.

For readiness probes of Kubernetes: a server whose models' processes have died still says that it is ready. Written by
`lemica-trt triton`; needs nothing but Python. Where requests need images, those of this one are a single grey pixel.

    probe.py [--clip] [--timeout SECONDS] [--url URL]

Without --clip: encoders and the first full step of the denoiser; the request ends when nobody reads on, at the
latest by its time-out. The VAE decoder is not asked. With it: a whole clip.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request

MODEL = "pipeline_stream"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
"""A PNG of one pixel, in base64."""

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks the server itself, whatever proxy the environment names."""


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Ask the server for something real.")
    parser.add_argument("--clip", action="store_true", help="a whole clip, not only the first step")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds to wait (10)")
    parser.add_argument("--url", default=f"http://127.0.0.1:{os.environ.get('HTTP_PORT', '8000')}")
    given = parser.parse_args()
    try:
        found = first_answer(given.url, given.clip, given.timeout)
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(f"probe: {given.url}: {error}", file=sys.stderr)
        return 1
    if "error" in found:
        print(f"probe: {MODEL}: {found['error']}", file=sys.stderr)
        return 1
    return 0


def first_answer(url: str, clip: bool, timeout: float) -> dict[str, object]:
    """The first event of the stream that says something; of a clip, the one that has it.

    Raises:
        OSError, HTTPException, ValueError: no answer in time, or none that is JSON.
    """
    body: dict[str, object] = {"prompt": "", "timeout": max(1, round(timeout * 1e6))}
    try:
        with OPENER.open(f"{url}/v2/models/{MODEL}", timeout=timeout) as answer:
            names = {port["name"] for port in json.load(answer)["inputs"]}
            body |= dict.fromkeys(names & {"image", "last_image"}, PIXEL)
        request = urllib.request.Request(f"{url}/v2/models/{MODEL}/generate_stream", json.dumps(body).encode())
        with OPENER.open(request, timeout=timeout) as answer:
            for line in answer:
                event = json.loads(line[len(b"data:") :]) if line.startswith(b"data:") else {}
                if "error" in event or ("frames" if clip else "step") in event:
                    return dict(event)
    except urllib.error.HTTPError as error:
        with error:
            return {"error": error.read().decode(errors="replace").strip() or error.reason}
    except TimeoutError:
        raise TimeoutError(f"no answer in {timeout:g} s") from None
    return {"error": "the stream ended without an answer"}


if __name__ == "__main__":
    sys.exit(main())
