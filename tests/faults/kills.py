"""Recovery by numbers: one kill in each of many runs, a storm of kills in one run, and what it costs to be ready.

    python tests/faults/kills.py single [--runs 100] [--seed 1]     4 ranks + 1 spare, one kill at a random moment each
    python tests/faults/kills.py storm [--every 15] [--minutes 15]  4 ranks and a spare for each kill, in one run
    python tests/faults/kills.py cost [--pairs 9] [--steps 600]     2 ranks with and without copies, watch and guards

The model is that of configs/quickstart.toml. Prints Markdown. A victim is any rank, 0 included, with equal chances;
in a storm the processes that are ranks at the moment. Each run of `single` must end with the weights, moments and
metrics of a run without a kill.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcpipe.chaos.oracle import Reference, judge_bits, judge_leftovers
from hpcpipe.chaos.running import Running
from hpcpipe.chaos.seen import Seen

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart.toml"
NUM_RANKS = 4
POLL_S = 0.001
LIMIT_S = 120.0
QUIET = ("train.sample_tokens=0", "data.validation_samples=16", "telemetry.console=quiet", "parallel.lanes=4")
FIRST_STEP = 20


class Log:
    """The objects of a log that grows, or is replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._state: tuple[int, int] | None = None
        self.rows: list[dict[str, Any]] = []

    def has_changed(self) -> bool:
        """Read the log again if it is not what it was."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return False
        if (found.st_ino, found.st_size) == self._state:
            return False
        self._state = (found.st_ino, found.st_size)
        lines = self._path.read_text(errors="replace").split("\n")[:-1]
        self.rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                self.rows.append(json.loads(line))
        return True


@dataclass
class Kill:
    """What one kill did."""

    number: int
    victim: int
    recovered_s: float = float("nan")
    next_step_s: float = float("nan")
    lost_steps: int = -1
    source: str = ""


class Run:
    """A run of the quickstart, and its logs."""

    def __init__(self, root: Path, name: str, num_ranks: int, num_spares: int, settings: Sequence[str]) -> None:
        self.directory = root / "runs" / name
        shutil.rmtree(self.directory, ignore_errors=True)
        self._output = root / "output" / name
        shutil.rmtree(self._output, ignore_errors=True)
        self._output.mkdir(parents=True)
        words = [sys.executable, "-m", "hpcpipe", "launch", "-n", str(num_ranks)]
        words += ["--spares", str(num_spares)] if num_spares else []
        words += ["train", str(CONFIG)]
        for setting in (f"run.dir={root / 'runs'}", f"run.name={name}", *QUIET, *settings):
            words += ["--set", setting]
        self.running = Running(words, self._output, {})
        self.metrics, self.events = Log(self.directory / "metrics.jsonl"), Log(self.directory / "events.jsonl")

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [row for row in self.metrics.rows if "loss" in row]

    @property
    def num_recovered(self) -> int:
        return sum(row["event"] == "recovered" for row in self.events.rows)

    def is_running(self) -> bool:
        return self.running.process.poll() is None

    def look(self) -> None:
        time.sleep(POLL_S)
        self.metrics.has_changed()
        self.events.has_changed()

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is done."""
        while self.is_running() and not (self.steps and self.steps[-1]["step"] >= step):
            self.look()

    def ranks(self) -> dict[int, int]:
        """Return the processes of the launch that run, by number."""
        processes = self.running.processes()
        return {each.number: each.pid for each in processes if each.kind == "rank" and each.number is not None}

    def kill(self, number: int) -> Kill:
        """Kill a process, and measure until the first step after the recovery."""
        kill = Kill(number, number)
        pid, before, num_recovered = self.ranks()[number], len(self.steps), self.num_recovered
        os.kill(pid, signal.SIGKILL)
        start_s = time.monotonic()
        while self.is_running() and self.num_recovered == num_recovered and time.monotonic() - start_s < LIMIT_S:
            self.look()
        if self.num_recovered == num_recovered:
            return kill
        kill.recovered_s = time.monotonic() - start_s
        event = [row for row in self.events.rows if row["event"] == "recovered"][-1]
        kill.lost_steps, kill.source = int(event.get("lost_steps", -1)), str(event.get("source", ""))
        # Rows of lost steps are dropped by now, or will be before the next one is written.
        self.metrics.has_changed()
        before = len(self.steps)
        while self.is_running() and len(self.steps) <= before and time.monotonic() - start_s < LIMIT_S:
            before = min(before, len(self.steps))
            self.look()
        if len(self.steps) > before:
            kill.next_step_s = time.monotonic() - start_s
        return kill

    def end(self, limit_s: float = LIMIT_S) -> Seen:
        """Wait for the end, and return what was seen."""
        start_s = time.monotonic()
        while self.is_running() and time.monotonic() - start_s < limit_s:
            self.running.look()
            time.sleep(0.02)
        code = self.running.process.poll()
        stray = self.running.wait_until_alone(10.0) if code is not None else []
        self.running.kill()
        self.look()
        shared = [path for path in self.running.shared if path.exists()]
        return Seen(self.directory, code, self.running.elapsed_s, 0.0, self.running.output, stray, shared)


