"""Where bundles and plans are kept: a repository of the hub, or a folder that is laid out like one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lemica_trt.bundle.manifest import MANIFEST, MANIFEST_DIGEST, require_relative
from lemica_trt.bundle.reading import files_below
from lemica_trt.core.atomic_folder import replacing, sync_folder
from lemica_trt.core.errors import InputError, MissingDependencyError, UsageError, install_command
from lemica_trt.core.values import write_bytes

CARD = "README.md"
"""The card of a repository."""

Contents = Mapping[str, Path | bytes]
"""Path in the repository → a file, or its content."""


class Place(Protocol):
    """A repository."""

    @property
    def name(self) -> str:
        """What its card says to pull: no path of a machine."""

    def files(self) -> frozenset[str]:
        """Paths of its files; none where it does not exist yet.

        Raises:
            LemicaError: it cannot be read.
        """

    def folder(self, paths: Collection[str]) -> Path:
        """A local folder in which these files lie; other files may, too.

        Raises:
            LemicaError: they cannot be read.
        """

    def write(self, contents: Contents, remove: Collection[str], message: str) -> str:
        """Add, replace and remove files, all of them or none; where they are now, for people.

        Raises:
            LemicaError: it cannot be written.
        """


def place_from(text: str, *, private: bool = False) -> Place:
    """The repository of a name: `OWNER/NAME` or `OWNER/NAME@REVISION` on the hub; `file:FOLDER`, or a path that exists
    or begins with `/`, `./`, `../` or `~`.

    Args:
        private: whether a repository that is made is for its owner alone.

    Raises:
        UsageError: it is none of them.
    """
    if text.startswith("file:"):
        return Folder(Path(text.removeprefix("file:").removeprefix("//") or ".").expanduser())
    if text.startswith(("/", "./", "../", "~")) or text in (".", "..") or (text and Path(text).is_dir()):
        return Folder(Path(text).expanduser())
    name = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text, re.ASCII)
    if name is None:
        raise UsageError(
            f"expected a repository of the hub, OWNER/NAME, or a folder, got {text!r}",
            fix="write a folder that does not exist yet as ./FOLDER or file:FOLDER",
        )
    return Hub(name[1], name[2], private=private)


class Folder:
    """A folder that is laid out like a repository.

    Args:
        path: need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = "file:FOLDER"

    def files(self) -> frozenset[str]:
        """See `Place`."""
        return frozenset(files_below(self.path)) if self.path.is_dir() else frozenset()

    def folder(self, paths: Collection[str]) -> Path:
        """See `Place`."""
        for path in paths:
            if not (self.path / path).is_file():
                raise InputError(f"{self.path}: expected {path}, it is missing", fix="push it again")
        return self.path

    def write(self, contents: Contents, remove: Collection[str], message: str) -> str:
        """See `Place`. The folder is replaced by a new one in one step; files that stay are copied."""

        def require_ours(folder: Path) -> None:
            ours = folder.is_dir() and (not any(folder.iterdir()) or (folder / CARD).is_file())
            if folder.exists() and (not ours or (folder / ".git").exists()):
                raise UsageError(
                    f"{self.path}: expected a folder that 'lemica-trt push' wrote, an empty one or nothing",
                    fix="give another folder",
                )

        with replacing(self.path, require_ours) as (folder, staged):
            for path in self.files() - set(contents) - set(remove):
                _copy(folder / path, staged / path)
            for path, content in contents.items():
                require_relative(path)
                if isinstance(content, bytes):
                    write_bytes(content, staged / path)
                else:
                    _copy(content, staged / path)
        return str(self.path)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    sync_folder(target.parent)


