"""Results → tables: what is computed, and that nothing else of a page changes."""

from __future__ import annotations

from pathlib import Path

import click
import make_docs
import msgspec
import pytest
import tables
from record import PeerRow, Peers, Quality, QualityRow, Run, Speed, SpeedRow, read_results, write_result

from lemica_trt.cli.command import Flag
from lemica_trt.core.errors import InputError

pytestmark = pytest.mark.null

RUN = Run(
    command="python benchmarks/x.py",
    commit="abc",
    date="2026-01-31",
    system="Linux x86_64",
    processor="A CPU",
    cores=2,
    threads=1,
    load=0.1,
    python="3.11.0",
    versions={"numpy": "2.0"},
)


def _row(method: str, psnr: tuple[float, ...], *, own: bool = False) -> QualityRow:
    ones = (1.0,) * len(psnr)
    return QualityRow(method=method, own=own, full_steps=(0, 2), psnr=psnr, ssim=ones, fine_psnr=psnr, fine_ssim=ones)


QUALITY = Quality(
    run=RUN,
    model="toy",
    revision="0123456789abcdef",
    scheduler="Euler",
    steps=4,
    fine_steps=16,
    guidance_scale=4.0,
    calibration="secant",
    samples=2,
    validation_samples=4,
    first_seed=10,
    uncached_fine_psnr=(50.0, 52.0),
    rows=(
        _row("fitted", (40.0, 50.0), own=True),
        _row("lemica", (30.0, 44.0)),
        _row("DPMSolverMultistepScheduler", (31.0, 33.0)),
        _row("UniPCMultistepScheduler", (35.0, 41.0)),
    ),
)

SPEED = Speed(
    run=RUN,
    model="toy",
    revision=None,
    parameters=1_000_000,
    latent_shape=(2, 4),
    dtype="fp32",
    threads=1,
    backend="onnxruntime 1 cpu",
    steps=4,
    rows=(
        SpeedRow(name="eager", method="", full_steps=4, seconds=(4.0, 8.0, 20.0)),
        SpeedRow(name="uncached", method="", full_steps=4, seconds=(2.0, 4.0, 10.0), full_step=0.5, beyond=0.01),
        SpeedRow(name="b2", method="first-order", full_steps=2, seconds=(1.0, 2.0, 2.0), full_step=0.5, beyond=0.0),
    ),
)
"""A machine that slows down: in every round the runtime takes half the time of eager."""


def _peer(library: str, method: str, setting: str, steps: float, psnr: tuple[float, ...]) -> PeerRow:
    count = len(psnr)
    return PeerRow(
        library=library,
        method=method,
        setting=setting,
        full_steps=(steps,) * count,
        seconds=(1.0, 4.0)[:count],
        uncached_seconds=(2.0, 4.0)[:count],
        psnr=psnr,
        ssim=(0.5,) * count,
        flip=(0.1, 0.3)[:count],
    )


PEERS = Peers(
    run=RUN,
    model="toy",
    revision=None,
    scheduler="Euler",
    steps=50,
    guidance_scale=4.0,
    blocks=6,
    first_seed=10,
    rows=(
        _peer("diffusers", "Some", "a", 9.0, (30.0, 40.0)),
        _peer("diffusers", "Some", "b", 14.0, (20.0, 30.0)),
        _peer("diffusers", "Some", "c", 16.0, (40.0, 44.0)),
        PeerRow(library="diffusers", method="Other", setting="x", refusal="it | cannot"),
        PeerRow(library="diffusers", method="Other", setting="y", refusal="it | cannot"),
        _peer("lemica-trt", "the plan", "B = 10", 10.0, (40.0, 50.0)),
        _peer("lemica-trt", "lemica", "B = 10", 10.0, (33.0, 35.0)),
    ),
)


def test_speedups_are_medians_of_paired_ratios() -> None:
    eager, uncached, plan = SPEED.rows
    assert tables.speedup(uncached, eager) == 2.0
    assert tables.speedup(plan, uncached) == 2.0  # the ratio of the medians would be 2, that of the means 3.2
    swapped = msgspec.structs.replace(plan, seconds=(2.0, 1.0, 2.0))
    assert tables.speedup(swapped, uncached) == 4.0  # the ratio of the medians is still 2
    assert "| runtime, first-order | 2 | 2 s | 4.00× | 2.00× | 500.0 ms |  | +0.0% |" in tables.speed_table(SPEED)


def test_quality_table() -> None:
    table = tables.quality_table(QUALITY)
    assert "| **the plan** (fitted) | 2 | 45.0 / 40.5 / 40.0 | 1.0000 |  | 45.0 / 40.5 |" in table
    assert "| LeMiCa | 2 | 37.0 / 30.7 / 30.0 | 1.0000 | +8.0 [+6.0, +10.0] |" in table


def test_quality_table_has_flip_where_it_was_measured() -> None:
    rows = tuple(msgspec.structs.replace(row, flip=(0.1, 0.3)) for row in QUALITY.rows)
    table = tables.quality_table(msgspec.structs.replace(QUALITY, rows=rows))
    assert "| SSIM | FLIP to 4 steps | the plan's lead, dB |" in table
    assert "| LeMiCa | 2 | 37.0 / 30.7 / 30.0 | 1.0000 | 0.200 / 0.290 / 0.300 | +8.0" in table
    assert "FLIP" not in tables.quality_table(QUALITY)
    with pytest.raises(ValueError, match="one number a clip"):
        msgspec.structs.replace(rows[0], flip=(0.1,))