@contextlib.contextmanager
def running(*args: Any) -> Iterator[Run]:
    """Give a run that is killed at the end of the block, if it still runs."""
    run = Run(*args)
    try:
        yield run
    finally:
        run.running.kill()


def median_step_s(rows: Sequence[dict[str, Any]]) -> float:
    return statistics.median(row["step_s"] for row in rows)


def percent(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def single(args: argparse.Namespace, root: Path) -> bool:
    """Kill one rank in each of many runs."""
    settings = (
        f"train.steps={args.steps}",
        f"train.decay_steps={args.steps}",
        "checkpoint.every=100",
        "checkpoint.keep=0",
    )
    with running(root, "reference", 1, 0, settings) as run:
        seen = run.end(600)
        assert seen.code == 0, seen.output
        reference = Reference.of(seen)
    with running(root, "quiet", NUM_RANKS, 1, settings) as run:
        seen = run.end()
        assert seen.code == 0, seen.output
        step_s = median_step_s(run.steps[FIRST_STEP:])
    print(f"step without a kill: {step_s * 1e3:.1f} ms (median of {args.steps - FIRST_STEP})", file=sys.stderr)
    numbers = random.Random(args.seed)
    kills, failures = [], []
    for index in range(args.runs):
        victim, after = numbers.randrange(NUM_RANKS), numbers.randint(FIRST_STEP, args.steps - 60)
        with running(root, "killed", NUM_RANKS, 1, settings) as run:
            run.wait_for_step(after)
            time.sleep(numbers.uniform(0, 2 * step_s))
            if not run.is_running() or victim not in run.ranks():
                failures.append(f"run {index}: over before the kill")
                continue
            kill = run.kill(victim)
            seen = run.end()
        problems = [] if seen.code == 0 else [f"exit code {seen.code}"]
        problems += judge_leftovers(seen) + judge_bits(seen, reference)
        problems += [] if kill.next_step_s == kill.next_step_s else ["no recovery was seen"]
        kills.append(kill)
        failures += [f"run {index}, process {victim}, step {after}: {problem}" for problem in problems]
        if problems:
            kept = root / f"kept-{index}"
            shutil.copytree(seen.directory, kept / "run", dirs_exist_ok=True)
            shutil.copytree(root / "output" / "killed", kept / "output", dirs_exist_ok=True)
        verdict = f"FAILED: {'; '.join(problems)}" if problems else "same bits"
        print(
            f"{index + 1}/{args.runs} process {victim} after step {after}: recovered {kill.recovered_s * 1e3:.0f} ms,"
            f" next step {(kill.next_step_s - step_s) * 1e3:.0f} ms beyond a step, {kill.lost_steps} lost, {verdict}",
            file=sys.stderr,
            flush=True,
        )
    tell_kills(kills, failures, step_s)
    return not failures


def tell_kills(kills: Sequence[Kill], failures: Sequence[str], step_s: float) -> None:
    """Print the distribution of many kills."""
    good = [kill for kill in kills if kill.next_step_s == kill.next_step_s]
    lost = [kill.lost_steps for kill in good]
    print(
        f"\n{len(good)} of {len(kills)} kills recovered; {len(failures)} problems; a step takes {step_s * 1e3:.1f} ms"
    )
    if not good:
        return
    per_victim = {number: sum(kill.victim == number for kill in good) for number in range(NUM_RANKS)}
    print(f"victims: {', '.join(f'{count} x process {number}' for number, count in per_victim.items())}")
    print(f"steps lost: {', '.join(f'{lost.count(number)} x {number}' for number in sorted(set(lost)))}\n")
    print("| seconds from the kill | least | median | p90 | p99 | worst |\n|---|---|---|---|---|---|")
    until_event = [kill.recovered_s for kill in good]
    beyond = [kill.next_step_s - step_s for kill in good]
    for name, values in (("until the recovery is told", until_event), ("until the next step, beyond a step", beyond)):
        figures = (min(values), statistics.median(values), percent(values, 0.9), percent(values, 0.99), max(values))
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in figures)} |")
    for failure in failures:
        print(f"- {failure}")