class Hub:
    """A model repository of the hub; tokens, caches and addresses are those of `huggingface_hub`.

    Args:
        name: `OWNER/NAME`.
        revision: a branch, tag or commit; None: `main`.
        private: see `place_from`.
        endpoint: address of the hub; None: as `huggingface_hub` is configured.
    """

    def __init__(
        self, name: str, revision: str | None = None, *, private: bool = False, endpoint: str | None = None
    ) -> None:
        self.name, self._revision, self._private, self._endpoint = name, revision, private, endpoint
        self._seen: str | None = None  # the commit that `files` found
        self._is_new = False  # whether it found no repository

    def files(self) -> frozenset[str]:
        """See `Place`. What `write` does is on top of the commit that was found."""
        hub = _huggingface_hub()
        api = hub.HfApi(endpoint=self._endpoint)
        with self._failures():
            try:
                commit = api.repo_info(self.name, revision=self._revision).sha
                found = api.list_repo_files(self.name, revision=commit)
            except hub.errors.RepositoryNotFoundError:
                self._seen, self._is_new = None, True
                return frozenset()
            self._seen, self._is_new = commit, False
            return frozenset(found)

    def folder(self, paths: Collection[str]) -> Path:
        """See `Place`. In the cache of `huggingface_hub`: what a killed download left is used."""
        hub = _huggingface_hub()
        with self._failures():
            found = hub.snapshot_download(
                self.name,
                revision=self._revision,
                allow_patterns=sorted(map(_literal, paths)),
                endpoint=self._endpoint,
            )
        for path in paths:
            if not (Path(found) / path).is_file():
                raise InputError(f"{self.name}: expected {path}, it is missing", fix="push it again")
        return Path(found)

    def write(self, contents: Contents, remove: Collection[str], message: str) -> str:
        """See `Place`. One commit; a repository that does not exist is made.

        Where `files` found a repository without any commit, or was not called, the parent is the newest commit now:
        then one that has come since is overwritten.

        Raises:
            UsageError: another commit came after `files` looked: nothing of it is overwritten.
            InputError: the repository is there, but this token may not read it.
        """
        hub = _huggingface_hub()
        operations: list[Any] = [hub.CommitOperationAdd(path, content) for path, content in sorted(contents.items())]
        operations += [hub.CommitOperationDelete(path) for path in sorted(remove)]
        with self._failures():
            api = hub.HfApi(endpoint=self._endpoint)
            try:
                api.create_repo(self.name, private=self._private or None, exist_ok=not self._is_new)
            except hub.errors.HfHubHTTPError as error:
                if error.response is not None and error.response.status_code == 409:
                    api.repo_info(self.name)  # not found: it was there before, hidden from this token
                raise
            self._is_new = False
            parent = self._seen or api.repo_info(self.name, revision=self._revision).sha
            made = api.create_commit(
                self.name, operations, commit_message=message, revision=self._revision, parent_commit=parent
            )
            self._seen = str(made.oid)
        return str(made.commit_url)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What the hub refuses, and what does not reach it, as one line."""
        errors = _huggingface_hub().errors
        try:
            yield
        except errors.HFValidationError as error:
            raise UsageError(f"{self.name}: {_line(error)}", fix="give OWNER/NAME") from None
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
            raise InputError(f"{self.name}: not found, or not for you: {_line(error)}", fix="hf auth login") from None
        except errors.LocalTokenNotFoundError:
            raise InputError(f"{self.name}: the hub wants a token", fix="hf auth login, or set HF_TOKEN") from None
        except errors.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (409, 412):
                raise UsageError(
                    f"{self.name}: somebody else has pushed there meanwhile, nothing was written", fix="push again"
                ) from None
            raise self._no_answer(error) from None
        except (getattr(errors, "HTTPError", OSError), OSError) as error:  # no connection, too
            raise self._no_answer(error) from None

    def _no_answer(self, error: Exception) -> MissingDependencyError:
        return MissingDependencyError(
            f"{self.name}: expected an answer of the hub, got: {_line(error)}",
            fix="check network and permissions, or use a folder: file:FOLDER",
        )


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise MissingDependencyError(
            f"the hub needs huggingface_hub, got: {error}", fix=install_command("hub")
        ) from None
    return huggingface_hub


def _literal(path: str) -> str:
    """A pattern of `fnmatch` that matches this path alone."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def holds_bundle(files: Collection[str]) -> bool:
    """Whether a repository with these files holds a bundle."""
    return {MANIFEST, MANIFEST_DIGEST} <= set(files)
