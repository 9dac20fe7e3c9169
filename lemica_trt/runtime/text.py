"""Prompt → token ids, by the `tokenizers` library alone.

Equal to what transformers' fast tokenizers give with `padding="max_length", truncation=True`, on the right side.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError
from lemica_trt.core.text import CLEANINGS
from lemica_trt.ir.graphs import PROMPT, EncoderSpec

MAX_PROMPT_BYTES = 8192
"""Longest prompt, UTF-8; far above every text length, so that tokenizing takes milliseconds."""

MAX_TOKENIZER_BYTES = 128 << 20
"""Largest `tokenizer.json`; UMT5's, with 256 000 pieces, has 17 MB."""

Ids = npt.NDArray[np.int64]


def require_prompt(prompt: object, name: str = "a prompt") -> str:
    """The prompt.

    Raises:
        InputError: it is not text, or longer than `MAX_PROMPT_BYTES`.
    """
    if not isinstance(prompt, str):
        raise InputError(f"{name} must be a string, got {type(prompt).__name__}")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{name} must be Unicode text, got: {error.reason}") from None
    if size > MAX_PROMPT_BYTES:
        raise InputError(f"{name} must be text of at most {MAX_PROMPT_BYTES} bytes; got {size} bytes", fix="shorten it")
    return prompt


def checked_tokenizer(data: bytes) -> str:
    """The content of a `tokenizer.json` without what would make the `tokenizers` library ask for gigabytes.

    A precompiled character map begins with the size of its trie, for which the library makes room before it looks at
    what is there. What it is given has no key twice, so that it reads what was checked.

    Raises:
        ValueError: too large, no JSON object, or a character map that is shorter than it says.
    """
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ValueError(f"{len(data)} bytes, more than {MAX_TOKENIZER_BYTES}")
    try:
        parts = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        normalizer = msgspec.json.decode(parts.get("normalizer", b"null"))
    except RecursionError:
        raise ValueError("values nested too deep") from None
    left = [normalizer]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            _require_charsmap(value.get("precompiled_charsmap") or "")
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return msgspec.json.encode({**parts, "normalizer": normalizer}).decode()


def _require_charsmap(charsmap: object) -> None:
    if not isinstance(charsmap, str):
        raise ValueError("expected a character map in base64")
    content = base64.b64decode(charsmap, validate=True)
    trie = int.from_bytes(content[:4], "little")
    if content and not (len(content) >= 4 and trie % 4 == 0 and trie <= len(content) - 4):
        raise ValueError(f"a character map of {len(content)} bytes that says {trie} are its trie")


class PromptTokenizer:
    """Turns prompts into ids. May be shared by threads.

    Args:
        spec: length, padding, cleaning.
        tokenizer: content of `tokenizer.json`.

    Raises:
        InputError: the content is not a tokenizer.
        MissingDependencyError: what cleans prompts is not installed.
    """

    def __init__(self, spec: EncoderSpec, tokenizer: bytes) -> None:
        from tokenizers import Tokenizer

        self.spec = spec
        self._clean = CLEANINGS[spec.clean]
        self._clean("")
        try:
            self._tokenizer = Tokenizer.from_str(checked_tokenizer(tokenizer))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises Exception itself, and its panics are no Exceptions
            raise InputError(f"{spec.tokenizer}: expected a tokenizer.json, got: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.length)  # leaves room for the end token that the tokenizer adds

    def ids(self, prompt: str) -> tuple[Ids, Ids]:
        """Ids and mask (0: padding, see `EncoderSpec.padded`), int64 [length] each.

        Raises:
            InputError: the prompt is not text, is longer than `MAX_PROMPT_BYTES`, or the tokenizer fails on it.
        """
        found = self._encoded(prompt).ids
        if self.spec.end_id is not None and len(found) == self.spec.length:
            found[-1] = self.spec.end_id
        ids, mask = self.spec.padded(found)
        return np.array(ids, np.int64), np.array(mask, np.int64)

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, whether it is cut or not; its template and special tokens are not counted.

        Raises:
            InputError: as `ids`.
        """
        return max(self._tokens(prompt) - self._tokens(""), 0)

    def cut(self, prompt: str) -> int:
        """Tokens of a prompt that do not fit into the encoder's length.

        Raises:
            InputError: as `ids`.
        """
        return max(self._tokens(prompt) - self.spec.length, 0)

    def _tokens(self, prompt: str) -> int:
        """Of the whole text, special ones among them."""
        found = self._encoded(prompt)
        beyond: list[int] = [part.special_tokens_mask.count(0) for part in found.overflowing]
        return len(found.ids) + sum(beyond)

    def _encoded(self, prompt: str) -> Any:
        require_prompt(prompt)
        text = self.spec.template.replace(PROMPT, self._clean(prompt))
        try:
            return self._tokenizer.encode(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises Exception itself, and its panics are no Exceptions
            raise InputError(f"{self.spec.tokenizer}: the tokenizer fails on this prompt: {error}") from None
