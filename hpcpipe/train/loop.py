"""The loop: steps, evaluations and checkpoints until the last step or a request to stop."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from hpcpipe.errors import ExitCode, NumericsError
from hpcpipe.faults import hooks
from hpcpipe.model.gpt2 import training_flops_per_sample
from hpcpipe.mpi.collectives import gather_rows
from hpcpipe.train.checkpoints import Checkpoints
from hpcpipe.train.evaluate import Evaluation, Evaluator
from hpcpipe.train.rows import Notes
from hpcpipe.train.session import Session
from hpcpipe.train.state import State
from hpcpipe.train.step import StepResult, Trainer
from hpcpipe.train.stop import StopRequest
from hpcpipe.watch.layout import Phase


class Loop:
    """Trains a state to its last step.

    Parameters
    ----------
    session : Session
        The run.
    state : State
        Updated in place.
    trainer : Trainer
        Runs a step.
    evaluator : Evaluator or None
        Runs an evaluation; None if nothing is held out.
    stop : StopRequest
        Looked at in every step.
    checkpoints : Checkpoints
        Takes checkpoints of the state.
    peak_flops : float
        What MFU is measured against.
    after_step : callable
        Called with each step that is finished, before its figures are written.

    Attributes
    ----------
    steps_s : list of float
        Seconds of each step so far, on this rank.
    """

    def __init__(
        self,
        session: Session,
        state: State,
        trainer: Trainer,
        evaluator: Evaluator | None,
        stop: StopRequest,
        checkpoints: Checkpoints,
        peak_flops: float,
        after_step: Callable[[int], None],
    ) -> None:
        self._session = session
        self._state = state
        self._trainer = trainer
        self._evaluator = evaluator
        self._stop = stop
        self._checkpoints = checkpoints
        self._after_step = after_step
        self._metrics = session.metrics
        samples = session.config.parallel.microbatches * session.config.parallel.microbatch_size
        self._peak_flops_per_step = training_flops_per_sample(state.model) * samples / peak_flops
        self.steps_s: list[float] = []
        self._evaluation: Evaluation | None = None
        self._evaluated_step = 0

    def run(self) -> Evaluation | None:
        """Run all steps that are left.

        Returns
        -------
        Evaluation or None
            Of the last step.

        Raises
        ------
        StoppedError
            On every rank, after the checkpoint, if one of them was asked to stop.
        """
        config, state, beacon = self._session.config, self._state, self._session.beacon
        self._session.console.start(config.train.steps, state.step)
        try:
            beacon.phase(Phase.TRAIN)
            self._catch_up()
            for step in range(state.step + 1, config.train.steps + 1):
                beacon.step(step)
                self._stop.look(step, self.steps_s[-1] if self.steps_s else 0.0, self._checkpoints.commit_s)
                result = self._trainer.run(step, self._notes)
                self._after_step(step)
                self._record(step, result)
                self._checkpoints.after_step(result.step_s, result.heard.answers)
                is_last = step == config.train.steps
                if result.heard.stop and not is_last:
                    self._end_early()
                # A held-out loss that is not finite keeps broken weights out of the checkpoint.
                if is_last or _is_due(step, config.train.eval_every):
                    self._evaluate()
                if is_last:
                    self._trainer.require_sound_state()
                    with beacon.during(Phase.CHECKPOINT):
                        self._checkpoints.finish(self._facts(), save=True, read_back=True)
                elif self._checkpoints.is_due(step, result.heard.due):
                    self._trainer.require_sound_state()
                    with beacon.during(Phase.CHECKPOINT):
                        self._checkpoints.take(self._facts())
            beacon.phase(Phase.FINISH)
        finally:
            self._session.console.stop()
        return self._evaluation

    def _catch_up(self) -> None:
        """Run the evaluation that a stop after the same step has left out."""
        step = self._state.step
        if self._evaluator is None or not _is_due(step, self._session.config.train.eval_every):
            return
        is_missing = np.array([self._metrics is not None and self._metrics.lacks_evaluation(step)])
        if gather_rows(self._session.grid.comm, self._session.waiter, is_missing).any():
            self._evaluate()

    def _notes(self) -> Notes:
        """Return what this rank has to tell the others in a step."""
        return Notes(self._stop.is_set, self._checkpoints.is_due_by_time, self._checkpoints.answer)

    def _facts(self) -> dict[str, Any]:
        """Return what the loop knows of the last finished step, for its checkpoint."""
        is_evaluated = self._evaluation is not None and self._evaluated_step == self._state.step
        return {"val_loss": self._evaluation.val_loss if self._evaluation and is_evaluated else None}

    def _record(self, step: int, result: StepResult) -> None:
        self.steps_s.append(result.step_s)
        if self._metrics is None:
            return
        # NaN and infinity have no place in the metrics; the events say which of the two it was.
        is_finite = math.isfinite(result.loss) and math.isfinite(result.grad_norm)
        row = {
            "step": step,
            "loss": result.loss if is_finite else None,
            "grad_norm": result.grad_norm if is_finite else None,
            "learning_rate": result.learning_rate,
            "tokens": step * self._state.tokens_per_step,
            "step_s": result.step_s,
            "tokens_per_s": self._state.tokens_per_step / result.step_s,
            "mfu": self._peak_flops_per_step / result.step_s,
            "bubble": result.bubble,
        }
        if result.is_skipped:
            row["skipped"] = True
        self._write(row)
        self._session.console.step(row)

    def _write(self, row: dict[str, Any]) -> None:
        """Write a row of metrics; where that fails, say so once, and train on."""
        assert self._metrics is not None
        before = self._metrics.num_dropped
        self._metrics.add(row)
        if self._metrics.num_dropped == 1 and before == 0:
            problem = self._metrics.problem
            self._session.events.add("rows dropped", step=row["step"], problem=problem)
            self._session.console.say(f"warning: {problem}; training goes on without its rows")

    @property
    def num_dropped(self) -> int:
        """Rows of metrics, and events, that could not be written so far, on the rank that writes them."""
        return self._session.events.num_dropped + (self._metrics.num_dropped if self._metrics is not None else 0)

    def _evaluate(self) -> None:
        if self._evaluator is None:
            return
        hooks.point("evaluate")
        with self._session.beacon.during(Phase.EVALUATE):
            evaluation = self._evaluation = self._evaluator.run()
        self._evaluated_step = self._state.step
        if not math.isfinite(evaluation.val_loss):
            error = NumericsError(
                f"step {self._state.step}: held-out loss {evaluation.val_loss}: the last update broke the weights;"
                f" lower train.learning_rate ({self._session.config.train.learning_rate:g}) and go on from the last"
                " checkpoint"
            )
            raise error.on_all()
        if self._metrics is not None:
            row = {"step": self._state.step, "val_loss": evaluation.val_loss, "bits_per_byte": evaluation.bits_per_byte}
            self._write(row)
        self._session.console.say(
            f"step {self._state.step}: held-out loss {evaluation.val_loss:.4f} nats per token,"
            f" {evaluation.bits_per_byte:.4f} bits per byte"
        )

    def _end_early(self) -> None:
        session, step = self._session, self._state.step
        session.beacon.phase(Phase.CHECKPOINT)
        self._trainer.require_sound_state()
        self._checkpoints.finish(self._facts(), save=session.config.checkpoint.on_signal, read_back=False)
        session.beacon.phase(Phase.FINISH)
        self._stop.conclude()
        advice = f"; the last checkpoint is of step {self._checkpoints.step}: run the same command again"
        error = self._stop.error(f"after step {step}", advice)
        cause = str(error).removesuffix(advice)
        session.events.add("stopped", step=step, exit_code=int(ExitCode.STOPPED), cause=cause, by=error.by)
        raise error


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