def storm(args: argparse.Namespace, root: Path) -> bool:
    """Kill ranks of one run at regular intervals."""
    num_kills = int(args.minutes * 60 / args.every)
    spares = args.spares or num_kills + 2
    settings = ("train.steps=1000000", "train.decay_steps=1000000", "train.eval_every=0", "recovery.max_attempts=10")
    numbers = random.Random(args.seed)
    with running(root, "storm", NUM_RANKS, spares, settings) as run:
        start_s = time.monotonic()
        run.wait_for_step(FIRST_STEP)
        print(f"{NUM_RANKS} + {spares} processes took {time.monotonic() - start_s:.0f} s to start", file=sys.stderr)
        # What a step takes with as many spares and no kill.
        first, begin_s = run.steps[-1]["step"], time.monotonic()
        while run.is_running() and time.monotonic() - begin_s < args.calm:
            time.sleep(0.1)
        run.look()
        step_s = (time.monotonic() - begin_s) / max(1, run.steps[-1]["step"] - first)
        first, begin_s, kills = run.steps[-1]["step"], time.monotonic(), []
        for index in range(num_kills):
            while run.is_running() and time.monotonic() - begin_s < (index + numbers.random()) * args.every:
                time.sleep(0.01)
            active = active_processes(run)
            if not run.is_running() or not active:
                break
            kills.append(run.kill(numbers.choice(active)))
            print(f"kill {index + 1}: {kills[-1]}", file=sys.stderr, flush=True)
        while run.is_running() and time.monotonic() - begin_s < num_kills * args.every:
            time.sleep(0.05)
        run.look()
        wall_s, steps = time.monotonic() - begin_s, run.steps[-1]["step"] - first
        is_alive = run.is_running()
    print(f"\na kill every {args.every:g} s for {wall_s / 60:.1f} min, {NUM_RANKS} ranks + {spares} spares")
    print(f"step without kills {step_s * 1e3:.2f} ms (over {args.calm:g} s); {steps} steps in {wall_s:.1f} s")
    print(f"**effective training time {steps * step_s / wall_s:.1%}**; still running at the end: {is_alive}")
    tell_kills(kills, [], step_s)
    return is_alive


def active_processes(run: Run) -> list[int]:
    """Return the processes that are ranks now: at first the lowest, later as the last recovery says."""
    run.look()
    told = [row for row in run.events.rows if row["event"] == "recovered" and "processes" in row]
    alive = run.ranks()
    return [number for number in (told[-1]["processes"] if told else range(NUM_RANKS)) if number in alive]


WITHOUT = {
    "nothing": ("recovery.copy_every=0", "recovery.hang_s=0", "guard.state=false", "guard.messages=false"),
    "copies": ("recovery.copy_every=0",),
    "watch": ("recovery.hang_s=0",),
    "guards": ("guard.state=false", "guard.messages=false", "guard.recompute_every=0"),
}
OFF = (*WITHOUT["nothing"], "guard.recompute_every=0", "guard.spikes=off")


def cost(args: argparse.Namespace, root: Path) -> bool:
    """Compare runs with and without what makes them ready for failures, in turn."""
    sides = {"off": OFF, "all": (), **{f"all but {name}": WITHOUT[name] for name in ("copies", "watch", "guards")}}
    if args.only:
        sides = {name: sides[name] for name in ("off", *args.only.split(","))}
    steps: dict[str, list[float]] = {name: [] for name in sides}
    settings = (f"train.steps={args.steps}", f"train.decay_steps={args.steps}", "checkpoint.every=1000000")
    for pair in range(args.pairs):
        names = list(sides)[:: 1 if pair % 2 else -1]
        for name in names:
            with running(root, "cost", args.ranks, 0, (*settings, *sides[name])) as run:
                seen = run.end(600)
                assert seen.code == 0, seen.output
                steps[name].append(median_step_s(run.steps[FIRST_STEP:]))
        print({name: f"{values[-1] * 1e3:.3f} ms" for name, values in steps.items()}, file=sys.stderr, flush=True)
    print(f"\n{args.ranks} ranks, {args.pairs} rounds of {args.steps} steps each, in turn; medians of a step\n")
    print("| | ms per step | beside off, median of rounds | least | most |\n|---|---|---|---|---|")
    for name, values in steps.items():
        ratios = [value / off - 1 for value, off in zip(values, steps["off"], strict=True)]
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        print(f"| {name} | {statistics.median(values) * 1e3:.3f} | {' | '.join(f'{each:+.2%}' for each in spread)} |")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where runs go, and those that failed stay")
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("single")
    one.add_argument("--runs", type=int, default=100)
    one.add_argument("--steps", type=int, default=200)
    one.add_argument("--seed", type=int, default=1)
    one.set_defaults(run=single)
    many = commands.add_parser("storm")
    many.add_argument("--every", type=float, default=15.0, help="seconds between kills, on average")
    many.add_argument("--minutes", type=float, default=15.0)
    many.add_argument("--spares", type=int, default=0, help="default: two more than there are kills")
    many.add_argument("--calm", type=float, default=20.0, help="seconds without kills, to time a step")
    many.add_argument("--seed", type=int, default=1)
    many.set_defaults(run=storm)
    price = commands.add_parser("cost")
    price.add_argument("--pairs", type=int, default=9)
    price.add_argument("--steps", type=int, default=600)
    price.add_argument("--ranks", type=int, default=2)
    price.add_argument("--only", default="", help="sides beside off, separated by commas")
    price.set_defaults(run=cost)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.dir is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpcpipe-kills-")))
        else:
            args.dir.mkdir(parents=True, exist_ok=True)
            root = args.dir.resolve()
        return 0 if args.run(args, root) else 1


if __name__ == "__main__":
    sys.exit(main())
