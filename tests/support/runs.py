"""Runs of one test: where they are, and how they are started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.commands import Command, Finished, run


@dataclass(frozen=True)
class Runs:
    """Runs of one test: all of them below its own directory, all with the shared configuration."""

    root: Path
    config: Path

    def directory(self, name: str) -> Path:
        """Return the directory of a run."""
        return self.root / "runs" / name

    def arguments(
        self, name: str, num_ranks: int, settings: Sequence[object] = (), launch: Sequence[object] = ()
    ) -> list[object]:
        """Return the words of ``hpcpipe launch ... train``; `launch` are more options of launch."""
        words: list[object] = ["launch", "-n", num_ranks, *launch, "train", self.config]
        for setting in map(str, (f"run.dir={self.root / 'runs'}", f"run.name={name}", *settings)):
            words += ["--set", setting] if "=" in setting else [setting]
        return words

    def start(
        self,
        name: str,
        num_ranks: int,
        *settings: object,
        environ: Mapping[str, str] | None = None,
        launch: Sequence[object] = (),
    ) -> Command:
        """Start training; the caller waits for it."""
        return Command(self.arguments(name, num_ranks, settings, launch), self.root / f"{name}.output", environ)

    def train(
        self,
        name: str,
        num_ranks: int,
        *settings: object,
        environ: Mapping[str, str] | None = None,
        limit_s: float = 120.0,
    ) -> Finished:
        """Train to the end; settings are ``section.key=value``, other words stand as they are."""
        return run(self.arguments(name, num_ranks, settings), self.root / f"{name}.output", environ, limit_s)

    def train_well(
        self, name: str, num_ranks: int, *settings: object, environ: Mapping[str, str] | None = None
    ) -> Path:
        """Train to the end, which must be a good one, and return the run's directory."""
        finished = self.train(name, num_ranks, *settings, environ=environ)
        assert finished.code == 0, finished.stderr
        assert finished.stderr == ""
        return self.directory(name)

    def hpcpipe(self, *words: object, limit_s: float = 60.0) -> Finished:
        """Run another verb."""
        return run(words, self.root / "command.output", limit_s=limit_s)
