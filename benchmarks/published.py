"""Pipelines at their true size, as the published configurations in `published.json` describe them, without weights.

Nothing is downloaded. Tokenizers are the tiny ones of `lemica_trt.testing`: their ids are within the vocabularies.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import transformers

from lemica_trt.testing.pipelines.parts import chat_tokenizer, clip_tokenizer, tokenizer

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_bytes())
"""Profile → pipeline class, and class and configuration of each part; `like`: those of another pipeline."""

TOKENIZERS = {
    "CLIP": clip_tokenizer,
    "T5": tokenizer,
    "Llama": lambda: tokenizer(length=8192, ends="<s> $A"),
    "Qwen2": chat_tokenizer,
}


def part_of(name: str, part: str) -> dict[str, Any]:
    """Class and configuration of a part of a pipeline."""
    found: dict[str, Any] = PUBLISHED[name][part]
    return part_of(found["like"], found.get("part", part)) if "like" in found else found


def write_folder(name: str, folder: Path) -> Path:
    """A folder in the layout of diffusers, with configurations and tokenizers and no weights.

    Args:
        name: of a profile in `PUBLISHED`.
    """
    pipeline = PUBLISHED[name]["pipeline"]
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    names, _ = (kind := getattr(diffusers, pipeline))._get_signature_keys(kind)
    for part in sorted(set(PUBLISHED[name]) - {"pipeline"}):
        found, where = part_of(name, part), folder / part
        where.mkdir(parents=True, exist_ok=True)
        if part.startswith("tokenizer"):
            made = TOKENIZERS[found["kind"]]()
            made.save_pretrained(where)
            index[part] = ["transformers", type(made).__name__]
        elif hasattr(diffusers, found["kind"]):
            index[part] = ["diffusers", found["kind"]]
            scheduler = part == "scheduler"
            config = {"_class_name": found["kind"], "_diffusers_version": diffusers.__version__, **found["config"]}
            file = "scheduler_config.json" if scheduler else "config.json"
            (where / file).write_text(json.dumps(config, indent=2))
        else:
            index[part] = ["transformers", found["kind"]]
            config = getattr(transformers, found["kind"]).config_class(**found["config"])
            config.architectures = [found["kind"]]
            config.save_pretrained(where)
    index |= {part: [None, None] for part in names if part not in index}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder
