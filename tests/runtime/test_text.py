"""Prompts → ids: transformers' numbers, without transformers."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from lemica_trt.core.errors import InputError, MissingDependencyError
from lemica_trt.core.text import basic_clean, ftfy_clean
from lemica_trt.ir.graphs import EncoderSpec
from lemica_trt.runtime.text import MAX_PROMPT_BYTES, PromptTokenizer, checked_tokenizer

pytestmark = pytest.mark.cpu

PROMPTS = [
    "",
    "a big red circle",
    "a  big\tred\n circle ",
    "A Big RED circle, moves-left!",
    "unknown wörds, 汉字 and 🙂",
    "red " * 40,
    "a small blue star moves up",
    "</s> a </s>",
]


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    """A word-level tokenizer that ends each prompt like T5's: with `</s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *["a", "big", "small", "red", "blue", "circle", "star", "moves", "left", "up"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return str(tokenizer.to_str()).encode()


@pytest.mark.parametrize("length", [1, 3, 8, 64])
def test_ids_are_those_of_transformers(tokenizer_json: bytes, length: int, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    ours = PromptTokenizer(EncoderSpec(tokenizer="tokenizer.json", length=length, pad_id=0, end_id=1), tokenizer_json)
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        ids, mask = ours.ids(prompt)
        assert ids.dtype == mask.dtype == np.int64
        assert ids.tolist() == expected["input_ids"][0].tolist(), prompt
        assert mask.tolist() == expected["attention_mask"][0].tolist(), prompt
        assert 1 in ids.tolist()


def test_the_shipped_tokenizer(tmp_path: Path) -> None:
    """`cogvideox-tiny`'s own tokenizer, as its pipeline loads it."""
    folder = Path(__file__).parents[2] / "lemica_trt" / "zoo" / "cogvideox-tiny" / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("the model is not here")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    spec = EncoderSpec(tokenizer="t", length=16, pad_id=theirs.pad_token_id, end_id=theirs.eos_token_id)
    ours = PromptTokenizer(spec, (folder / "tokenizer.json").read_bytes())
    for prompt in PROMPTS:
        expected = theirs(prompt, padding="max_length", max_length=16, truncation=True, add_special_tokens=True)
        assert ours.ids(prompt)[0].tolist() == expected["input_ids"], prompt


def test_end_token_of_a_cut_prompt_without_a_post_processor() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "red": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ours = PromptTokenizer(EncoderSpec(tokenizer="t", length=3, pad_id=0, end_id=1), str(tokenizer.to_str()).encode())
    assert ours.ids("red red red red")[0].tolist() == [3, 3, 1]


def test_basic_clean() -> None:
    assert basic_clean("  a&amp;amp;b\n\n c&lt;d&#39; ") == "a&b c<d'"


@pytest.mark.parametrize(
    "prompt", ["  a&amp;amp;b\n\n c ", "schÃ¶n", "ＲＥＤ\u3000cat", "\u201cquoted\u201d", "<b>x &amp; y</b>", "ﬁve", ""]
)
def test_wan_cleans_as_diffusers_does(prompt: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert ftfy_clean(prompt) == prompt_clean(prompt)


def test_a_cleaning_whose_library_is_missing_is_refused_at_load(
    tokenizer_json: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EncoderSpec(tokenizer="t", length=3, pad_id=0, clean="ftfy")
    PromptTokenizer(spec, tokenizer_json)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingDependencyError, match=r"prompts are cleaned with ftfy, got: .* → pip install ftfy"):
        PromptTokenizer(spec, tokenizer_json)
    PromptTokenizer(EncoderSpec(tokenizer="t", length=3, pad_id=0, clean="basic"), tokenizer_json)


@pytest.mark.parametrize("prompt", [None, 3, b"a", ["a"], "a\ud800"])
def test_prompts_that_are_no_text(tokenizer_json: bytes, prompt: object) -> None:
    ours = PromptTokenizer(EncoderSpec(tokenizer="t", length=3, pad_id=0), tokenizer_json)
    with pytest.raises(InputError, match="a prompt must be"):
        ours.ids(prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize(("template", "around"), [("{prompt}", 1), ("a big {prompt} moves", 4)])
def test_tokens_are_counted_behind_the_end_too(tokenizer_json: bytes, template: str, around: int) -> None:
    """As transformers counts them without truncation."""
    from transformers import PreTrainedTokenizerFast

    spec = EncoderSpec(tokenizer="t", length=8, pad_id=0, end_id=1, template=template)
    ours = PromptTokenizer(spec, tokenizer_json)
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours._tokenizer.from_str(tokenizer_json.decode()))
    for prompt in PROMPTS:
        expected = len(theirs(template.replace("{prompt}", prompt))["input_ids"])
        assert ours.count(prompt) == expected - around, prompt
        assert ours.cut(prompt) == max(expected - 8, 0), prompt


def test_a_broken_tokenizer() -> None:
    for data in (b"{}", b"\xff", b""):
        with pytest.raises(InputError, match=r"expected a tokenizer\.json"):
            PromptTokenizer(EncoderSpec(tokenizer="t", length=3, pad_id=0), data)


def test_prompts_that_are_too_long(tokenizer_json: bytes) -> None:
    """Refused before anything works on them, in process as on the server."""
    ours = PromptTokenizer(EncoderSpec(tokenizer="t", length=3, pad_id=0), tokenizer_json)
    assert ours.ids("é" * (MAX_PROMPT_BYTES // 2))[1].sum() > 0
    with pytest.raises(InputError, match=f"a prompt must be text of at most 8192 bytes; got {MAX_PROMPT_BYTES + 1} by"):
        ours.ids("é" * (MAX_PROMPT_BYTES // 2) + "x")
    with pytest.raises(InputError, match="got 50000000 bytes"):
        ours.ids("&" * 50_000_000)


FORGED = {
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAA"}},
    "regex": {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("part", FORGED)
def test_tokenizers_that_panic(tokenizer_json: bytes, part: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The library's panics are no `Exception`."""
    forged = json.dumps({**json.loads(tokenizer_json), **FORGED[part]}).encode()
    with pytest.raises(InputError, match=r"expected a tokenizer\.json|the tokenizer fails on this prompt"):
        PromptTokenizer(EncoderSpec(tokenizer="t", length=64, pad_id=0), forged).ids("a" * 34 + "!")


def _with_charsmap(tokenizer_json: bytes, trie: int, length: int, *, again: bool = False) -> bytes:
    charsmap = base64.b64encode(trie.to_bytes(4, "little") + bytes(length)).decode()
    precompiled = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    content = json.loads(tokenizer_json)
    harmless = content["normalizer"]
    content["normalizer"] = {"type": "Sequence", "normalizers": [precompiled]}
    data = json.dumps(content)
    if again:  # the library would read both, and keep the second one
        data = f'{data[:-1]}, "normalizer": {json.dumps(harmless)}}}'
    return data.encode()


def test_a_character_map_asks_for_no_more_room_than_it_has(tokenizer_json: bytes) -> None:
    spec = EncoderSpec(tokenizer="t", length=8, pad_id=0)
    for trie, length in ((0x64000000, 100_000), (8, 4), (6, 8)):
        with pytest.raises(InputError, match=rf"of {length + 4} bytes that says {trie} are its trie"):
            PromptTokenizer(spec, _with_charsmap(tokenizer_json, trie, length))


def test_the_library_reads_what_was_checked(tokenizer_json: bytes) -> None:
    """A key that stands there twice is handed on once."""
    checked = checked_tokenizer(_with_charsmap(tokenizer_json, 0x64000000, 8, again=True))
    assert checked.count('"normalizer"') == tokenizer_json.decode().count('"normalizer"')
    assert json.loads(checked) == json.loads(tokenizer_json)
    for data in (b"[" * 5000, b"[]", b"", b'{"normalizer": {"precompiled_charsmap": 5}}'):
        with pytest.raises(InputError, match=r"t: expected a tokenizer\.json, got: "):
            PromptTokenizer(EncoderSpec(tokenizer="t", length=8, pad_id=0), data)


def test_a_template_is_put_around_the_prompt(tokenizer_json: bytes) -> None:
    plain = EncoderSpec(tokenizer="t", length=8, pad_id=0, end_id=1)
    around = EncoderSpec(tokenizer="t", length=8, pad_id=0, end_id=1, template="a big {prompt} moves")
    ids, mask = PromptTokenizer(around, tokenizer_json).ids("red circle")
    expected, its = PromptTokenizer(plain, tokenizer_json).ids("a big red circle moves")
    assert (ids.tolist(), mask.tolist()) == (expected.tolist(), its.tolist())
    with pytest.raises(ValueError, match=r"must have \{prompt\} in it"):
        EncoderSpec(tokenizer="t", length=8, pad_id=0, template="a big moves")


def test_padding_stands_behind_a_text_or_in_front_of_it() -> None:
    """Up to a multiple it counts as tokens (CogView 4); to the whole length on the left it does not (LTX-2)."""
    spec = EncoderSpec(tokenizer="t", length=8, pad_id=9)
    assert spec.padded([1, 2, 3]) == ([1, 2, 3, 9, 9, 9, 9, 9], [1, 1, 1, 0, 0, 0, 0, 0])
    front = msgspec.structs.replace(spec, multiple=4)
    assert front.padded([1, 2, 3]) == ([9, 1, 2, 3, 9, 9, 9, 9], [1, 1, 1, 1, 0, 0, 0, 0])
    assert front.padded([1, 2, 3, 4]) == ([1, 2, 3, 4, 9, 9, 9, 9], [1, 1, 1, 1, 0, 0, 0, 0])
    left = msgspec.structs.replace(spec, left=True)
    assert left.padded([1, 2, 3]) == ([9, 9, 9, 9, 9, 1, 2, 3], [0, 0, 0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="length must be a multiple of 3"):
        msgspec.structs.replace(spec, multiple=3)