def test_peers_tables() -> None:
    best = tables.best_settings(PEERS.rows[:3])
    assert [row.setting for row in best] == ["a", "c"], "b takes more and is worse"
    summary = tables.peers_summary(PEERS)
    assert (
        "| diffusers, Some | 35.0 / 30.5 / 30.0 | 35.0 / 30.5 / 30.0 | 42.0 / 40.2 / 40.0 | 42.0 / 40.2 / 40.0 |"
        in summary
    )
    assert "| **lemica-trt, the plan** | 45.0 / 40.5 / 40.0 |" in summary and "Other" not in summary
    table = tables.peers_table(PEERS)
    row = (
        "| lemica-trt, LeMiCa | B = 10 | 10.0 | 2.500 s | 1.50× | 34.0 / 33.1 / 33.0 | 0.5000 | 0.200 / 0.290 / 0.300 |"
    )
    assert row in table
    assert "| diffusers, Other | x; y | it \\| cannot |" in table


def test_a_peer_has_numbers_or_a_refusal() -> None:
    with pytest.raises(ValueError, match="numbers or a refusal"):
        PeerRow(library="diffusers", method="Other", setting="x")
    with pytest.raises(ValueError, match="numbers or a refusal"):
        msgspec.structs.replace(PEERS.rows[0], refusal="no")
    with pytest.raises(ValueError, match="one number a clip"):
        msgspec.structs.replace(PEERS.rows[0], ssim=(1.0,))


def test_summary_has_the_best_standard_solver_and_the_speed_of_the_same_model() -> None:
    table = tables.summary_table([QUALITY, SPEED])
    assert "| toy, Euler | 2 of 4 | 2.0× | **45.0 / 40.5** | 37.0 / 30.7 |  | 38.0 / 35.3 (UniPC) |" in table
    other = msgspec.structs.replace(SPEED, model="another")
    assert "| 2 of 4 |  | **45.0" in tables.summary_table([QUALITY, other])
    assert tables.summary_table([SPEED]) == ""


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_result(SPEED, tmp_path / "b.json")
    write_result(QUALITY, tmp_path / "a.json")
    assert read_results(tmp_path) == [QUALITY, SPEED]
    assert '"psnr": [ 40.0, 50.0 ]' in (tmp_path / "a.json").read_text()


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"kind": "speed"}')
    with pytest.raises(InputError, match=r"a\.json: expected a valid"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="one number a round"):
        msgspec.structs.replace(SPEED, rows=(*SPEED.rows[:2], msgspec.structs.replace(SPEED.rows[2], seconds=(1.0,))))


def test_only_generated_parts_change() -> None:
    page = (
        "a\n<!-- make_docs: quality -->\nold\n<!-- /make_docs -->\nb\n<!-- make_docs: speed -->\n<!-- /make_docs -->\n"
    )
    made = make_docs.rendered(page, [QUALITY])
    assert made.startswith("a\n<!-- make_docs: quality -->\n\ntoy (revision 0123456789ab)")
    assert made.endswith("<!-- /make_docs -->\nb\n<!-- make_docs: speed -->\n<!-- /make_docs -->\n")
    assert "old" not in made
    assert make_docs.rendered(made, [QUALITY]) == made


def test_options_of_a_command() -> None:
    command = click.Command(
        "do",
        params=[
            click.Argument(["target"], required=False),
            click.Option(["--size", "-s"], type=int, default=3, show_default=True, help="How large."),
            Flag(["--kind"], type=click.Choice(["a", "b"]), otherwise="what fits", help="Which."),
            click.Option(["--pool"], metavar="X|Y", help="Of which."),
        ],
        help="Do it.",
    )
    text = "\n".join(make_docs._command("tool do", command))
    assert "tool do [TARGET] [OPTIONS]" in text
    assert "| `--size`, `-s` INTEGER | 3 | How large. | Output |" in text
    assert "| `--kind` a / b | what fits | Which. | Output |" in text
    assert "| `--pool` X\\|Y |  | Of which. | Output |" in text


def test_one_quality_of_a_model_is_the_main_one() -> None:
    """The one with the most steps and the first calibration seed, wherever it stands in the list."""
    other = msgspec.structs.replace(QUALITY, seed=100)
    fewer = msgspec.structs.replace(QUALITY, steps=3)
    found = tables.main_qualities([fewer, other, SPEED, QUALITY, msgspec.structs.replace(QUALITY, model="another")])
    assert [(one.model, one.steps, one.seed) for one in found] == [("another", 4, 0), ("toy", 4, 0)]


def test_the_plan_stands_beside_the_best_other_of_each_score() -> None:
    worse = _row("UniPCMultistepScheduler", (35.0, 61.0))
    result = msgspec.structs.replace(QUALITY, flow_shift=5.0, rows=(*QUALITY.rows[:3], worse))
    line = tables.standing_table([result]).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["toy, guidance 4, shift 5", "2 of 4", "0", "45.0 / 40.5 / 40.0"]
    assert cells[4] == "-3.0 [-11.0, +5.0] (UniPC, B steps)"  # within the interval
    assert cells[5].startswith("+4.2 ") and cells[5].endswith("(UniPC, B steps)")
    assert cells[6] == "+5.0 (UniPC, B steps)"
    behind = msgspec.structs.replace(QUALITY, rows=(*QUALITY.rows[:3], _row("UniPCMultistepScheduler", (51.0, 61.0))))
    cells = [cell.strip() for cell in tables.standing_table([behind]).splitlines()[-1].strip("|").split("|")]
    assert cells[4] == "**-11.0 [-11.0, -11.0] (UniPC, B steps)**"
