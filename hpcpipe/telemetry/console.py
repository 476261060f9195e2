"""What a person sees: a progress bar on a terminal, one line per step elsewhere."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hpcpipe.cluster.environment import rank_hint, terminal_size

_SMOOTHING = 0.1


class Console:
    """Rank 0's voice; the other ranks have a quiet one.

    Parameters
    ----------
    mode : str
        ``auto``, ``terminal``, ``lines`` or ``quiet``; ``auto`` is ``terminal`` where one shows the output.
    """

    def __init__(self, mode: str) -> None:
        size = terminal_size()
        if mode == "auto":
            shows = sys.stdout.isatty() if rank_hint() is None else size is not None
            mode = "terminal" if shows else "lines"
        self._mode = mode
        self._rich = _Rich(
            file=sys.stdout,
            force_terminal=True if mode == "terminal" else None,
            width=size[0] if size else None,
            highlight=False,
        )
        self._progress: Progress | None = None
        self._mean_step_s = 0.0

    def say(self, text: str) -> None:
        """Show a line of text."""
        if self._mode == "quiet":
            return
        with _unless_lost():
            if self._mode == "terminal":
                self._rich.print(text, markup=False, soft_wrap=True)
            else:
                sys.stdout.write(text + "\n")
                sys.stdout.flush()

    def log(self, text: str) -> None:
        """Show a line for a log file; a terminal keeps to its progress bar."""
        if self._mode == "lines":
            self.say(text)

    def start(self, steps: int, done: int) -> None:
        """Begin to show progress."""
        self._steps = steps
        if self._mode != "terminal":
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._rich,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task("steps", total=steps, completed=done, numbers="")
        with _unless_lost():
            self._progress.start()

    def step(self, row: dict[str, Any]) -> None:
        """Show a step."""
        if self._progress is not None:
            numbers = (
                f"loss {_number(row['loss'], '.4f')}  {row['tokens_per_s']:,.0f} tokens/s  bubble {row['bubble']:.0%}"
            )
            with _unless_lost():
                self._progress.update(self._task, completed=row["step"], numbers=numbers)
            return
        self._mean_step_s += (row["step_s"] - self._mean_step_s) * (_SMOOTHING if self._mean_step_s else 1.0)
        left_s = (self._steps - row["step"]) * self._mean_step_s
        self.say(
            f"step {row['step']:>{len(str(self._steps))}}/{self._steps}  loss {_number(row['loss'], '.4f')}"
            f"  grad norm {_number(row['grad_norm'], '.3f')}  learning rate {row['learning_rate']:.2e}"
            f"  {row['tokens_per_s']:,.0f} tokens/s  MFU {row['mfu']:.0%}  bubble {row['bubble']:.0%}"
            f"  left {int(left_s) // 60}:{int(left_s) % 60:02d}"
        )

    def stop(self) -> None:
        """End the progress display."""
        if self._progress is not None:
            with _unless_lost():
                self._progress.stop()
            self._progress = None


def _number(value: float | None, form: str) -> str:
    """Show a number that was not finite where it is missing."""
    return "not finite" if value is None else format(value, form)


class _Rich(RichConsole):
    """Text with colours; a reader that has gone does not end the program."""

    def on_broken_pipe(self) -> None:
        """Let the caller of this know: the exception is being handled."""
        raise


@contextlib.contextmanager
def _unless_lost() -> Iterator[None]:
    """Run a block that shows something, and show nothing from then on if nobody takes it."""
    try:
        yield
    except OSError as error:
        _lose_output(error)


def _lose_output(error: OSError) -> None:
    """Drop all further text; a run whose reader has gone is asked to stop, as `hpcpipe launch` asks it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError) and callable(signal.getsignal(signal.SIGUSR1)):
        signal.raise_signal(signal.SIGUSR1)
