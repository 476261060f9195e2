"""What all processes of a run know of it: enough for a spare to take any rank's place, and to plan a smaller grid."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hpcpipe.config.grid import data_divides_microbatches
from hpcpipe.config.schema import Config
from hpcpipe.errors import UsageError
from hpcpipe.schedule.action import Schedule
from hpcpipe.schedule.build import build
from hpcpipe.train.choose import AUTO, GREEDY, Candidate, choose_schedule, plan_greedy, plan_schedule
from hpcpipe.train.costs import MeasuredCosts
from hpcpipe.train.session import check_schedule


@dataclass(frozen=True)
class Outline:
    """The plan of a run, without what one rank makes of it.

    Attributes
    ----------
    asked : Config
        Resolved, with the vocabulary, as it was before schedule and partition were decided.
    config : Config
        As decided.
    schedule : Schedule
        What the ranks of each pipeline do in a step.
    measured : MeasuredCosts
        What it was decided by.
    cores : float or None
        Cores that the ranks of a pipeline share; None if each has its own.
    limit_bytes : float
        Memory of one rank.
    peak_flops : float
        What MFU is measured against, of all ranks.
    start_step : int
        Step that the run went on from.
    """

    asked: Config
    config: Config
    schedule: Schedule
    measured: MeasuredCosts
    cores: float | None
    limit_bytes: float
    peak_flops: float
    start_step: int

    def to_bytes(self) -> bytes:
        """Return what `from_bytes` takes; between processes of one run only."""
        return pickle.dumps(self)

    @staticmethod
    def from_bytes(content: bytes) -> "Outline":
        """Return what `to_bytes` was called on."""
        outline = pickle.loads(content)
        assert isinstance(outline, Outline)
        return outline

    def for_fewer(self, num_processes: int) -> "Outline | None":
        """Return the fastest outline, by simulation, of a grid with fewer ranks; None if there is none.

        One replica fewer, or a shorter pipeline: for each number of replicas, the longest pipeline that there are
        processes for. The global batch and every bit of the numbers stay.

        Parameters
        ----------
        num_processes : int
            How many there are.
        """
        found = []
        for pipeline, data in self._smaller(num_processes):
            try:
                candidate = self._plan(pipeline, data)
            except UsageError:
                continue
            if candidate.memory_bytes <= self.limit_bytes:
                found.append(candidate)
        if not found:
            return None
        best = min(found, key=lambda candidate: candidate.prediction.step_s)
        before, after = self.config.parallel, best.config.parallel
        share = after.pipeline * after.data / (before.pipeline * before.data)
        cores = self._cores(after.pipeline, after.data)
        return replace(
            self, config=best.config, schedule=best.schedule, cores=cores, peak_flops=self.peak_flops * share
        )

    def _smaller(self, num_processes: int) -> Iterator[tuple[int, int]]:
        parallel = self.config.parallel
        for data in range(1, parallel.data + 1):
            pipeline = min(parallel.pipeline, num_processes // data)
            asked = replace(self.asked, parallel=replace(self.asked.parallel, pipeline=max(1, pipeline), data=data))
            # Lanes that do not divide over the replicas would change the order of sums.
            if pipeline and parallel.lanes % data == 0 and not data_divides_microbatches(asked, pipeline * data):
                yield pipeline, data

    def _cores(self, pipeline: int, data: int) -> float | None:
        """Return the cores that the ranks of a pipeline of a smaller grid share."""
        if self.cores is None:
            return None
        before = self.config.parallel
        all_cores = self.cores * before.data
        return None if all_cores >= pipeline * data else all_cores / data

    def _plan(self, pipeline: int, data: int) -> Candidate:
        """Plan a grid as the first one was.

        Raises
        ------
        UsageError
            It cannot be: a partition, chunks or a schedule that were given do not fit it.
        """
        config = replace(self.asked, parallel=replace(self.asked.parallel, pipeline=pipeline, data=data))
        parallel, cores = config.parallel, self._cores(pipeline, data)
        if parallel.schedule == AUTO:
            return choose_schedule(config, self.measured, cores, self.limit_bytes).chosen
        if parallel.schedule.endswith(".csv"):
            if pipeline != self.config.parallel.pipeline or data != self.config.parallel.data:
                raise UsageError(f"parallel.schedule = {parallel.schedule} is for another grid")
            return plan_schedule(self.config, self.schedule, self.measured, cores)
        schedule = build(parallel.schedule, pipeline, parallel.microbatches // data, parallel.chunks)
        config = check_schedule(config, schedule)
        if parallel.schedule == GREEDY:
            return plan_greedy(config, self.measured, cores)
        return plan_schedule(config, schedule, self.measured, cores)
