"""Lines of prompt files; and what a bundle keeps of them: enough to tell that a request is far from them, no prompts.

A plan is fitted to runs of a few prompts. It serves others as far as they are alike, and two things show without
running anything that one is not: its length, and its words. How many words alike prompts share depends on what they
are about; so the measure is what the calibration prompts have in common with each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from lemica_trt.core.errors import InputError
from lemica_trt.core.text import words_of
from lemica_trt.core.values import Value, require, require_finite

FAR_LENGTH = 2.0
"""A prompt is far from others that are all this many times longer, or shorter."""

FAR_WORDS = 0.5
"""It is far from others with which it shares less than this part of what each of them shares with the rest."""

HASH_BYTES = 2
"""Of a word: enough to tell whether it was there (a few hundred of 65 536 are), too few to tell which word it is."""


class Prompt(NamedTuple):
    """A line of a prompt file, `text`, or `text<TAB>image<TAB>digest` where a picture belongs to it, and twice so where
    a last one does.

    Attributes:
        text: the prompt.
        image: path of the picture; None: it has none of its own.
        digest: SHA-256 (hex) of the picture's file when the line was read.
        last_image, last_digest: the same of a last picture beside it.
    """

    text: str
    image: str | None = None
    digest: str | None = None
    last_image: str | None = None
    last_digest: str | None = None

    @property
    def line(self) -> str:
        """The line; what calibration and verification hand on as a prompt."""
        return "\t".join(part for part in self if part is not None)

    @property
    def content(self) -> str:
        """The line with digests of pictures alone, wherever they lie."""
        return self._replace(image=None, last_image=None).line

    @property
    def pictures(self) -> dict[str, tuple[str, str | None]]:
        """Those that it has of its own, as `ir.graphs.Source` names them: path and digest."""
        found = {"image": (self.image, self.digest), "last_image": (self.last_image, self.last_digest)}
        return {name: (path, digest) for name, (path, digest) in found.items() if path is not None}


def prompt_from_line(line: str) -> Prompt:
    """What `Prompt.line` was made of."""
    text, *pictures = line.split("\t")
    return Prompt(text, *pictures) if len(pictures) in (2, 4) else Prompt(line)


def require_taken(prompt: Prompt, sources: Collection[str], *, what: str = "the pipeline") -> None:
    """Raise InputError where a prompt brings a picture that is not among those that are taken (`ir.graphs.Source`)."""
    for name in prompt.pictures:
        if name not in sources:
            raise InputError(
                f"{what} takes no {name.replace('_', ' ')}, the prompt {prompt.text!r} brings one", fix="leave it out"
            )


class PromptFacts(Value, frozen=True):
    """Length and words of some prompts.

    Attributes:
        prompts: how many different ones.
        fewest, most: tokens of the shortest and of the longest one, without template and special tokens.
        words: hashes of all their words, sorted.
        shared: part of a prompt's words that occur in the others, of the prompt where it is least; 0 of a single one.
    """

    prompts: int
    fewest: int
    most: int
    words: tuple[int, ...]
    shared: float

    def __post_init__(self) -> None:
        require(self.prompts >= 1, f"prompts must be at least 1, got {self.prompts}")
        require(0 <= self.fewest <= self.most, f"expected 0 ≤ fewest ≤ most, got {self.fewest}, {self.most}")
        require(list(self.words) == sorted(set(self.words)), "words must be sorted hashes")
        require_finite((self.shared,), "shared")
        require(0 <= self.shared <= 1, f"shared must be 0 … 1, got {self.shared}")

    def distance(self, prompt: str, tokens: int) -> str | None:
        """Why a prompt is far from these, in a few words; None: it is not.

        Args:
            tokens: of the prompt, counted alike.
        """
        found, hashes = [], _hashes(prompt)
        if tokens * FAR_LENGTH < self.fewest or tokens > FAR_LENGTH * self.most:
            lengths = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} … {self.most}"
            found.append(f"it has {tokens} tokens, those {lengths}")
        known = len(hashes & set(self.words))
        if known < FAR_WORDS * self.shared * len(hashes):
            found.append(f"{known} of its {len(hashes)} words occur in those")
        return ", and ".join(found) or None


def facts_from_prompts(prompts: Iterable[str], tokens: Sequence[int]) -> PromptFacts:
    """What is kept of some different prompts.

    Args:
        prompts: at least one.
        tokens: of each.
    """
    each = [_hashes(prompt) for prompt in prompts]
    shares = [len(words & set().union(*each[:k], *each[k + 1 :])) / len(words) for k, words in enumerate(each) if words]
    return PromptFacts(
        prompts=len(each),
        fewest=min(tokens),
        most=max(tokens),
        words=tuple(sorted(set().union(*each))),
        shared=min(shares, default=0.0),
    )


def _hashes(text: str) -> set[int]:
    """Of the words of a text."""
    digests = (hashlib.sha256(word.encode("utf-8", "replace")).digest() for word in words_of(text))
    return {int.from_bytes(digest[:HASH_BYTES], "big") for digest in digests}
