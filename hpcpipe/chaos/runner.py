"""Carries rows of the matrix out: starts the run, does to it what the row says, and has the oracle judge it."""

import shlex
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcpipe.chaos.oracle import Reference, judge_bits, judge_end
from hpcpipe.chaos.row import FULL_DISK, Act, Expected, Repetition, Row
from hpcpipe.chaos.running import Running
from hpcpipe.chaos.seen import Seen
from hpcpipe.chaos.setting import NUM_MICROBATCHES, PACE, Setting
from hpcpipe.errors import ExitCode, RankError
from hpcpipe.faults.parse import VARIABLE
from hpcpipe.telemetry.metrics import last_step

_POLL_S = 0.005
_STRAY_S = 10.0
_REFERENCE_LIMIT_S = 600.0
_FOLDER = "HPCPIPE_CHAOS_FOLDER"
"""Variable with a folder that is the run's own, for the shell before it."""


@dataclass(frozen=True)
class Result:
    """What became of one repetition of a row.

    Attributes
    ----------
    row : Row
    repetition : int
    seen : str
        What was seen, in words.
    problems : list of str
        What is not as expected; empty: the row has held.
    recover_s : list of float
        Seconds of each recovery, by the run's own account.
    elapsed_s : float
        Seconds of the whole repetition.
    directory : Path or None
        The run directory, where it is kept.
    """

    row: Row
    repetition: int
    seen: str
    problems: list[str]
    recover_s: list[float]
    elapsed_s: float
    directory: Path | None

    @property
    def is_good(self) -> bool:
        """Whether the row has held."""
        return not self.problems


