"""`manifest.sig` and PEM files of keys, mutated: refused in one line, or the signature that they were.

Seeds: an envelope of two keys over the bytes in `seeds/signed`, and the public key of one of them, written by
`lemica-trt sign` and OpenSSL's format.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from mutations import TIERS, changed, run
from test_fuzz_files import refused

from lemica_trt.bundle import signing
from lemica_trt.core.values import value_from_json

pytest.importorskip("cryptography", reason="pip install 'lemica-trt[sign]'")

pytestmark = pytest.mark.cpu

SEEDS = Path(__file__).parent / "seeds"
SIGNED, ENVELOPE, PEM = ((SEEDS / name).read_bytes() for name in ("signed", "manifest.sig", "public.pem"))


def key() -> signing.TrustedKey:
    return signing.TrustedKey(PEM, "public.pem")


def signatures_of(data: bytes) -> set[tuple[str, bytes]]:
    return {(one.keyid, one.sig) for one in value_from_json(signing.Envelope, data, where="seed").signatures}


def test_the_seeds_are_right() -> None:
    assert signing.require_signed(SIGNED, ENVELOPE, [key()], "b") == key().keyid
    assert len(signatures_of(ENVELOPE)) == 2


@TIERS
def test_envelopes(many: bool) -> None:
    """An altered envelope is accepted only where the payload and the key's signature are what they were."""
    trusted, true = [key()], signatures_of(ENVELOPE)
    payload = value_from_json(signing.Envelope, ENVELOPE, where="seed").payload

    def target(data: bytes) -> None:
        found = refused(lambda: signing.require_signed(SIGNED, data, trusted, "b"))
        if found is not None:
            assert value_from_json(signing.Envelope, data, where="again").payload == payload
            assert (found, dict(true)[found]) in signatures_of(data)
        assert refused(lambda: signing.require_signed(SIGNED + b"x", data, trusted, "b")) is None

    run(target, changed(ENVELOPE, is_json=True), many=many)


@TIERS
def test_signing_beside_a_mutated_envelope(many: bool, tmp_path: Path) -> None:
    """What is there is refused, or a new signature beside it holds."""
    from test_signing import write_keys

    private, public = write_keys(tmp_path, 3)
    trusted = signing.trusted_keys([public])

    def target(data: bytes) -> None:
        made = refused(lambda: signing.signature_bytes(SIGNED, private, data))
        assert made is None or signing.require_signed(SIGNED, made, trusted, "b") == trusted[0].keyid

    run(target, changed(ENVELOPE, is_json=True), many=many)


@TIERS
def test_public_keys(many: bool) -> None:
    """Another key accepts nothing of what this one signed."""
    envelope = value_from_json(signing.Envelope, ENVELOPE, where="seed")
    keyid = key().keyid
    (signature,) = (one.sig for one in envelope.signatures if one.keyid == keyid)

    def target(data: bytes) -> None:
        found = refused(lambda: signing.TrustedKey(data, "public.pem"))
        assert found is None or found.keyid == keyid or not found.accepts(signature, envelope.signed)

    run(target, changed(PEM), many=many)
