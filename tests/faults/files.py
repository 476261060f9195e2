"""Random faults in files and of processes that write them: each must be noticed, and leave a state to go on from.

    python tests/faults/files.py [--count 1000] [--seed S] [--trial N] [--directory DIR]

Prints a table in Markdown and ends with 1 if a trial fails. `--trial` repeats one of a seed; a kill at a random time
comes at another moment then.
"""

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from made import Model, draw_model, load_newest
from support.damage import KINDS, VIEW
from writing import Job

from hpcpipe.checkpoint.layout import candidates, leftovers, step_of
from hpcpipe.checkpoint.retain import retain
from hpcpipe.checkpoint.verify import verify

KILLS = ("writer killed at a random time", "ranks killed at a random time", "writer killed at a system call")
ORDER = (*KINDS, *KILLS, *KILLS, *KILLS)
"""Faults in turn, so that each kind comes equally often, and the kills three times as often."""

_LATEST_KILL_S = 0.3
_SYSTEM_CALLS_AT_MOST = 150
_ATTEMPTS = 50


@dataclass
class Outcome:
    """What one trial showed.

    Attributes
    ----------
    silent : list of str
        Damage that nothing said, or tensors that are not exactly those that were written.
    unloadable : list of str
        Where no state could be loaded, or one that was sound before is not any more.
    took_older, left_unfinished : bool
        Whether an older checkpoint was taken, and whether a kill left something for the next start to remove.
    """

    number: int
    kind: str
    silent: list[str] = field(default_factory=list)
    unloadable: list[str] = field(default_factory=list)
    took_older: bool = False
    left_unfinished: bool = False

    @property
    def failed(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.silent or self.unloadable)


def run_trial(seed: int, number: int, directory: Path) -> Outcome:
    """Make a run of several checkpoints, let one fault happen, and look at what can be loaded.

    Parameters
    ----------
    seed, number : int
        Say what happens.
    directory : Path
        Where the run's directory is made; it is removed.
    """
    draw = random.Random(f"{seed}/{number}")
    outcome = Outcome(number, ORDER[number % len(ORDER)])
    root = directory / f"trial-{number}" / "checkpoints"
    model = draw_model(draw, f"{seed}/{number}")
    try:
        for step, version in _first_steps(draw, outcome.kind):
            model.write(root, step, version)
        (_try_damage if outcome.kind in KINDS else _try_kill)(outcome, model, root, draw)
        _go_on(outcome, model, root, draw)
    except Exception:
        outcome.unloadable.append(traceback.format_exc())
    shutil.rmtree(root.parent)
    return outcome


def _first_steps(draw: random.Random, kind: str) -> Iterator[tuple[int, int]]:
    """Draw steps, and the version of the format of each; the view came with version 2."""
    step = 0
    for _ in range(draw.randint(2, 3)):
        step += draw.randint(1, 9)
        yield step, 2 if kind == "flipped bit in the view" or draw.random() < 0.75 else 1


def _try_damage(outcome: Outcome, model: Model, root: Path, draw: random.Random) -> None:
    """Damage a checkpoint, mostly the newest, and see that it is noticed and that all others are as they were."""
    paths = candidates(root)
    for _ in range(_ATTEMPTS):
        target = paths[0] if draw.random() < 0.75 else draw.choice(paths)
        damaged = KINDS[outcome.kind](target, draw)
        if damaged is not None:
            break
    else:
        raise RuntimeError("nothing could be damaged")
    before = _digests(root)
    for path in paths:
        problems = verify(path)
        if path == target and not problems:
            outcome.silent.append(f"{damaged} is damaged, and verify says nothing")
        if path != target and problems:
            outcome.unloadable.append(f"{path} is sound, and verify says {problems}")
    # A start does not need the view: what is loaded is checked all the same.
    may_load = damaged.name == VIEW
    sound = [path for path in paths if path != target or may_load]
    _load(outcome, model, root, draw, sound[0], [target] if target == paths[0] and not may_load else [])
    outcome.took_older = sound[0] != paths[0]
    if _digests(root) != before:
        outcome.unloadable.append("looking at checkpoints has changed them")


