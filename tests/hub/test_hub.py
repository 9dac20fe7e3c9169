"""Push and pull: the same in folders and with `huggingface_hub` against a hub on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from command import lemica, result_of
from hub_server import Repositories, serving
from test_signing import write_keys

from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.signing import TRUSTED_KEYS, trusted_keys
from lemica_trt.bundle.writing import copy_bundle, sign_bundle
from lemica_trt.core.errors import InputError, IntegrityError, LemicaError, MissingDependencyError, UsageError
from lemica_trt.core.values import read_value
from lemica_trt.hub.exchange import pull, push
from lemica_trt.hub.places import Folder, Hub, Place, place_from
from lemica_trt.ir.plan import StepPlan

pytestmark = pytest.mark.cpu

pytest.importorskip("huggingface_hub", reason="pip install 'lemica-trt[hub]'")

from huggingface_hub import constants  # noqa: E402

NAME = "somebody/tiny"
Built = tuple[Path, subprocess.CompletedProcess[str]]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repositories]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as found:
        yield found


@pytest.fixture(params=["folder", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path, server: Repositories) -> Place:
    return Folder(tmp_path / "repository") if request.param == "folder" else Hub(NAME, endpoint=server.url)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_comes_back_as_it_was(built: Built, place: Place, tmp_path: Path) -> None:
    bundle = Bundle.open(built[0])
    pushed = push(built[0], place, NAME)
    assert (pushed.kind, pushed.digest, pushed.names) == ("bundle", bundle.digest, bundle.plans)
    card = (place.folder(["README.md"]) / "README.md").read_text(encoding="utf-8")
    assert f"lemica-trt pull {place.name} -o bundle --digest {bundle.digest}" in card
    assert card.startswith("---\n") and "pipeline_tag: text-to-video\n" in card and str(tmp_path) not in card
    assert "| `b4` (default) | 4 of 8 | CogVideoXDDIMScheduler | lemica | 4 |" in card
    assert "## Quality" in card and "| **`b4`** | 4 | " in card and "2 held-out clips" in card
    assert "![contact sheet](reports/contact_sheet.png)" in card

    pulled = pull(place, NAME, tmp_path / "here", digest=bundle.digest[:32])
    assert pulled.digest == bundle.digest
    Bundle.open(tmp_path / "here").check()
    found, expected = content(tmp_path / "here"), content(built[0])
    assert found == {path: data for path, data in expected.items() if not path.startswith("reports/")}
    assert not any(path.is_symlink() for path in (tmp_path / "here").rglob("*"))

    pull(place, NAME, tmp_path / "here", digest=bundle.digest)  # over itself
    with pytest.raises(IntegrityError, match=r"expected digest 000000000000…, got .*… → ask who pushed it"):
        pull(place, NAME, tmp_path / "other", digest="0" * 64)
    with pytest.raises(UsageError, match="expected at least 32 hex digits of a digest, got 'abc'"):
        pull(place, NAME, tmp_path / "other", digest="abc")
    assert not (tmp_path / "other").exists()


def test_cards_name_a_model_of_the_hub_only_where_a_profile_does(built: Built, tmp_path: Path) -> None:
    from lemica_trt.hub.card import bundle_card

    manifest = Bundle.open(built[0]).manifest

    def card(source: str) -> str:
        profile = msgspec.structs.replace(manifest.profile, source=source)
        return bundle_card(msgspec.structs.replace(manifest, profile=profile), "0" * 64, [], None, [], "somebody/x")

    assert "base_model: zai-org/CogVideoX-2b\n" in card("zai-org/CogVideoX-2b")
    for source in ("package:cogvideox-tiny", "models/mine", "somebody/finetuned", "cogvideox", "here"):
        assert "base_model" not in card(source)


def test_nothing_but_what_was_pushed_is_replaced(built: Built, place: Place, tmp_path: Path) -> None:
    """A project with a README.md, or a model that somebody has on the hub."""
    theirs: dict[str, Path | bytes] = {"README.md": b"mine", "src/main.py": b"1", "manifest.json": b"{}"}
    place.write(theirs, (), "mine")
    for path in (built[0], built[0] / "plans" / "b4.json"):
        with pytest.raises(UsageError, match=r"expected a new repository or one that holds .* something else"):
            push(path, place, NAME)
    folder = place.folder(sorted(theirs))
    assert all((folder / path).read_bytes() == data for path, data in theirs.items())
    (tmp_path / "checkout" / ".git").mkdir(parents=True)
    (tmp_path / "checkout" / "README.md").touch()
    with pytest.raises(UsageError, match="expected a folder that 'lemica-trt push' wrote"):
        push(built[0], Folder(tmp_path / "checkout"), "checkout")


def test_signatures_go_along(built: Built, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = write_keys(tmp_path, 1)
    _, other = write_keys(tmp_path, 2)
    bundle = copy_bundle(Bundle.open(built[0]), tmp_path / "signed")
    push(sign_bundle(bundle, private).path, place, NAME)
    monkeypatch.setenv(TRUSTED_KEYS, str(public))
    pull(place, NAME, tmp_path / "here")
    assert Bundle.open(tmp_path / "here").signed_by == trusted_keys([public])[0].keyid
    pull(place, NAME, tmp_path / "plans", plan="b4")
    with pytest.raises(IntegrityError, match="expected a signature of"):
        pull(place, NAME, tmp_path / "other", trusted=trusted_keys([other]))
    assert not (tmp_path / "other").exists()


def test_a_plan_out_of_a_bundle(built: Built, place: Place, tmp_path: Path) -> None:
    push(built[0], place, NAME)
    pulled = pull(place, NAME, tmp_path / "plans", plan="b5")
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["b5.json"]
    assert read_value(StepPlan, tmp_path / "plans" / "b5.json") == Bundle.open(built[0]).plan("b5")
    assert pulled.kind == "plan"
    with pytest.raises(UsageError, match=r"there is no plan 'b9' → use one of: b4, b5, uncached"):
        pull(place, NAME, tmp_path / "plans", plan="b9")
    with pytest.raises(UsageError, match="one that holds plans, it holds a bundle"):
        push(tmp_path / "plans" / "b5.json", place, NAME)


def test_plans_gather_in_one_repository(built: Built, place: Place, tmp_path: Path) -> None:
    bundle = Bundle.open(built[0])
    for name in ("b4", "b5", "b4"):
        plan = bundle.plan(name)
        plan.save(tmp_path / f"{name}.json")
        assert push(tmp_path / f"{name}.json", place, NAME).digest == plan.digest
    card = (place.folder(["README.md"]) / "README.md").read_text(encoding="utf-8")
    assert card.count("CogVideoXDDIMScheduler") == 2 and f"lemica-trt pull {place.name} --plan b4 -o plans" in card
    assert place.files() - {".gitattributes"} == {"README.md", "plans/b4.json", "plans/b5.json"}
    assert pull(place, NAME, tmp_path / "here", plan="b5", digest=bundle.plan("b5").digest).names == ("b5",)
    assert read_value(StepPlan, tmp_path / "here" / "b5.json") == bundle.plan("b5")
    with pytest.raises(UsageError, match=r"expected --plan, it holds plans → use one of: b4, b5"):
        pull(place, NAME, tmp_path / "here")
    with pytest.raises(UsageError, match="one that holds a bundle, it holds something else"):
        push(built[0], place, NAME)


def test_another_bundle_takes_the_place_of_the_first(built: Built, place: Place, tmp_path: Path) -> None:
    from lemica_trt.bundle.writing import add_plan

    push(built[0], place, NAME)
    first = Bundle.open(built[0]).plan("b4")
    other = Bundle.open(shutil.copytree(built[0], tmp_path / "other"))
    other = add_plan(other, msgspec.structs.replace(first, name="more"))
    (tmp_path / "other" / "reports" / "contact_sheet.png").unlink()
    push(tmp_path / "other", place, NAME)
    files = place.files()
    assert "plans/more.json" in files and "reports/contact_sheet.png" not in files
    pulled = pull(place, NAME, tmp_path / "here")
    assert pulled.digest == other.digest and "more" in pulled.names
    card = (place.folder(["README.md"]) / "README.md").read_text(encoding="utf-8")
    assert "`more`" in card and "## Quality" not in card  # the verification was of the first


def test_who_pushes_at_the_same_time_loses_nothing(built: Built, server: Repositories, tmp_path: Path) -> None:
    """Two plans, read and written at the same time: the card of the second would not have the first."""
    bundle = Bundle.open(built[0])
    for name in ("b4", "b5"):
        bundle.plan(name).save(tmp_path / f"{name}.json")

    def other() -> None:
        server.files.setdefault(NAME, {})["plans/other.json"] = (tmp_path / "b5.json").read_bytes()

    place = Hub(NAME, endpoint=server.url)
    for there in (False, True):  # a repository that appears meanwhile, and one that changes
        server.meanwhile = other
        with pytest.raises(
            UsageError, match="somebody else has pushed there meanwhile, nothing was written → push again"
        ):
            push(tmp_path / "b4.json", place, NAME)
        assert server.commits == [] and set(server.files[NAME]) == {"plans/other.json"}
        if not there:
            del server.files[NAME]["plans/other.json"]
    push(tmp_path / "b4.json", place, NAME)
    push(tmp_path / "b4.json", place, NAME)  # on top of its own
    assert len(server.commits) == 2
    card = server.files[NAME]["README.md"].decode()
    assert "`b4`" in card and "`b5`" in card


def test_a_repository_that_the_token_may_not_read_is_not_a_race(
    built: Built, server: Repositories, tmp_path: Path
) -> None:
    """The hub says that there is none, and refuses to make it."""
    Bundle.open(built[0]).plan("b4").save(tmp_path / "b4.json")
    server.files[NAME], server.hidden = {"README.md": b"theirs"}, True
    with pytest.raises(InputError, match=f"{NAME}: not found, or not for you: .* → hf auth login"):
        push(tmp_path / "b4.json", Hub(NAME, endpoint=server.url), NAME)
    assert server.files[NAME] == {"README.md": b"theirs"}


def test_what_is_damaged_counts_for_nothing(built: Built, server: Repositories, tmp_path: Path) -> None:
    folder = Folder(tmp_path / "repository")
    push(built[0], folder, NAME)
    broken = next(path for path in (tmp_path / "repository" / "onnx").iterdir())
    data = bytearray(broken.read_bytes())
    data[-1] ^= 1
    broken.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="altered"):
        pull(folder, NAME, tmp_path / "here")
    broken.unlink()
    with pytest.raises(InputError, match=r"expected onnx/.*, it is missing → push it again"):
        pull(folder, NAME, tmp_path / "here")

    place = Hub(NAME, endpoint=server.url)
    push(built[0], place, NAME)
    server.broken = f"onnx/{broken.name}"
    with pytest.raises(IntegrityError, match="altered"):
        pull(place, NAME, tmp_path / "here")
    server.broken = None
    server.files[NAME]["plans/b4.json"] += b" "
    with pytest.raises(IntegrityError, match=r"plans/b4\.json: expected \d+ bytes"):
        pull(place, NAME, tmp_path / "here", plan="b4")
    assert not any(path.name.strip(".").startswith("here") for path in tmp_path.iterdir())


def test_a_pull_that_is_killed_leaves_nothing_there(built: Built, tmp_path: Path) -> None:
    push(built[0], Folder(tmp_path / "repository"), NAME)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lemica_trt.bundle import writing\n"
        "from lemica_trt.hub.exchange import pull\n"
        "from lemica_trt.hub.places import Folder\n"
        "link, left = writing._link, [3]\n"
        "def dying(*paths):\n"
        "    left[0] -= 1\n"
        "    left[0] or os.kill(os.getpid(), 9)\n"
        "    link(*paths)\n"
        "writing._link = dying\n"
        "pull(Folder(Path(sys.argv[1])), 'x/y', Path(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "repository"), str(tmp_path / "here")]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == -9 and not (tmp_path / "here").exists()
    pull(Folder(tmp_path / "repository"), NAME, tmp_path / "here")
    Bundle.open(tmp_path / "here").check()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "repository"]


def test_what_the_hub_refuses_is_one_line(
    built: Built, server: Repositories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Hub(NAME, endpoint=server.url)
    with pytest.raises(InputError, match="expected a repository with a bundle or plans, got another, or none"):
        pull(place, NAME, tmp_path / "here")
    server.refuse = 403
    for work in (lambda: pull(place, NAME, tmp_path / "here"), lambda: push(built[0], place, NAME)):
        with pytest.raises(LemicaError, match=r"^somebody/tiny: .* → ") as refused:
            work()
        assert "\n" not in str(refused.value)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # it tries again, and again
    with pytest.raises(MissingDependencyError, match=r"expected an answer of the hub, got: .*file:FOLDER"):
        Hub(NAME, endpoint="http://127.0.0.1:9").files()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for work in (
        lambda: push(built[0], Folder(tmp_path / "mine"), "mine"),
        lambda: pull(Folder(built[0]), "bundle", tmp_path / "mine"),
    ):
        with pytest.raises(UsageError, match=r"(got|holds) something else"):
            work()
    assert content(tmp_path / "mine") == {"thesis.txt": b"years of work"}


def test_names_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "there").mkdir(parents=True)
    for text, path in (
        ("./new", "new"), ("file:new", "new"), ("file:///tmp/new", "/tmp/new"), ("owner/there", "owner/there"),
        ("/tmp/new", "/tmp/new"), (".", "."),
    ):  # fmt: skip
        place = place_from(text)
        assert isinstance(place, Folder) and place.path == Path(path)
    for text in ("owner/new", "owner/new@v1.0", "o-w/n_e.w@main"):
        place = place_from(text)
        assert isinstance(place, Hub) and place.name == text.partition("@")[0]
    for text in ("new", "a/b/c", "owner/new@", "https://huggingface.co/owner/new", "owner/näme", ""):
        with pytest.raises(UsageError, match="expected a repository of the hub, OWNER/NAME, or a folder"):
            place_from(text)


def test_the_commands(built: Built, tmp_path: Path) -> None:
    done = lemica("push", built[0], "file:kept", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    digest = result_of(done.stdout)["digest"]
    done = lemica("pull", "file:kept", "-o", "bundle", "--digest", digest, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.split("\n")[0] == "bundle" and digest in done.stdout, done.stderr
    assert Bundle.open(tmp_path / "bundle").digest == digest
    done = lemica("pull", "file:kept", "--plan", "b4", "-o", "plans", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "plans" / "b4.json").is_file(), done.stderr
    done = lemica("push", tmp_path / "plans" / "b4.json", "file:kept", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 2, done.stderr  # the stage, and what is wrong