@dataclass
class Runner:
    """Runs rows one after the other, and what they are compared with once.

    Attributes
    ----------
    setting : Setting
        Where runs are, and what they train; made.
    """

    setting: Setting
    _references: dict[tuple[str, ...], Reference] = field(default_factory=dict)

    def run(self, row: Row, index: int) -> Result:
        """Run a repetition of a row.

        Raises
        ------
        RankError
            The run without a fault, which it would be compared with, has failed.
        """
        start_s = time.monotonic()
        repetition, expected = Repetition.of(row, index, NUM_MICROBATCHES), row.expected
        settings = tuple(repetition.fill(setting) for setting in row.settings)
        wanted = None if expected.bits == "none" else self._reference(settings, repetition.fill(row.twin))
        name = f"row-{row.name}-{index}"
        injected = {**PACE, **row.environ, VARIABLE: repetition.fill(row.inject)}
        seen = self._launch(name, row, settings, injected, repetition)
        problems, final = judge_end(seen, expected, row.limit_s), seen
        if expected.bits == "restart" and seen.code is not None:
            final = self._launch(name, _without_fault(row), settings, {}, repetition, is_again=True)
            again = judge_end(final, Expected("done"), row.limit_s)
            problems += [f"run again without the fault: {problem}" for problem in again]
        if wanted is not None and final.code == ExitCode.DONE:
            problems += judge_bits(final, wanted, keeps_metrics=expected.keeps_metrics)
        recoveries = [float(event["seconds"]) for event in seen.events("recovered") if "seconds" in event]
        words = _describe(seen, final, wanted is not None and final.code == ExitCode.DONE and not problems)
        if not problems:
            shutil.rmtree(seen.directory, ignore_errors=True)
        kept = seen.directory if problems else None
        return Result(row, index, words, problems, recoveries, time.monotonic() - start_s, kept)

    def _reference(self, settings: Sequence[str], twin: str) -> Reference:
        """Return the bits of a run on one rank, with the twin's faults or without any."""
        kept = [setting for setting in settings if not setting.startswith("parallel.")]
        key = (twin, *kept)
        if key not in self._references:
            name = f"reference-{len(self._references)}"
            shutil.rmtree(self.setting.directory(name), ignore_errors=True)
            environ = {VARIABLE: twin} if twin else {}
            # A fault may let a run write a checkpoint after any step.
            command = self.setting.command(name, 1, settings=(*kept, "checkpoint.every=1"))
            seen = self._observe(name, command, environ, _REFERENCE_LIMIT_S)
            if seen.code != ExitCode.DONE or seen.problems:
                raise RankError(f"the run without a fault ended with {seen.code}: {seen.output[-2000:]}")
            self._references[key] = Reference.of(seen)
        return self._references[key]

    def _launch(
        self,
        name: str,
        row: Row,
        settings: Sequence[str],
        environ: Mapping[str, str],
        repetition: Repetition,
        *,
        is_again: bool = False,
    ) -> Seen:
        """Start the run of a row, and see it to its end."""
        grid = (f"parallel.pipeline={row.pipeline}", f"parallel.data={row.data}")
        num_ranks = row.pipeline * row.data
        command = self.setting.command(name, num_ranks, row.spares, (*grid, *settings), row.options)
        if not is_again:
            shutil.rmtree(self.setting.directory(name), ignore_errors=True)
        if row.before:
            command = ["/bin/sh", "-c", f'{row.before}\nexec "$0" "$@"', *command]
        if row.is_alone:
            command = ["unshare", "--mount", *command]
        output = f"{name}-again" if is_again else name
        return self._observe(name, command, environ, row.limit_s, row.acts, repetition.step, output)

    def _observe(
        self,
        name: str,
        command: Sequence[str],
        environ: Mapping[str, str],
        limit_s: float,
        acts: Sequence[Act] = (),
        step: int = 0,
        output: str = "",
    ) -> Seen:
        """Run a command to its end or its limit."""
        directory, folder = self.setting.directory(name), self.setting.root / "output" / (output or name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "command").write_text(f"{shlex.join(command)}\n{dict(environ)}\n")
        running = Running(command, folder, {**environ, _FOLDER: str(folder)})
        pending, problems, acted_s = list(acts), [], running.start_s
        try:
            while running.process.poll() is None and running.elapsed_s < limit_s:
                running.look()
                if pending and last_step(directory / "metrics.jsonl") >= (pending[0].step or step):
                    act = pending.pop(0)
                    try:
                        _do(act, running, directory, folder)
                    except (LookupError, OSError) as error:
                        problems.append(f"{act.do} to {act.to}: {error}")
                    acted_s = time.monotonic()
                time.sleep(_POLL_S)
            code, elapsed_s = running.process.poll(), running.elapsed_s
            end_s = time.monotonic() - acted_s
            problems += [f"{act.do} to {act.to} was not done: the run was over" for act in pending]
            stray = running.wait_until_alone(_STRAY_S) if code is not None else []
        finally:
            running.kill()
        shared = sorted(path for path in running.shared if path.exists()) if code is not None else []
        return Seen(directory, code, elapsed_s, end_s, running.output, stray, shared, problems)


def _do(act: Act, running: Running, directory: Path, folder: Path) -> None:
    """Do something to a run."""
    if act.do in ("remove", "fill"):
        path = directory / act.to
        path.unlink()
        if act.do == "fill":
            path.symlink_to(folder / FULL_DISK / act.to)
    else:
        running.signal(act.to, signal.Signals[act.do])


def _without_fault(row: Row) -> Row:
    """Return what is run again after a row."""
    return Row(
        row.name, row.fault, row.when, Expected("done"), pipeline=row.pipeline, data=row.data, limit_s=row.limit_s
    )


def _describe(seen: Seen, final: Seen, has_same_bits: bool) -> str:
    """Say what was seen."""
    facts = ["killed at its limit" if seen.code is None else f"exit {seen.code}"]
    for event in seen.events("recovered"):
        lost = event.get("lost_steps")
        steps = "" if lost is None else f", {lost} {'step' if str(lost) == '1' else 'steps'} lost"
        facts.append(f"recovered in {float(event.get('seconds', 'nan')):.3f} s{steps}")
    if final is not seen:
        facts.append(f"then exit {final.code}")
    return "; ".join([*facts, "same bits"] if has_same_bits else facts)
