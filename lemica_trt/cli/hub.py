"""`push` and `pull`: bundles and plans on the hub, or in folders."""

from __future__ import annotations

from pathlib import Path

import click

from lemica_trt.cli import options
from lemica_trt.cli.command import OUTPUT, Command, flag, flags
from lemica_trt.cli.options import Screen, common


@click.command(
    cls=Command,
    short_help="Put a bundle or a plan on the hub, or into a folder.",
    examples=("push out/tiny somebody/tiny-bundle", "push out/tiny/plans/b15.json /srv/plans"),
)
@click.argument("path", type=options.PATH)
@click.argument("repository", metavar="REPO")
@flags(OUTPUT, flag("--private", is_flag=True, help="A repository that is made is for its owner alone."))
@common
def push(screen: Screen, path: Path, repository: str, private: bool) -> None:
    """Put a bundle, or a plan's JSON file, into REPO: OWNER/NAME on the hub, or a folder. See docs/hub.md."""
    from lemica_trt.hub import exchange
    from lemica_trt.hub.places import place_from

    screen.reporter.stage("push", repository)
    found = exchange.push(path, place_from(repository, private=private), repository)
    screen.print(found, lambda: f"{found.where}\n{found.kind} {', '.join(found.names)}\ndigest {found.digest}")


@click.command(
    cls=Command,
    short_help="Get a bundle or a plan from the hub, or out of a folder.",
    examples=("pull somebody/tiny-bundle -o out/tiny", "pull somebody/tiny-bundle --plan b15 -o plans"),
)
@click.argument("repository", metavar="REPO")
@flags(
    OUTPUT,
    flag("--output", "-o", type=options.FOLDER, required=True,
         help="Folder of the bundle; of a plan the folder that gets NAME.json."),
    flag("--plan", metavar="NAME", help="This plan alone; also out of a bundle."),
    flag("--digest", metavar="HEX", help="What it must be, by its first 12 digits or more."),
)  # fmt: skip
@options.signed
@common
def pull(
    screen: Screen,
    repository: str,
    output: Path,
    plan: str | None,
    digest: str | None,
    verify_with: tuple[Path, ...],
    require_signature: bool,
) -> None:
    """Get the bundle, or a plan, out of REPO: OWNER/NAME[@REVISION] on the hub, or a folder. See docs/hub.md."""
    from lemica_trt.hub import exchange
    from lemica_trt.hub.places import place_from

    screen.reporter.stage("pull", repository)
    trusted = options.trusted(verify_with, require_signature)
    found = exchange.pull(place_from(repository), repository, output, plan=plan, digest=digest, trusted=trusted)
    screen.print(found, lambda: f"{found.where}\n{found.kind} {', '.join(found.names)}\ndigest {found.digest}")
