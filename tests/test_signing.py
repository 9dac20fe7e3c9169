"""Who made a bundle: signatures over its manifest, keys that are trusted, and every way to open it without one."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import lemica
from test_bundle import names_in, plan_of, write

import lemica_trt
from lemica_trt.bundle.manifest import MANIFEST, MANIFEST_SIGNATURE, manifest_digest_line
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.signing import MAX_SIGNATURES, TRUSTED_KEYS, TrustedKey, trusted_keys
from lemica_trt.bundle.writing import add_plan, copy_bundle, sign_bundle
from lemica_trt.core.errors import InputError, IntegrityError, LemicaError, UsageError
from lemica_trt.triton.repository import Settings, write_repository

pytestmark = pytest.mark.null

ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")


def write_keys(folder: Path, number: int, kind: Any = None) -> tuple[Path, Path]:
    """A private key and its public key, the same for the same number."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) if kind is None else kind
    private, public = folder / f"{number}.key", folder / f"{number}.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> list[tuple[Path, Path]]:
    (tmp_path / "keys").mkdir()
    return [write_keys(tmp_path / "keys", number) for number in (1, 2, 3)]


def keys_of(*files: Path) -> tuple[TrustedKey, ...]:
    return trusted_keys(files)


def test_a_signed_bundle_opens_with_the_key_that_signed_it_and_with_no_other(
    tmp_path: Path, keys: list[tuple[Path, Path]]
) -> None:
    (private, public), (_, other), _ = keys
    bundle = write(tmp_path / "b")
    with pytest.raises(IntegrityError, match=r"expected a signature of a trusted key, it is not signed → .*sign"):
        Bundle.open(tmp_path / "b", trusted=keys_of(public))
    signed = sign_bundle(bundle, private)
    signed.check()  # the signature is no file that is not listed
    first = (tmp_path / "b" / MANIFEST_SIGNATURE).read_bytes()
    assert sign_bundle(signed, private).digest == bundle.digest
    assert (tmp_path / "b" / MANIFEST_SIGNATURE).read_bytes() == first
    found = Bundle.open(tmp_path / "b", trusted=keys_of(public))
    assert found.signed_by == keys_of(public)[0].keyid and found.digest == bundle.digest
    assert Bundle.open(tmp_path / "b", trusted=keys_of(other, public)).signed_by == found.signed_by
    with pytest.raises(IntegrityError, match=f"{found.signed_by[:12]}"):
        Bundle.open(tmp_path / "b", trusted=keys_of(other))
    assert Bundle.open(tmp_path / "b").signed_by is None
    assert not [name for name in names_in(tmp_path) if name.startswith(".")]


def test_the_envelope_is_dsse_around_an_in_toto_statement(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    """Checked with cryptography alone, by the two specifications."""
    bundle = sign_bundle(write(tmp_path / "b"), keys[0][0])
    envelope = json.loads((tmp_path / "b" / MANIFEST_SIGNATURE).read_bytes())
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and kind == "application/vnd.in-toto+json"
    assert statement["subject"] == [{"name": MANIFEST, "digest": {"sha256": bundle.digest}}]
    (signature,) = envelope["signatures"]
    public = serialization.load_pem_public_key(keys[0][1].read_bytes())
    signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(payload)).encode(), payload])
    public.verify(base64.b64decode(signature["sig"]), signed)