def _try_kill(outcome: Outcome, model: Model, root: Path, draw: random.Random) -> None:
    """Kill a job that writes on, and see that whatever is committed is whole."""
    newest = step_of(candidates(root)[0].name) or 0
    victim = draw.randrange(model.num_writers)
    by_itself = outcome.kind == KILLS[2]
    doomed = (victim, draw.randint(1, _SYSTEM_CALLS_AT_MOST), draw) if by_itself else None
    job = Job(model, root, newest + 1, 10_000, doomed)
    if not by_itself:
        time.sleep(draw.uniform(0, _LATEST_KILL_S))
        job.kill(victim if outcome.kind == KILLS[0] else None)
    if job.wait():
        raise RuntimeError("the job came to its end although it was killed")
    outcome.left_unfinished = bool(list(leftovers(root)))
    paths = candidates(root)
    for path in paths:
        problems = verify(path)
        if problems:
            outcome.unloadable.append(f"{path} was committed, and verify says {problems}")
    if (step_of(paths[0].name) or 0) < newest:
        outcome.unloadable.append(f"step {newest} was there before the kill, now the newest is {paths[0].name}")
    _load(outcome, model, root, draw, paths[0], [])


def _go_on(outcome: Outcome, model: Model, root: Path, draw: random.Random) -> None:
    """Write the next checkpoint as the run would after the fault, and load it."""
    step = (step_of(candidates(root)[0].name) or 0) + draw.randint(1, 3)
    if outcome.kind in KILLS:
        job = Job(model, root, step, 1)
        if not job.wait():
            outcome.unloadable.append("the next job cannot write")
    else:
        retain(root, model.write(root, step), keep=draw.randint(1, 3), keep_best=draw.random() < 0.5)
    if list(leftovers(root)):
        outcome.unloadable.append(f"what was left unfinished is still there: {list(leftovers(root))}")
    _load(outcome, model, root, draw, candidates(root)[0], [])


def _load(outcome: Outcome, model: Model, root: Path, draw: random.Random, expected: Path, refused: list[Path]) -> None:
    """Start again, and compare every bit."""
    found = load_newest(root, draw)
    if found is None:
        outcome.unloadable.append("no checkpoint could be loaded")
        return
    path, loaded, problems = found
    if path != expected or len(problems) != len(refused):
        verdicts = outcome.silent if path in refused else outcome.unloadable
        verdicts.append(f"{path.name} was loaded, not {expected.name}; refused: {problems}")
        return
    for problem, bad in zip(problems, refused, strict=True):
        if str(bad) not in problem:
            outcome.silent.append(f"{bad} was refused without its name: {problem}")
    tensors = model.tensors(step_of(path.name) or 0)
    if loaded.keys() != tensors.keys() or any(not np.array_equal(loaded[key], tensors[key]) for key in tensors):
        outcome.silent.append(f"{path.name} was loaded, and its tensors are not those that were written")


def _digests(root: Path) -> dict[str, str]:
    """Hash every file."""
    files = [file for file in sorted(root.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_campaign(count: int, seed: int, directory: Path, say: Callable[[str], None] = print) -> list[Outcome]:
    """Run many trials, and say which fail and how to repeat them."""
    outcomes = []
    for number in range(count):
        outcome = run_trial(seed, number, directory)
        outcomes.append(outcome)
        if outcome.failed:
            say(f"trial {number} of seed {seed}, {outcome.kind}: repeat it with --seed {seed} --trial {number}")
            for problem in (*outcome.silent, *outcome.unloadable):
                say(f"  {problem}")
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Count the outcomes per kind, in Markdown."""
    lines = [
        "| fault | trials | older checkpoint taken | left unfinished | silent acceptances | nothing loadable |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind in (*KINDS, *KILLS, "all"):
        chosen = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = (
            len(chosen),
            sum(outcome.took_older for outcome in chosen),
            sum(outcome.left_unfinished for outcome in chosen),
            sum(bool(outcome.silent) for outcome in chosen),
            sum(bool(outcome.unloadable) for outcome in chosen),
        )
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--trial", type=int, help="run this trial only")
    parser.add_argument("--directory", type=Path, help="where to make run directories; default: a temporary one")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        if args.trial is None:
            outcomes = run_campaign(args.count, args.seed, Path(name))
        else:
            outcomes = [run_trial(args.seed, args.trial, Path(name))]
            print(outcomes[0])
    print(f"\n{table(outcomes)}\n\n{len(outcomes)} trials in {time.monotonic() - started:.0f} s")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
