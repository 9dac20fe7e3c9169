"""Caches of other libraries on a diffusers pipeline, and our plans on the same, in one run.

    make peers
    lemica-trt build --model cogvideox-tiny --budget 15,10,20,25 --output out/quality
    OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/peers/run.py out/quality \\
        --output benchmarks/results/peers-cogvideox-tiny.json

Every method is put on a pipeline of its own by its library's one line, and runs the same held-out clips in PyTorch.
Clip by clip all settings run once, every other clip in reverse, and before the settings of each method an uncached run:
its time is what all of them are compared with. What a method costs is counted, too: the work of the transformer's
blocks (`peer.WorkCounter`). A method that refuses the model, or that runs every step in full, is a row that says so.

Writes JSON (`record.Peers`) after each clip, so that a run that is ended early keeps what it measured, and prints its
table.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from peer import Peer, Task, WorkCounter, peers, warnings_of
from record import LIBRARIES, PeerRow, Peers, Run, this_run, write_result
from tables import described

from lemica_trt.bundle.reading import Bundle
from lemica_trt.calibrate.prompts import read_prompts
from lemica_trt.core.metrics import Frames, psnr, ssim
from lemica_trt.core.progress import reporter
from lemica_trt.evaluate.kept import seen_flip
from lemica_trt.evaluate.samples import HELD_OUT_SEED, Samples, held_out_samples
from lemica_trt.ir.resources import calibration_path
from lemica_trt.models import load_model


@dataclass
class Way:
    """A setting on its pipeline, and what was measured of it; `peer` None: the uncached run."""

    peer: Peer | None
    setting: str
    pipeline: Any
    counter: WorkCounter
    numbers: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def run(self, task: Task, prompt: str, seed: int) -> tuple[Frames, float]:
        """Frames, and seconds of CPU: all in one thread, so that other processes do not count."""
        embeds, noise = task.model.embed([prompt]), task.model.noise(seed)[None]
        self.counter.take()
        with self.counter.attention():
            began = time.process_time()
            latents = task.call(self.pipeline, embeds, noise)
            seconds = time.process_time() - began
        frames: Frames = task.model.decode(latents)[0].cpu().numpy()
        return frames, seconds


def one_line(error: Exception) -> str:
    """The message of a refusal, its first line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def ways_of(peer: Peer, task: Task, work: int) -> tuple[list[Way], list[PeerRow]]:
    """The settings of a peer that run, tried once; and rows for those that do not.

    Args:
        work: of an uncached run.
    """
    found, refused = list[Way](), list[PeerRow]()
    try:
        settings = peer.settings(task)
    except Exception as error:  # whatever another library raises
        return [], [PeerRow(library=peer.library, method=peer.method, setting="", refusal=one_line(error))]
    for setting, attach in settings.items():
        pipeline = task.pipeline()
        counter = WorkCounter(task, pipeline)
        refusal = ""
        with warnings_of(peer.library) as warnings:
            try:
                attach(pipeline)
                with counter.attention():
                    task.sample(pipeline, *task.calibration)
            except Exception as error:
                refusal = one_line(error)
        if not refusal and counter.take() >= work:
            refusal = ": ".join(["runs every step in full", *warnings[-1:]])
        if refusal:
            refused.append(PeerRow(library=peer.library, method=peer.method, setting=setting, refusal=refusal))
        else:
            found.append(Way(peer, setting, pipeline, counter))
    return found, refused


def measure_clip(ways: list[Way], task: Task, exact: Frames, work: int, sample: tuple[str, int]) -> None:
    """Run one clip all ways, with an uncached run before each method."""
    uncached, before = ways[0], None
    reference = 0.0
    for way in ways[1:]:
        if way.peer is not before:
            before, reference = way.peer, uncached.run(task, *sample)[1]
        frames, seconds = way.run(task, *sample)
        way.numbers["full_steps"].append(way.counter.take() / work * task.steps)
        way.numbers["seconds"].append(seconds)
        way.numbers["uncached_seconds"].append(reference)
        way.numbers["psnr"].append(psnr(frames, exact))
        way.numbers["ssim"].append(ssim(frames, exact))
        seen = seen_flip(frames, exact)
        if seen is not None:
            way.numbers["flip"].append(seen[0])


def measure(task: Task, samples: Samples, chosen: list[Peer]) -> Iterator[tuple[PeerRow, ...]]:
    """All rows, by peer and setting: after each clip those of the clips so far."""
    report = reporter()
    plain = task.pipeline()
    uncached = Way(None, "", plain, WorkCounter(task, plain))
    uncached.run(task, *task.calibration)
    work, ways, refused = uncached.counter.take(), [uncached], list[PeerRow]()
    for peer in chosen:
        report.stage("attach", f"{peer.library} {peer.method}")
        runs, rows = ways_of(peer, task, work)
        ways, refused = [*ways, *runs], [*refused, *rows]
        for row in rows:
            report.note(f"{row.setting}: {row.refusal}")
    for number in range(samples.count):
        report.stage("clip", f"{number + 1} of {samples.count}, {len(ways) - 1} settings")
        exact, _ = uncached.run(task, *samples[number])
        measure_clip([uncached, *ways[1:][:: -1 if number % 2 else 1]], task, exact, work, samples[number])
        yield rows_of(ways, refused, chosen)
    report.close()


def rows_of(ways: list[Way], refused: list[PeerRow], chosen: list[Peer]) -> tuple[PeerRow, ...]:
    """What was measured and what was refused, in the order of the peers."""
    measured = [
        PeerRow(
            library=way.peer.library,
            method=way.peer.method,
            setting=way.setting,
            **{name: tuple(numbers) for name, numbers in way.numbers.items()},
        )
        for way in ways
        if way.peer is not None
    ]
    order = {(peer.library, peer.method): place for place, peer in enumerate(chosen)}
    return tuple(sorted((*measured, *refused), key=lambda row: order[row.library, row.method]))


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--weights", help="diffusers folder, where the bundle was built from one")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[], help="methods; default: all")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bundle = Bundle.open(given.bundle)
    model = load_model(bundle.manifest.profile, source=given.weights)
    folder = calibration_path(model.profile.calibration.prompts)
    prompts = read_prompts(folder / "calibration.txt")
    task = Task(model, bundle, (prompts[0], model.profile.calibration.seed))
    samples = held_out_samples(read_prompts(folder / "held_out.txt"), given.clips)
    chosen = [peer for peer in peers() if not given.only or peer.method in given.only]
    libraries = [*LIBRARIES, *(["cache-dit"] if importlib.util.find_spec("cache_dit") else [])]
    run = this_run(*libraries)
    for rows in measure(task, samples, chosen):
        result = peers_of(task, run, rows)
        write_result(result, given.output)
    print(described(result))


def peers_of(task: Task, run: Run, rows: tuple[PeerRow, ...]) -> Peers:
    """The result."""
    model = task.model
    return Peers(
        run=run,
        model=model.profile.name,
        revision=task.bundle.manifest.revision,
        scheduler=type(model.pipeline.scheduler).__name__,
        steps=task.steps,
        guidance_scale=model.profile.sampling.guidance_scale,
        blocks=sum(len(getattr(model.pipeline.transformer, name)) for name in model.family.block_lists),
        first_seed=HELD_OUT_SEED,
        rows=rows,
    )


if __name__ == "__main__":
    main()
