"""Where a test submits the shipped scripts from, and looks at what became of them."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from support.commands import step_rows
from support.slurm_cluster import Cluster, Job, wait_until

from hpcpipe.telemetry.status import newest_checkpoint

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "slurm/train.sbatch"


@dataclass(frozen=True)
class Desk:
    """Submits jobs that train the shared small model, all below a directory of the test's own.

    Attributes
    ----------
    cluster : Cluster
        The private Slurm.
    root : Path
        The test's directory.
    config : Path
        Configuration of the small model.
    """

    cluster: Cluster
    root: Path
    config: Path

    def directory(self, name: str) -> Path:
        """Return the directory of a run."""
        return self.root / "runs" / name

    def train_arguments(self, name: str, *settings: str) -> list[object]:
        """Return the words after a script."""
        words: list[object] = [self.config]
        for setting in (f"run.dir={self.root / 'runs'}", *([f"run.name={name}"] if name else []), *settings):
            words += ["--set", setting]
        return words

    @property
    def options(self) -> list[object]:
        """Options of sbatch for output that the test can read."""
        return [f"--output={self.root}/%j.out"]

    def submit(
        self,
        *options: object,
        name: str = "run",
        settings: tuple[str, ...] = (),
        script: Path = TRAIN,
        environ: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a script of ``slurm/`` unchanged, from the root of the tree."""
        words = [*self.options, *options, script, *self.train_arguments(name, *settings)]
        return self.cluster.submit(*words, environ={**self.environ, **(environ or {})}, cwd=ROOT)

    @property
    def environ(self) -> dict[str, str]:
        """What the scripts are told about this site."""
        return {"HPCPIPE_ENVIRONMENT": str(Path(sys.executable).parents[1]), "HPCPIPE_MACHINE": "laptop"}

    def wait_for(self, job: int | str, *states: str, limit_s: float = 120.0) -> Job:
        """Wait for a state of a job, by default its end."""
        return self.cluster.wait_for(job, *states, limit_s=limit_s, explain=lambda: self.explain(job))

    def wait_for_steps(self, job: int, num_steps: int, name: str = "run", limit_s: float = 90.0) -> None:
        """Wait until a run has done some steps."""

        def is_there() -> bool:
            ended = self.cluster.job(job).state in ("COMPLETED", "FAILED")
            assert not ended, f"the job ended before step {num_steps} {self.explain(job)}"
            return any(row["step"] >= num_steps for row in step_rows(self.directory(name)))

        wait_until(is_there, f"step {num_steps}", lambda: self.explain(job), limit_s)

    def wait_for_checkpoint(self, job: int, name: str = "run") -> None:
        """Wait until a run has a complete checkpoint."""
        self.wait_for_steps(job, 10, name)
        wait_until(lambda: newest_checkpoint(self.directory(name)) >= 10, "checkpoint", lambda: self.explain(job))

    def output(self, job: int | str) -> str:
        """Return what a job has printed, without the NUL bytes of ``mpirun``."""
        path = self.root / f"{job}.out"
        return path.read_text(errors="replace").replace("\0", "") if path.exists() else ""

    def explain(self, job: int | str) -> str:
        """Say what became of a job."""
        return f"\n--- job {job}\n{self.output(job)[-6000:]}\n{self.cluster.explain()[-4000:]}"

    def explain_all(self) -> str:
        """Say what became of all jobs of the test."""
        return "".join(self.explain(path.stem) for path in sorted(self.root.glob("*.out")))
