"""How far a prompt is from those of a calibration."""

from __future__ import annotations

import pytest

from lemica_trt.ir.prompts import PromptFacts, facts_from_prompts
from lemica_trt.ir.resources import calibration_path

pytestmark = pytest.mark.null

CAPTIONS = (
    "A red kite climbs in gusts above a windy beach.",
    "A white rabbit nibbles on a bright orange carrot.",
    "A glossy black car stands under a neon sign in the rain.",
)


def facts(prompts: tuple[str, ...]) -> PromptFacts:
    return facts_from_prompts(prompts, [len(prompt.split()) for prompt in prompts])


def distance(found: PromptFacts, prompt: str) -> str | None:
    return found.distance(prompt, len(prompt.split()))


def prompts_of(folder: str, name: str) -> list[str]:
    lines = (calibration_path(folder) / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("folder", ["video", "cogvideox-tiny"])
@pytest.mark.parametrize("used", [4, 9, 16])
def test_captions_of_the_same_kind_are_near(folder: str, used: int) -> None:
    """Held-out prompts of the bundled sets are of the kind that calibrations use."""
    held_out = prompts_of(folder, "held_out")
    found = facts(tuple(prompts_of(folder, "calibration")[:used]))
    far = [prompt for prompt in held_out if distance(found, prompt)]
    assert len(far) <= 0.05 * len(held_out), far


def test_a_long_prompt_is_far_from_captions() -> None:
    said = distance(facts(CAPTIONS), " ".join(["a red car in the rain above a beach"] * 20))
    assert said == "it has 180 tokens, those 9 … 12"


def test_a_few_words_are_far_from_captions() -> None:
    assert distance(facts(CAPTIONS), "a car") == "it has 2 tokens, those 9 … 12"


@pytest.mark.parametrize(
    "prompt",
    [
        "masterpiece, best quality, 8k, ultra detailed, 1girl, solo, cinematic",
        "Ein Drache fliegt heute über unser Haus",
    ],
)
def test_other_words_are_far(prompt: str) -> None:
    said = distance(facts(CAPTIONS), prompt)
    assert said is not None and said.endswith("words occur in those") and said.startswith("0 of its ")


def test_prompts_that_share_nothing_say_nothing_of_words() -> None:
    assert distance(facts(("one two", "three four", "huge dogs")), "another thing") is None


def test_characters_are_words_where_there_are_no_spaces() -> None:
    found = facts_from_prompts(("红色的风筝在海滩上", "白色的兔子在海滩上"), [9, 9])
    assert found.shared == pytest.approx(6 / 9)
    assert found.distance("黑色的车在海滩上", 8) is None
    assert found.distance("a glossy black car", 8) == "0 of its 4 words occur in those"


def test_one_prompt_says_its_length_only() -> None:
    found = facts(CAPTIONS[:1])
    assert (found.prompts, found.shared) == (1, 0.0)
    assert found.distance("Ein Drache", 10) is None
    assert found.distance("Ein Drache", 40) == "it has 40 tokens, those 10"


def test_prompts_are_not_kept() -> None:
    assert all(word < 1 << 16 for word in facts(CAPTIONS).words)


def test_checks() -> None:
    good = {"prompts": 1, "fewest": 1, "most": 2, "words": (1, 2), "shared": 0.5}
    assert PromptFacts(**good).most == 2  # type: ignore[arg-type]
    for bad in ({"prompts": 0}, {"fewest": 3}, {"words": (2, 1)}, {"shared": 1.5}, {"shared": float("nan")}):
        with pytest.raises(ValueError):
            PromptFacts(**{**good, **bad})  # type: ignore[arg-type]
