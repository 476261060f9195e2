"""``hpcpipe bench step``: what whole training steps take, and where their time goes."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpcpipe.bench.action_clock import ActionClock
from hpcpipe.bench.config import RandomSamples, quiet_session, with_vocabulary
from hpcpipe.bench.gemm import unit_of
from hpcpipe.bench.result import BenchResult
from hpcpipe.bench.step_figures import Machine, RankFigures, kernel_rows, step_figures, waiting_figures
from hpcpipe.errors import UsageError
from hpcpipe.kernels.observe import ObservedTeam, Observer
from hpcpipe.model.gpt2 import training_flops_per_sample
from hpcpipe.mpi import runtime
from hpcpipe.mpi.agree import together
from hpcpipe.mpi.collectives import barrier, gather_bytes
from hpcpipe.mpi.runtime import World
from hpcpipe.train.batches import TrainingBatches
from hpcpipe.train.directory import RunDirectory
from hpcpipe.train.leave import leaving_together
from hpcpipe.train.peak import measure_bandwidth, measure_peak_flops
from hpcpipe.train.plan import make_plan
from hpcpipe.train.setup import Setup, agree_on_setup, compile_kernels, require_own_memory
from hpcpipe.train.state import State, build_state
from hpcpipe.train.step import Trainer

_WARMUP_STEPS = 2


def bench_step(
    config_path: Path, overrides: Sequence[str], num_steps: int, say: Callable[[str], None] | None = None
) -> BenchResult:
    """Run training steps on random tokens as a run does, on all ranks that were started together.

    Nothing is prepared and nothing is written, but for the caches of compiled kernels and of the costs of layers. After
    two steps that do not count come `num_steps` as a run does them, for the figures of a step, and as many again that
    all ranks begin together and in which kernels and actions are timed, for what follows.

    Parameters
    ----------
    config_path : Path
        The TOML file.
    overrides : sequence of str
        ``section.key=value`` each.
    num_steps : int
        Steps that are timed, at least 1.
    say : callable, optional
        Takes a line about each kernel that must be compiled, on rank 0.

    Returns
    -------
    BenchResult
        Its report has ``benchmark ranks threads precision unit schedule pipeline data steps tokens_per_step``;
        ``tokens_per_s step_s step_p10_s step_p90_s mfu bubble``: of the median step, and the bubble as
        ``metrics.jsonl`` has it (the fraction of the schedule's time that ranks wait for messages, the mean over
        ranks); ``peak_flops copy_bytes_per_s`` of all ranks together; ``predicted_step_s``; and
        of the observed steps ``waiting scheduled_waiting exposed_messages observed_step_s kernels waiting_s other_s``:
        see `hpcpipe.bench.step_figures`.

    Raises
    ------
    UsageError
        There are no steps to time.
    """
    if num_steps < 1:
        raise UsageError(f"--steps {num_steps}: at least 1 is needed")
    world = runtime.start()
    report = None
    with leaving_together(world, None) as outcome:
        report = _Bench(world, agree_on_setup(world, config_path, overrides)).run(num_steps, say)
    runtime.stop(world)
    return BenchResult(outcome.code, report if world.rank == 0 else None)


@dataclass
class _Own:
    """What this rank has measured."""

    step_s: list[float] = field(default_factory=list)
    bubble: list[float] = field(default_factory=list)
    observed: RankFigures = field(default_factory=RankFigures)


class _Bench:
    """One benchmark on one rank."""

    def __init__(self, world: World, setup: Setup) -> None:
        self._world = world
        self._observer = Observer()
        config, binding = setup.config, setup.binding
        self._team = ObservedTeam(self._observer, config.parallel.threads, binding.own_cores(world.local_rank))
        self._session = quiet_session(world, setup, self._team, RunDirectory.of(config.run))

    def run(self, num_steps: int, say: Callable[[str], None] | None) -> dict[str, Any]:
        """Measure, and return the report."""
        session = self._session
        grid, waiter = session.grid, session.waiter
        try:
            compile_kernels(session, self._world, say if session.is_root else None)
            with together(grid.comm, waiter):
                session.config = with_vocabulary(session.config)
                require_own_memory(session, session.config)
            plan = make_plan(session)
            config = session.config
            with together(grid.comm, waiter):
                require_own_memory(session, config)
            schedule, place = session.schedule, (grid.stage_rank, grid.replica)
            state = build_state(config, schedule.stage_to_rank, *place, self._team)
            state.fill_initial()
            peak = self._peak()
            copied = measure_bandwidth(grid, waiter, session.num_local_ranks, self._team)
            waiter.timeout_s = config.parallel.timeout_s
            own = self._steps(state, num_steps)
            # The better of two times, since other programs only make a machine look slower.
            machine = Machine(grid.comm.size, max(peak, self._peak()), copied)
            report = self._report(state, own, machine, plan.candidate.prediction.step_s)
            grid.free()
            return report
        finally:
            self._team.close()

    def _peak(self) -> float:
        session = self._session
        return measure_peak_flops(
            session.grid, session.waiter, session.config.train.precision, self._team, session.share_of_core
        )

    def _steps(self, state: State, num_steps: int) -> _Own:
        """Run all steps."""
        session = self._session
        config, grid, waiter = session.config, session.grid, session.waiter
        parallel, model = config.parallel, config.model
        per_replica = parallel.microbatches // grid.data
        local = range(grid.replica * per_replica, (grid.replica + 1) * per_replica)
        size = parallel.microbatch_size, model.context
        batches = TrainingBatches(RandomSamples(model.vocab), parallel.microbatches, local, *size)
        trainer = Trainer(state, session.schedule, grid, waiter, batches, session.mode)
        own = _Own()
        for step in range(1, _WARMUP_STEPS + num_steps + 1):
            result = trainer.run(step)
            if step > _WARMUP_STEPS:
                own.step_s.append(result.step_s)
                own.bubble.append(result.bubble)
        clock = ActionClock(trainer.stages, waiter)
        for step in range(state.step + 1, state.step + num_steps + 1):
            barrier(grid.comm, waiter)
            with self._observer.watch():
                clock.start()
                result = trainer.run(step)
            own.observed.add(result.step_s, waiter.waited_s, clock.waited_s, clock.actions_s)
        own.observed.kernels = {
            name: (tally.calls, tally.seconds, *tally.work) for name, tally in self._observer.kernels.items()
        }
        return own

    def _report(self, state: State, own: _Own, machine: Machine, predicted_step_s: float) -> dict[str, Any]:
        """Return the report; every rank takes part."""
        session = self._session
        config, grid = session.config, session.grid
        content = json.dumps(asdict(own.observed)).encode()
        ranks = [RankFigures(**json.loads(row)) for row in gather_bytes(grid.comm, session.waiter, content)]
        tokens = state.tokens_per_step
        flops = training_flops_per_sample(state.model) * (tokens / config.model.context)
        return {
            "benchmark": "step",
            "ranks": grid.comm.size,
            "threads": config.parallel.threads,
            "precision": config.train.precision,
            "unit": unit_of(config.train.precision),
            "schedule": config.parallel.schedule,
            "pipeline": grid.pipeline,
            "data": grid.data,
            "steps": len(own.step_s),
            "tokens_per_step": tokens,
            **step_figures(own.step_s, own.bubble, tokens, flops, machine),
            "predicted_step_s": predicted_step_s,
            **waiting_figures(session.schedule, ranks, grid.data),
            **kernel_rows(ranks, machine),
        }
