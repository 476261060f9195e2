"""The run that faults are tried on: its text, its configuration, its command line."""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcpipe.data.prepare import prepare

NUM_STEPS = 20
NUM_MICROBATCHES = 4
CHECKPOINT_EVERY = 5

_CONFIG = f"""\
[model]
layers = 6
width = 32
heads = 2
context = 24
[data]
file = "{{tokens}}"
validation_fraction = 0.1
validation_samples = 4
[parallel]
microbatches = {NUM_MICROBATCHES}
microbatch_size = 2
lanes = 4
[train]
steps = {NUM_STEPS}
decay_steps = {NUM_STEPS}
warmup_steps = 5
learning_rate = 3e-3
eval_every = 10
sample_tokens = 0
[checkpoint]
every = {CHECKPOINT_EVERY}
keep = 0
when_busy = "wait"
[telemetry]
console = "lines"
"""
_TEXT = (
    "stage rank microbatch schedule bubble stash forward backward gradient weight loss step tensor token moment shard"
)
_NUM_DOCUMENTS = 120

PACE = {"HPCPIPE_TEST_MESSAGES": "delay=0.01"}
"""Steps of some tens of milliseconds that need little of a processor, so that a fault finds them under way."""


@dataclass(frozen=True)
class Setting:
    """Where runs are, and what they train.

    Attributes
    ----------
    root : Path
        Absolute; everything is below it.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The configuration that all runs share."""
        return self.root / "chaos.toml"

    def make(self) -> None:
        """Write text, token file and configuration, unless they are there."""
        folder, tokens = self.root / "text", self.root / "tokens.h5"
        folder.mkdir(parents=True, exist_ok=True)
        numbers, known = random.Random(2), _TEXT.split()
        for index in range(_NUM_DOCUMENTS):
            lines = [" ".join(numbers.choices(known, k=numbers.randint(4, 9))) for _ in range(numbers.randint(2, 9))]
            (folder / f"{index:03d}.txt").write_text(". ".join(lines) + ".\n")
        if not tokens.exists():
            prepare([str(folder)], tokens)
        self.config.write_text(_CONFIG.format(tokens=tokens))

    def directory(self, name: str) -> Path:
        """Return the directory of a run."""
        return self.root / "runs" / name

    def command(
        self,
        name: str,
        num_ranks: int,
        num_spares: int = 0,
        settings: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> list[str]:
        """Return the words of ``hpcpipe launch ... train``.

        Parameters
        ----------
        name : str
            Of the run.
        num_ranks, num_spares : int
            Ranks that train, and those beside them.
        settings : sequence of str
            ``section.key=value`` each.
        options : sequence of str
            Of ``launch``.
        """
        words = [sys.executable, "-m", "hpcpipe", "launch", "-n", str(num_ranks)]
        words += ["--spares", str(num_spares)] if num_spares else []
        words += [*options, "train", str(self.config)]
        for setting in (f"run.dir={self.root / 'runs'}", f"run.name={name}", *settings):
            words += ["--set", setting]
        return words
