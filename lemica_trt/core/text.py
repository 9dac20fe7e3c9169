"""Text: prompts before any tokenizer sees them, and what may be shown on a terminal."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Literal

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, that end a line, or that reorder one."""


MAX_LINE = 300
"""Characters of another library's message that are shown."""


def basic_clean(text: str) -> str:
    """HTML unescaped twice, runs of white space made one space."""
    return " ".join(html.unescape(html.unescape(text)).split())


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most `MAX_LINE` of it, or its class: libraries raise pages."""
    return shortened((str(error).strip().splitlines() or [type(error).__name__])[0], MAX_LINE)


def shortened(text: str, most: int = 40) -> str:
    """At most so many characters of a text."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def lower_clean(text: str) -> str:
    """Lower case, without white space at the ends: `_text_preprocessing` of diffusers' PixArt without clean_caption."""
    return text.lower().strip()


def ftfy_clean(text: str) -> str:
    """`prompt_clean` of diffusers' Wan: damaged Unicode, curly quotes and wide letters mended by ftfy, then as `basic`.

    Raises:
        MissingDependencyError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        from lemica_trt.core.errors import MissingDependencyError  # which imports this module

        raise MissingDependencyError(f"prompts are cleaned with ftfy, got: {error}", fix="pip install ftfy") from None
    return basic_clean(ftfy.fix_text(text))


Cleaning = Literal["none", "basic", "lower", "ftfy"]

CLEANINGS: dict[Cleaning, Callable[[str], str]] = {
    "none": str,
    "basic": basic_clean,
    "lower": lower_clean,
    "ftfy": ftfy_clean,
}
"""How a prompt is cleaned before it is tokenised."""


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+")
"""A word: a run of letters and digits; of Chinese and Japanese, which has no spaces, a character."""


def words_of(text: str) -> set[str]:
    """The different words of a text, in lower case."""
    return set(_WORD.findall(text.casefold()))


def printable(text: str) -> str:
    """Text in one line that no terminal obeys: control characters are shown as Python writes them, `\\x1b`."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
