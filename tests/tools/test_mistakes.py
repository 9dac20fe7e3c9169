"""Mistakes and their answers; that docs/mistakes.md has them as they are, `test_docs` tests."""

from __future__ import annotations

from pathlib import Path

import mistakes
import pytest

from lemica_trt.cli.failures import FIXES
from lemica_trt.core.errors import EXIT_CODES, INTERNAL_ERROR, IntegrityError

pytestmark = pytest.mark.cpu


def test_every_mistake_gets_one_line_with_a_fix_of_its_own_and_a_documented_exit_code() -> None:
    before = Path.cwd()
    found = [answer for answers in mistakes.answers().values() for answer in answers]
    assert len(found) >= 40 and Path.cwd() == before
    general = {fix for kind, fix in FIXES.items() if "{" not in fix and kind is not IntegrityError}
    for answer in found:
        (line,) = answer.lines
        assert answer.exit_code in EXIT_CODES and answer.exit_code != INTERNAL_ERROR, answer
        what, arrow, fix = line.partition(" → ")
        assert what.startswith("lemica-trt: ") and arrow and fix not in general, answer
        assert "/tmp" not in line and "Traceback" not in line, answer
    assert {answer.exit_code for answer in found} >= {2, 3, 4, 5, 6}
    assert sum("--help'" in answer.lines[0] for answer in found) <= 3


def test_a_table_is_markdown() -> None:
    assert mistakes._cell("lemica-trt: a|b <c> *d* e_f → g") == "a\\|b \\<c> \\*d\\* e\\_f → g"
