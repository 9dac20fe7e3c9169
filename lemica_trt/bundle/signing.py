"""Who made a bundle: signatures over the digest of its manifest, and the keys that are trusted.

`manifest.sig` is a DSSE envelope (github.com/secure-systems-lab/dsse) around an in-toto statement
(github.com/in-toto/attestation) whose subject is `manifest.json` with its SHA-256; the manifest has the digests of all
other files. Keys are Ed25519, in PEM files as `openssl genpkey -algorithm ed25519` writes them.

An envelope holds a signature of each key. Rotation: sign with the new key beside the old one, give readers both public
keys, take the old one away. A manifest that changes, for a new plan say, has to be signed again.

These are the envelope and the statement of OpenSSF Model Signing (github.com/sigstore/model-transparency), without the
rest of its layout: it takes no Ed25519 keys, reads one signature only, and hashes every file again that the manifest
has the digest of.

Needs cryptography (`pip install 'lemica-trt[sign]'`), and only where something is signed or has to be.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lemica_trt.bundle.manifest import MANIFEST, MANIFEST_SIGNATURE
from lemica_trt.core.errors import InputError, IntegrityError, MissingDependencyError, UsageError, install_command
from lemica_trt.core.values import Value, json_bytes, require, value_from_json

TRUSTED_KEYS = "LEMICA_TRUSTED_KEYS"
"""Environment variable: PEM files of trusted public keys, or folders of them, separated as PATH is. Where it is set, no
bundle opens in this process without a signature of one of them, unless other keys are named."""

MAX_SIGNATURES = 16
MAX_SIGNATURE_BYTES = 1 << 16
MAX_KEY_BYTES = 1 << 14

_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "urn:lemica-trt:bundle"


class Signature(Value, frozen=True):
    """One signature: of which key (SHA-256 of its DER form, hex: a hint, which proves nothing), and its 64 bytes."""

    keyid: str
    sig: bytes

    def __post_init__(self) -> None:
        require(len(self.sig) == 64, f"sig must be the 64 bytes of an Ed25519 signature, got {len(self.sig)}")


class Envelope(Value, frozen=True, rename="camel"):
    """A DSSE envelope; bytes are base64 in JSON."""

    payload: bytes
    payload_type: str
    signatures: tuple[Signature, ...]

    def __post_init__(self) -> None:
        count = len(self.signatures)
        require(1 <= count <= MAX_SIGNATURES, f"signatures must be 1 … {MAX_SIGNATURES}, got {count}")
        require(len({one.keyid for one in self.signatures}) == count, "signatures must be of different keys")

    @property
    def signed(self) -> bytes:
        """What a signature is over: the payload with its type, as DSSE has it (PAE)."""
        kind = self.payload_type.encode()
        return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(self.payload), self.payload)


class TrustedKey:
    """A public key.

    Args:
        pem: content of its file.
        where: names it in errors.

    Attributes:
        keyid: SHA-256 of its DER form, hex.

    Raises:
        InputError: it is no Ed25519 public key.
        MissingDependencyError: cryptography is not installed.
    """

    def __init__(self, pem: bytes, where: str) -> None:
        self._key = _loaded("load_pem_public_key", "Ed25519PublicKey", pem, where)
        self.keyid = _keyid(self._key)

    def accepts(self, signature: bytes, data: bytes) -> bool:
        """Whether it is this key's signature over these bytes."""
        try:
            self._key.verify(signature, data)
        except _cryptography("exceptions").InvalidSignature:
            return False
        return True


