"""What ships with the package: build profiles, prompt sets, published schedules, the bundled models.

In a checkout these lie in the top-level folders `engines/` and `calibration/`; in an installed wheel below
`lemica_trt/data/`. Everybody asks here, so that nobody else knows.
"""

from __future__ import annotations

import difflib
import functools
import sys
from pathlib import Path
from typing import Any

import msgspec

from lemica_trt.core.errors import InputError, UnsupportedError, UsageError
from lemica_trt.ir.profile import Card, Lora, NamedModel, Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_PROFILE_BYTES = 1 << 20

_PACKAGE = Path(__file__).resolve().parents[1]


def _folder(name: str) -> Path:
    installed = _PACKAGE / "data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def zoo_path(name: str) -> Path:
    """Folder of a model that ships with the package (`package:NAME`)."""
    return _PACKAGE / "zoo" / name


def calibration_path(name: str) -> Path:
    """Path of a prompt set, error graph or published list below `calibration/`; it need not exist."""
    return _folder("calibration") / name


def profile_names() -> list[str]:
    """Names that `load_profile` knows, sorted."""
    return sorted(path.stem for path in _folder("engines").glob("*.toml"))


def load_profile(name: str) -> Profile:
    """Read a build profile by name, by the hub id that it is for, or by path of a TOML file.

    Raises:
        UsageError: no profile has that name; the message has the nearest ones.
        InputError: the file is not a valid profile; the message says where.
    """
    return load_named(name).profile


def load_named(name: str) -> NamedModel:
    """As `load_profile`, with the card of the model; one of a user's own may have none."""
    known = profile_name(name)
    path = _folder("engines") / f"{known}.toml" if known is not None else Path(name)
    if path.suffix != ".toml" or not path.is_file():
        raise UsageError(
            f"expected the name of a model, a hub id, a diffusers folder or a .toml file, got {name!r}",
            fix=nearest(name),
        )
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise InputError(f"{path.name}: expected a build profile of at most {MAX_PROFILE_BYTES} bytes")
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        card = content.pop("card", {"pipeline": ""})
        profile = msgspec.convert({**content, "name": path.stem}, Profile, strict=True)
        return NamedModel(profile=profile, card=msgspec.convert(card, Card, strict=True))
    except OSError as error:
        raise InputError(f"{path.name}: expected a readable build profile, got: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path.name}: expected a valid build profile, got: values nested too deep") from None
    except (ValueError, OverflowError) as error:  # TOML, UTF-8, integers of thousands of digits, values, invariants
        raise InputError(
            f"{path.name}: expected a valid build profile, got: {error}", fix="see engines/cogvideox.toml"
        ) from None


def profile_name(model: str) -> str | None:
    """The profile that a name or a hub id stands for, in whatever case; None: there is none."""
    if model.endswith(".toml"):
        return None
    folded = model.casefold()
    for name in profile_names():
        if name.casefold() == folded:
            return name
    return _sources().get(folded)


def is_pipeline(model: str) -> bool:
    """Whether a user means a pipeline without a profile: a diffusers folder, or a hub id that no profile is for."""
    if Path(model, "model_index.json").is_file():
        return True
    return (
        profile_name(model) is None and not model.endswith(".toml") and (Path(model).is_dir() or model.count("/") == 1)
    )


@functools.cache
def _sources() -> dict[str, str]:
    """Hub id, in lower case → the profile that is for it."""
    found = {name: tomllib.loads((_folder("engines") / f"{name}.toml").read_text("utf-8")) for name in profile_names()}
    return {content["source"].casefold(): name for name, content in reversed(found.items()) if "source" in content}


def nearest(model: str) -> str:
    """What a user may have meant by a name that stands for nothing."""
    names, folded = profile_names(), model.casefold()
    words = {name.casefold(): name for name in names}
    words |= {source.partition("/")[2]: name for source, name in _sources().items()}
    near = difflib.get_close_matches(folded.rpartition("/")[2], words, n=3, cutoff=0.5)
    found = list(dict.fromkeys(words[word] for word in near))
    return (
        f"did you mean {' or '.join(found)}? lemica-trt models lists them" if found else "lemica-trt models lists them"
    )


def require_buildable(model: NamedModel) -> None:
    """Refuse, before any download, a model that is known not to build.

    Raises:
        UnsupportedError: says why.
    """
    card, profile = model.card, model.profile
    if card.refused:
        kind = f" ({card.pipeline})" if card.pipeline else ""
        raise UnsupportedError(
            f"{profile.name}{kind} cannot be built yet: {card.refused}", fix="lemica-trt models says what can"
        )


def absolute_source(source: str) -> str:
    """A source that means the same from every working directory: what is here becomes absolute. A link to a file keeps
    its name, which says what the file is."""
    path = Path(source)
    return str(path.resolve() if path.is_dir() else path.absolute()) if path.exists() else source


def lora_from_text(text: str, flag: str) -> Lora:
    """LoRA weights of FILE_OR_HUB_ID[:SCALE].

    Args:
        flag: where it was given, for messages.

    Raises:
        UsageError: the scale is no number.
        InputError: there is no such file, and it is no hub id.
    """
    source, colon, scale = text.rpartition(":")
    whole = not colon or Path(text).exists()
    try:
        lora = Lora(source=text) if whole else Lora(source=source, scale=float(scale))
    except ValueError:
        raise UsageError(
            f"{flag}: expected FILE_OR_HUB_ID[:SCALE] with a number as scale, got {text!r}",
            fix=f"for example {flag} style.safetensors:0.8",
        ) from None
    if not Path(lora.source).exists() and lora.on_hub is None:
        raise InputError(
            f"{flag}: expected a file of LoRA weights or a hub id, got {lora.source!r}, which is not there",
            fix="check the path, or give the id as the hub has it: OWNER/NAME or OWNER/NAME/FILE.safetensors",
        )
    return lora
