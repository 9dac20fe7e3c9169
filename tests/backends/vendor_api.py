"""Which names of a TensorRT module our code uses, and whether a real module has them.

    python vendor_api.py MODULE < uses.json      prints a list of complaints as JSON

A use is found by reading the source, by two conventions of the files that hold such code. The module itself is called
`trt`. A variable, parameter or attribute that holds an object of it is annotated with its class: `tensorrt.Runtime`,
or `tensorrt_rtx.IRuntimeCache` for what only TensorRT for RTX has. What they are not annotated for is found too: an
attribute whose name a vendor's class has and that nothing here defines (`unannotated`). A variable `options` holds a
backend's own options, which bear the vendor's names.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

VENDORS = ("tensorrt", "tensorrt_rtx")

OWN = ("options", "job.options")
"""What holds nothing of a vendor's."""


class Use(NamedTuple):
    """A name that is used.

    Attributes:
        where: file and line.
        cls: class that it is an attribute of; empty: the module itself.
        name: of the attribute.
        rtx_only: whether the class was named as one of TensorRT for RTX.
    """

    where: str
    cls: str
    name: str
    rtx_only: bool


class Found(NamedTuple):
    """What a file uses.

    Attributes:
        uses: with known classes.
        unknown: (where, attribute name) of what nothing is known of.
    """

    uses: list[Use]
    unknown: list[tuple[str, str]]


def find_uses(path: Path) -> Found:
    """All uses in a file."""
    reader = _Reader(path)
    reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    return Found(reader.uses, reader.unknown)


class _Reader(ast.NodeVisitor):
    """Scopes are functions and classes; attributes of `self` are the class's."""

    def __init__(self, path: Path) -> None:
        self.uses: list[Use] = []
        self.unknown: list[tuple[str, str]] = []
        self._file = path.name
        self._scopes: list[dict[str, tuple[str, str]]] = [{}]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        scope = {}
        for inner in ast.walk(node):
            if isinstance(inner, ast.AnnAssign) and (vendor := _vendor_class(inner.annotation)):
                scope[ast.unparse(inner.target)] = vendor
        self._scopes.append(scope)
        self.generic_visit(node)
        self._scopes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope = {}
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            if argument.annotation is not None and (vendor := _vendor_class(argument.annotation)):
                scope[argument.arg] = vendor
        for inner in ast.walk(node):
            if isinstance(inner, ast.AnnAssign) and (vendor := _vendor_class(inner.annotation)):
                scope[ast.unparse(inner.target)] = vendor
        self._scopes.append(scope)
        self.generic_visit(node)
        self._scopes.pop()

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """`for x in xs`, xs annotated as a list of a vendor's class: x is one of it, from here on."""
        known = self._class_of(node.iter)
        if known is not None:
            self._scopes[-1][ast.unparse(node.target)] = known
        self.generic_visit(node)

    visit_For = visit_comprehension  # type: ignore[assignment]

    def visit_SetComp(self, node: Any) -> None:
        """Generators first: what they bind is used in the element."""
        for generator in node.generators:
            self.visit(generator)
        self.generic_visit(node)

    visit_ListComp = visit_DictComp = visit_GeneratorExp = visit_SetComp

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        where = f"{self._file}:{node.lineno}"
        text = ast.unparse(node.value)
        if text in VENDORS or _is_module(node.value):
            self.uses.append(Use(where, "", node.attr, text == "tensorrt_rtx"))
        elif isinstance(node.value, ast.Attribute) and _is_module(node.value.value):
            self.uses.append(Use(where, node.value.attr, node.attr, False))
        elif text in OWN:
            return
        elif (known := self._class_of(node.value)) is not None:
            vendor, cls = known
            self.uses.append(Use(where, cls, node.attr, vendor == "tensorrt_rtx"))
        else:
            self.unknown.append((where, node.attr))

    def _class_of(self, node: ast.expr) -> tuple[str, str] | None:
        text = ast.unparse(node)
        return next((scope[text] for scope in reversed(self._scopes) if text in scope), None)


def _is_module(node: ast.expr) -> bool:
    return ast.unparse(node).rpartition(".")[2] in ("trt", "_trt")


def _vendor_class(annotation: ast.expr) -> tuple[str, str] | None:
    """`tensorrt.X`, `tensorrt.X | None` or `list[tensorrt.X]` → (`tensorrt`, `X`)."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in VENDORS:
            return node.value.id, node.attr
    return None


# ---------------------------------------------------------------- against a module


def complaints(module: Any, uses: list[Use]) -> Iterator[str]:
    """What of this is not in the module, or deprecated there."""
    for use in uses:
        owner = getattr(module, use.cls, None) if use.cls else module
        full = f"{use.cls}.{use.name}" if use.cls else use.name
        if owner is None:
            yield f"{use.where}: no {use.cls}"
        elif not hasattr(owner, use.name):
            yield f"{use.where}: no {full}"
        elif is_deprecated(owner, use.name):
            yield f"{use.where}: {full} is deprecated"


def is_deprecated(owner: Any, name: str) -> bool:
    """By its own documentation, or by the line of its class's that is about it."""
    value = getattr(owner, name)
    own = (value.__doc__ or "").strip()
    if isinstance(value, type):  # behind that come its members
        own = own[: len("[DEPRECATED]")]
    members = getattr(owner, "__members__", {})
    listed = re.search(rf"^\s*(?::ivar )?{name}\s*:([^\n]*(?:\n\s+\[DEPRECATED\])?)", owner.__doc__ or "", re.MULTILINE)
    about = listed[1] if listed else ""
    return "[DEPRECATED]" in about or (name not in members and "[DEPRECATED]" in own)


def names(module: Any) -> list[str]:
    """Attribute names of all classes that nobody else would choose: two words at least."""
    found = set()
    for cls in vars(module).values():
        if isinstance(cls, type):
            found |= {name for name in vars(cls) if "_" in name.strip("_") and not name.startswith("_")}
    return sorted(found)


def main() -> None:
    """See the module's documentation."""
    module = importlib.import_module(sys.argv[1])
    uses = [Use(*use) for use in json.load(sys.stdin)]
    print(
        json.dumps(
            {"version": module.__version__, "complaints": list(complaints(module, uses)), "names": names(module)}
        )
    )


if __name__ == "__main__":
    main()
