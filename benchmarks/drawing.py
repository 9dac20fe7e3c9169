"""How well the bundled models draw: which words of held-out prompts their clips show.

    python benchmarks/drawing.py --clips 24 --output benchmarks/results/drawing.json

Clips come from the diffusers pipelines as they are, uncached. What one shows is read from its pixels by `read_clip` of
`tools/shapes.py`, which reads clips that the world itself drew without a mistake (`tests/tools/test_shapes.py`). Writes
JSON (`record.Drawing`) and prints its table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from record import Drawing, DrawingRow, this_run, write_result
from tables import described

from lemica_trt.core.progress import reporter
from lemica_trt.evaluate.samples import HELD_OUT_SEED
from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.models.load import revision_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import shapes
from train_tiny import RECIPES, STEPS, Recipe, drawn_by

BUNDLED = [name for name in RECIPES if zoo_path(name).exists()]


def measure(recipe: Recipe, count: int) -> DrawingRow:
    """Draw and read `count` clips of one model."""
    prompts = [str(caption) for caption in shapes.captions_of("held_out", recipe.captions)]
    asked = tuple(prompts[i % len(prompts)] for i in range(count))
    clips = drawn_by(recipe, zoo_path(recipe.name), asked, HELD_OUT_SEED)
    return DrawingRow(
        model=recipe.name,
        revision=revision_of(load_profile(recipe.name)),
        guidance_scale=recipe.arguments["guidance_scale"],
        asked=asked,
        shown=tuple(str(shapes.read_clip(clip)) for clip in clips),
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--models", nargs="+", choices=tuple(RECIPES), default=BUNDLED)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    run, report, rows = this_run(), reporter(), []
    for name in given.models:
        report.stage("draw", name)
        rows.append(measure(RECIPES[name], given.clips))
    report.close()
    result = Drawing(run=run, steps=STEPS, first_seed=HELD_OUT_SEED, rows=tuple(rows))
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