def test_keys_are_rotated(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    old, new, _ = keys
    bundle = sign_bundle(sign_bundle(write(tmp_path / "b"), old[0]), new[0])
    for trusted in ([old[1]], [new[1]], [old[1], new[1]]):
        assert Bundle.open(bundle.path, trusted=keys_of(*trusted)).signed_by is not None
    by_folder = trusted_keys([tmp_path / "keys"])
    assert len(by_folder) == 3
    assert Bundle.open(bundle.path, trusted=by_folder).signed_by is not None


def test_every_bit_of_a_signature_counts(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    """No flip of one bit gives another meaning: it is refused, or the signature still holds for this very manifest."""
    bundle, file = sign_bundle(write(tmp_path / "b"), keys[0][0]), tmp_path / "b" / MANIFEST_SIGNATURE
    whole, trusted, refused = file.read_bytes(), keys_of(keys[0][1]), 0
    envelope = json.loads(whole)
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            Bundle.open(bundle.path, trusted=trusted)
        except IntegrityError:
            refused += 1
    meant = len(envelope["payload"]) + len(envelope["signatures"][0]["sig"]) + 64  # the rest is white space and names
    assert refused >= meant


def forged_manifest(folder: Path) -> None:
    """Another manifest beside its right digest, as whoever may write files can make."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    manifest["versions"]["content"] = "forged"
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / "manifest.sha256").write_bytes(manifest_digest_line(data))


def edited(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        envelope = json.loads((folder / MANIFEST_SIGNATURE).read_bytes())
        change(envelope)
        (folder / MANIFEST_SIGNATURE).write_text(json.dumps(envelope))

    return edit


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (forged_manifest, "manifest.sig is of another manifest.json"),
        (lambda folder: (folder / MANIFEST_SIGNATURE).unlink(), "it is not signed"),
        (lambda folder: (folder / MANIFEST_SIGNATURE).write_bytes(b"{}"), "expected a valid Envelope"),
        (lambda folder: (folder / MANIFEST_SIGNATURE).write_bytes(b"[" * 60_000), "nested too deep|expected a valid"),
        (lambda folder: (folder / MANIFEST_SIGNATURE).write_bytes(b" " * 70_000), "at most 65536 bytes"),
        (edited(lambda e: e["signatures"][0].update(keyid="0" * 64)), "got none that holds"),
        (edited(lambda e: e["signatures"][0].update(sig="AAAA")), "64 bytes"),
        (edited(lambda e: e.update(payloadType="text/plain")), "got none that holds"),
        (edited(lambda e: e["signatures"].clear()), "signatures must be 1"),
        (edited(lambda e: e["signatures"].extend(e["signatures"] * 3)), "of different keys"),
        (edited(lambda e: e.update(more=1)), "unknown field"),
    ],
)  # fmt: skip
def test_what_is_not_signed_does_not_open(
    attack: Callable[[Path], None], message: str, tmp_path: Path, keys: list[tuple[Path, Path]]
) -> None:
    bundle = sign_bundle(write(tmp_path / "b"), keys[0][0])
    attack(bundle.path)
    with pytest.raises(IntegrityError, match=message):
        Bundle.open(bundle.path, trusted=keys_of(keys[0][1]))


def test_a_signature_of_the_same_key_over_something_else_does_not_count(
    tmp_path: Path, keys: list[tuple[Path, Path]]
) -> None:
    """A statement of another kind, with this manifest's digest, signed by the trusted key."""
    bundle = sign_bundle(write(tmp_path / "b"), keys[0][0])
    file = bundle.path / MANIFEST_SIGNATURE
    envelope = json.loads(file.read_bytes())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    payload, kind = json.dumps({**statement, "predicateType": "urn:else"}).encode(), envelope["payloadType"].encode()
    key = serialization.load_pem_private_key(keys[0][0].read_bytes(), None)
    signature = key.sign(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    file.write_text(json.dumps({**envelope, "payload": base64.b64encode(payload).decode()}))
    with pytest.raises(IntegrityError, match="of another"):
        Bundle.open(bundle.path, trusted=keys_of(keys[0][1]))


def test_a_process_can_be_told_once_for_all_that_it_opens(
    tmp_path: Path, keys: list[tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = sign_bundle(write(tmp_path / "b"), keys[0][0])
    monkeypatch.setenv(TRUSTED_KEYS, f"{keys[1][1]}:{keys[0][1]}")
    assert Bundle.open(bundle.path).signed_by == keys_of(keys[0][1])[0].keyid
    monkeypatch.setenv(TRUSTED_KEYS, str(keys[1][1]))
    for opened in (lambda: Bundle.open(bundle.path), lambda: lemica_trt.load(bundle.path)):
        with pytest.raises(IntegrityError, match="expected a signature of"):
            opened()
    assert Bundle.open(bundle.path, trusted=()).signed_by is None
    monkeypatch.setenv(TRUSTED_KEYS, "")
    with pytest.raises(UsageError, match="expected public keys, got nothing"):
        Bundle.open(bundle.path)


def test_what_is_no_key(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    (private, public), *_ = keys
    (tmp_path / "text.pem").write_text("SECRET TEXT")
    (tmp_path / "empty").mkdir()
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    other = write_keys(tmp_path, 9, ec.generate_private_key(ec.SECP256R1()))
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"word")
    (tmp_path / "locked.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    for path in (private, tmp_path / "text.pem", tmp_path / "none.pem", other[1]):
        with pytest.raises(InputError, match=r"expected (an Ed25519 public key|a key) in") as found:
            trusted_keys([path])
        assert "SECRET" not in str(found.value)
    with pytest.raises(UsageError, match=r"no \*.pem"):
        trusted_keys([tmp_path / "empty"])
    bundle = write(tmp_path / "b")
    for path in (public, tmp_path / "text.pem", other[0]):
        with pytest.raises(InputError, match=r"expected an Ed25519 private key in PEM → openssl genpkey"):
            sign_bundle(bundle, path)
    with pytest.raises(InputError, match=r"without a passphrase → openssl pkey"):
        sign_bundle(bundle, tmp_path / "locked.pem")
    assert MANIFEST_SIGNATURE not in names_in(bundle.path)


def test_what_is_signed_was_whole(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    bundle = write(tmp_path / "b")
    (bundle.path / "onnx/full.onnx").write_bytes(b"2" * 1000)
    with pytest.raises(IntegrityError, match=r"onnx/full.onnx: expected SHA-256 .* altered"):
        sign_bundle(bundle, keys[0][0])
    older = write(tmp_path / "c")
    write(tmp_path / "c", "2")
    with pytest.raises(IntegrityError, match="replaced after it was opened"):
        sign_bundle(older, keys[0][0])


def test_copies_keep_signatures_and_new_plans_do_not(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    bundle, trusted = sign_bundle(write(tmp_path / "b"), keys[0][0]), keys_of(keys[0][1])
    copy_bundle(bundle, tmp_path / "copy")
    assert Bundle.open(tmp_path / "copy", trusted=trusted).digest == bundle.digest
    add_plan(bundle, plan_of("more"))
    with pytest.raises(IntegrityError, match="it is not signed"):
        Bundle.open(bundle.path, trusted=trusted)
    sign_bundle(Bundle.open(bundle.path), keys[1][0])
    signed = json.loads((bundle.path / MANIFEST_SIGNATURE).read_bytes())["signatures"]
    assert [one["keyid"] for one in signed] == [keys_of(keys[1][1])[0].keyid]


def test_signatures_are_a_file_of_the_bundle(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    """No link: what it points at would be copied."""
    bundle, secret = write(tmp_path / "b"), tmp_path / "secret"
    secret.write_bytes(b"x")
    (tmp_path / "b" / MANIFEST_SIGNATURE).symlink_to(secret)
    for use in (lambda: copy_bundle(bundle, tmp_path / "copy"), lambda: sign_bundle(bundle, keys[0][0])):
        with pytest.raises(IntegrityError, match="no link"):
            use()
    assert not (tmp_path / "copy").exists() and secret.read_bytes() == b"x"


def test_what_cannot_be_signed_says_how_it_can(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    bundle = write(tmp_path / "b")
    for number in range(10, 10 + MAX_SIGNATURES):
        sign_bundle(bundle, write_keys(tmp_path, number)[0])
    with pytest.raises(UsageError, match=r"16 signatures, the most there can be → remove manifest\.sig"):
        sign_bundle(bundle, keys[0][0])
    (tmp_path / "b" / MANIFEST_SIGNATURE).write_bytes(b"{")
    with pytest.raises(IntegrityError, match=r"→ remove manifest\.sig, and sign again"):
        sign_bundle(bundle, keys[0][0])


def test_no_keys_are_not_any_keys(tmp_path: Path) -> None:
    write(tmp_path / "b")
    with pytest.raises(UsageError, match="expected public keys, got none"):
        lemica_trt.load(tmp_path / "b", verify_with=[])


def test_a_copy_has_the_very_manifest(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    """Of a bundle of another release of this format, too, whose manifest says less: a digest is of bytes."""
    folder = write(tmp_path / "b").path
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["revision"]
    data = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(data)
    (folder / "manifest.sha256").write_bytes(manifest_digest_line(data))
    bundle = sign_bundle(Bundle.open(folder), keys[0][0])
    copy_bundle(bundle, tmp_path / "copy")
    assert Bundle.open(tmp_path / "copy", trusted=keys_of(keys[0][1])).digest == bundle.digest


def test_a_killed_signature_leaves_no_file_that_is_not_listed(tmp_path: Path, keys: list[tuple[Path, Path]]) -> None:
    bundle = write(tmp_path / "b")
    script = """
import os, signal, sys
def hook(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("manifest.sig"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import sign_bundle
sign_bundle(Bundle.open(sys.argv[1]), sys.argv[2])
"""
    done = subprocess.run([sys.executable, "-c", script, str(bundle.path), str(keys[0][0])], check=False)
    assert done.returncode == -9
    Bundle.open(bundle.path).check()
    sign_bundle(Bundle.open(bundle.path), keys[0][0])
    assert [name for name in names_in(tmp_path) if name.startswith(".b")] == []


def test_on_the_command_line(tmp_path: Path, keys: list[tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUSTED_KEYS, raising=False)
    (private, public), (_, other), _ = keys
    bundle = write(tmp_path / "b").path
    done = lemica("sign", bundle, "--key", private, "--quiet")
    assert done.returncode == 0 and f"{bundle}/manifest.sig" in done.stdout, done.stderr
    run = ("run", bundle, "a prompt", "--output", tmp_path / "clip.npy")
    for flags, code, message in (
        (
            ("--require-signature",),
            2,
            "expected a public key, got none → add --verify-with, or set LEMICA_TRUSTED_KEYS",
        ),
        (("--verify-with", other), 4, "expected a signature of"),
        (("--verify-with", public, "--require-signature"), None, "expected a tokenizer.json"),  # signed; it holds none
    ):
        done = lemica(*run, *flags)
        *notes, error = done.stderr.splitlines()  # a note: the toy engines are of no release that there is
        assert message in error and len(notes) == (code is None), done.stderr
        assert code is None or done.returncode == code
        assert ("signature" in error) == (code is not None)


def test_triton_repositories_ask_their_server_for_a_key(
    tmp_path: Path, keys: list[tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model does when it is loaded, in this process: the variable is the server's."""
    sys.path.insert(0, str(Path(__file__).parent / "tritonserver"))
    from test_repository import make_bundle
    from test_serving import load_args, pb_utils

    from lemica_trt.triton.server import load

    bundle = sign_bundle(make_bundle(tmp_path / "toy"), keys[0][0])
    write_repository(bundle, tmp_path / "r", Settings(require_signature=True))
    arguments = load_args(tmp_path / "r")
    monkeypatch.delenv(TRUSTED_KEYS, raising=False)
    with pytest.raises(LemicaError, match=r"the server trusts no key → start it with LEMICA_TRUSTED_KEYS"):
        load.open_bundle(pb_utils(), arguments)
    monkeypatch.setenv(TRUSTED_KEYS, str(keys[1][1]))
    with pytest.raises(IntegrityError, match="expected a signature of"):
        load.open_bundle(pb_utils(), arguments)
    monkeypatch.setenv(TRUSTED_KEYS, str(keys[0][1]))
    assert load.open_bundle(pb_utils(), arguments)[0].signed_by == keys_of(keys[0][1])[0].keyid