def trusted_keys(paths: Iterable[str | os.PathLike[str]]) -> tuple[TrustedKey, ...]:
    """The keys of PEM files, and of all `*.pem` in folders.

    Raises:
        InputError: a file cannot be read, or is no public key.
        UsageError: there are none, or a folder has none: nobody is trusted by mistake.
        MissingDependencyError: cryptography is not installed.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        found = sorted(path.glob("*.pem")) if path.is_dir() else [path]
        if not found:
            raise UsageError(f"{path}: expected a folder of public keys, got no *.pem in it")
        files += found
    if not files:
        raise UsageError("expected public keys, got none", fix="name one, or leave them out")
    return tuple(TrustedKey(_small_file(file), str(file)) for file in files)


def environment_keys() -> tuple[TrustedKey, ...]:
    """The keys that `TRUSTED_KEYS` names; none: it is not set.

    Raises:
        UsageError: it is set and names nothing.
        LemicaError: as `trusted_keys`.
    """
    given = os.environ.get(TRUSTED_KEYS)
    if given is None:
        return ()
    paths = [part for part in given.split(os.pathsep) if part]
    if not paths:
        raise UsageError(f"{TRUSTED_KEYS}: expected public keys, got nothing", fix="name them, or unset it")
    return trusted_keys(paths)


def signature_bytes(manifest: bytes, key: str | os.PathLike[str], present: bytes | None = None) -> bytes:
    """The content of `manifest.sig`. The same key and manifest give the same bytes.

    Args:
        manifest: content of `manifest.json`.
        key: PEM file of a private key, without a passphrase.
        present: the signatures that there are; those of other keys over the same manifest are kept.

    Raises:
        InputError: no such key.
        IntegrityError: what is present is damaged.
        UsageError: no more signatures can be added.
        MissingDependencyError: cryptography is not installed.
    """
    private = _loaded("load_pem_private_key", "Ed25519PrivateKey", _small_file(Path(key)), str(key), password=None)
    payload = json_bytes(_statement(manifest))
    kept: dict[str, Signature] = {}
    if present is not None:
        with_old = _envelope(present, where=MANIFEST_SIGNATURE, fix=f"remove {MANIFEST_SIGNATURE}, and sign again")
        kept = {one.keyid: one for one in with_old.signatures} if with_old.payload == payload else {}
    unsigned = Envelope(payload=payload, payload_type=_PAYLOAD_TYPE, signatures=(Signature(keyid="", sig=bytes(64)),))
    keyid = _keyid(private.public_key())
    kept[keyid] = Signature(keyid=keyid, sig=private.sign(unsigned.signed))
    if len(kept) > MAX_SIGNATURES:
        raise UsageError(
            f"{MANIFEST_SIGNATURE} has {MAX_SIGNATURES} signatures, the most there can be",
            fix=f"remove {MANIFEST_SIGNATURE}, and sign again",
        )
    signed = msgspec.structs.replace(unsigned, signatures=tuple(kept[name] for name in sorted(kept)))
    return json_bytes(signed)


def require_signed(manifest: bytes, signatures: bytes | None, trusted: Sequence[TrustedKey], where: str) -> str:
    """The id of the trusted key that signed a manifest.

    Args:
        manifest: content of `manifest.json`.
        signatures: of `manifest.sig`; None: there is none.
        where: names the bundle in errors.

    Raises:
        IntegrityError: it is not signed, by none of these keys, or not this manifest is.
    """
    sign = "get it from who signs it, or have it signed: lemica-trt sign BUNDLE --key KEY.pem"
    if signatures is None:
        raise IntegrityError(f"{where}: expected a signature of a trusted key, it is not signed", fix=sign)
    envelope = _envelope(signatures, where=f"{where}/{MANIFEST_SIGNATURE}")
    for one in envelope.signatures:
        for key in trusted:
            if key.keyid == one.keyid and key.accepts(one.sig, envelope.signed):
                _require_statement(envelope, manifest, where)
                return key.keyid
    names = ", ".join(one.keyid[:12] for one in envelope.signatures)
    wanted = ", ".join(key.keyid[:12] for key in trusted)
    raise IntegrityError(f"{where}: expected a signature of {wanted}, got none that holds, but {names}", fix=sign)


def _require_statement(envelope: Envelope, manifest: bytes, where: str) -> None:
    """Raise IntegrityError unless a signed envelope is about this manifest."""
    if envelope.payload_type != _PAYLOAD_TYPE or envelope.payload != json_bytes(_statement(manifest)):
        raise IntegrityError(
            f"{where}: {MANIFEST_SIGNATURE} is of another {MANIFEST}", fix="get the bundle and its signature together"
        )


def _statement(manifest: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(manifest).hexdigest()
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": MANIFEST, "digest": {"sha256": digest}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {},
    }


def _envelope(data: bytes, where: str, fix: str = "get the bundle and its signature again") -> Envelope:
    try:
        return value_from_json(Envelope, data, where=where)
    except InputError as error:
        raise IntegrityError(error.what, fix=fix) from None


def _small_file(path: Path) -> bytes:
    """The content of a key's file."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_KEY_BYTES)
    except OSError as error:
        raise InputError(f"{path}: expected a key in a PEM file, got: {error.strerror}") from None


def _loaded(loader: str, kind: str, pem: bytes, where: str, **options: Any) -> Any:
    """A key of cryptography; no text of the file is in the error."""
    expected = getattr(_cryptography("hazmat.primitives.asymmetric.ed25519"), kind)
    try:
        key = getattr(_cryptography("hazmat.primitives.serialization"), loader)(pem, **options)
    except TypeError:
        raise InputError(
            f"{where}: expected a key without a passphrase", fix=f"openssl pkey -in {where} -out KEY.pem"
        ) from None
    except ValueError:
        key = None
    except _cryptography("exceptions").UnsupportedAlgorithm:
        key = None
    if not isinstance(key, expected):
        name = "public" if kind == "Ed25519PublicKey" else "private"
        raise InputError(
            f"{where}: expected an Ed25519 {name} key in PEM",
            fix="openssl genpkey -algorithm ed25519 -out KEY.pem; openssl pkey -in KEY.pem -pubout -out PUBLIC.pem",
        )
    return key


def _keyid(public: Any) -> str:
    serialization = _cryptography("hazmat.primitives.serialization")
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _cryptography(module: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.{module}")
    except ImportError as error:
        raise MissingDependencyError(
            f"signatures need cryptography, got: {error}", fix=install_command("sign")
        ) from None
