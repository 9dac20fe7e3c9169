"""What ships with the package: build profiles, prompt sets, published schedules, the bundled models.

In a checkout these lie in the top-level folders `engines/` and `calibration/`; in an installed wheel below
`lemica_trt/data/`. Everybody asks here, so that nobody else knows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec

from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.ir.profile import Profile

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
    """Read a build profile by name, or by path of a TOML file.

    Raises:
        UsageError: no profile has that name.
        InputError: the file is not a valid profile; the message says where.
    """
    path = Path(name) if name.endswith(".toml") else _folder("engines") / f"{name}.toml"
    if not path.is_file():
        raise UsageError(
            f"expected a model profile ({', '.join(profile_names())}) or a .toml file, got {name!r}",
            fix="name one of these, or write a profile like engines/cogvideox.toml",
        )
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise InputError(f"{path.name}: expected a build profile of at most {MAX_PROFILE_BYTES} bytes")
        content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert({**content, "name": path.stem}, Profile, strict=True)
    except OSError as error:
        raise InputError(f"{path.name}: expected a readable build profile, got: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path.name}: expected a valid build profile, got: values nested too deep") from None
    except (ValueError, OverflowError) as error:  # TOML, UTF-8, integers of thousands of digits, values, invariants
        raise InputError(f"{path.name}: expected a valid build profile, got: {error}") from None


def absolute_source(source: str) -> str:
    """A source that means the same from every working directory: folders become absolute."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source
