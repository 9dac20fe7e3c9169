"""Prompt → token ids, by the `tokenizers` library alone.

Equal to what transformers' fast tokenizers give with `padding="max_length", truncation=True`, on the right side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InputError
from lemica_trt.core.text import CLEANINGS
from lemica_trt.ir.graphs import PROMPT, EncoderSpec

MAX_PROMPT_BYTES = 8192
"""Longest prompt, UTF-8; far above every text length, so that tokenizing takes milliseconds."""

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
        raise InputError(f"{name} must be text of at most {MAX_PROMPT_BYTES} bytes; got {size} bytes")
    return prompt


class PromptTokenizer:
    """Turns prompts into ids. May be shared by threads.

    Args:
        spec: length, padding, cleaning.
        tokenizer: content of `tokenizer.json`.

    Raises:
        InputError: the content is not a tokenizer.
    """

    def __init__(self, spec: EncoderSpec, tokenizer: bytes) -> None:
        from tokenizers import Tokenizer

        self.spec = spec
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises Exception itself, and its panics are no Exceptions
            raise InputError(f"{spec.tokenizer}: expected a tokenizer.json, got: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(spec.length)  # leaves room for the end token that the tokenizer adds

    def ids(self, prompt: str) -> tuple[Ids, Ids]:
        """Ids and mask (1: a token, 0: padding), int64 [length] each.

        Raises:
            InputError: the prompt is not text, is longer than `MAX_PROMPT_BYTES`, or the tokenizer fails on it.
        """
        require_prompt(prompt)
        text = self.spec.template.replace(PROMPT, CLEANINGS[self.spec.clean](prompt))
        try:
            found = self._tokenizer.encode(text).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # as above
            raise InputError(f"{self.spec.tokenizer}: the tokenizer fails on this prompt: {error}") from None
        if self.spec.end_id is not None and len(found) == self.spec.length:
            found[-1] = self.spec.end_id
        ids = np.full(self.spec.length, self.spec.pad_id, np.int64)
        ids[: len(found)] = found
        return ids, (np.arange(self.spec.length) < len(found)).astype(np.int64)
