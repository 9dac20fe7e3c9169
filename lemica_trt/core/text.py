"""What is done to a prompt before any tokenizer sees it, when a bundle is built and when it runs."""

from __future__ import annotations

import html


def basic_clean(text: str) -> str:
    """HTML unescaped twice, runs of white space made one space: `prompt_clean` of diffusers' Wan, less ftfy."""
    return " ".join(html.unescape(html.unescape(text)).split())
