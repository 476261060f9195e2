"""Rows 1 to 12 of the fault matrix: ranks that are killed, one or several, also while the run recovers."""

from hpcpipe.chaos.row import Act, Event, Expected, Row

_MAX_RECOVERY_S = 2.0
_MAX_NEW_GRID_S = 5.0
_AT_STEP = "kill:process={process}:step={{step}}:phase={phase}"
_IN_MICROBATCH = _AT_STEP + ":microbatch={{microbatch}}"
_RECOVERY_PHASES = ("revoke", "shrink", "exchange", "decide", "form", "restore", "commit")
# A rank keeps the copy of the one half a pipeline before it: of four the second but next, of six the third.
_SIX = 6


def _recovered(max_lost_steps: int | None = 1, max_s: float | None = _MAX_RECOVERY_S, at_least: int = 1) -> Event:
    return Event("recovered", max_lost_steps=max_lost_steps, max_s=max_s, at_least=at_least)


_SPARE = Expected("a spare takes over, at most 1 step lost, under 2 s", events=(_recovered(),))


def _kill(process: int, phase: str) -> str:
    """Return the fault that kills a process in a phase of the repetition's step."""
    pattern = _IN_MICROBATCH if phase in ("forward", "backward") else _AT_STEP
    return pattern.format(process=process, phase=phase)


def _one_by_one() -> tuple[Row, ...]:
    """Return the rows in which one rank dies."""
    return (
        Row("1", "SIGKILL of a middle stage", "forward", _SPARE, _kill(1, "forward"), spares=1),
        Row("2.first", "SIGKILL of the first stage", "forward", _SPARE, _kill(0, "forward"), spares=1),
        Row("2.last", "SIGKILL of the last stage", "forward", _SPARE, _kill(3, "forward"), spares=1),
        Row("3", "SIGKILL of process 0", "backward", _SPARE, _kill(0, "backward"), spares=1),
        Row("4", "SIGKILL", "sum over replicas", _SPARE, _kill(2, "reduce"), pipeline=2, data=2, spares=1),
        Row("5.before", "SIGKILL", "before its update, after others'", _SPARE, _kill(2, "update"), spares=1),
        Row("5.after", "SIGKILL", "after its update, before others'", _SPARE, _kill(2, "updated"), spares=1),
        Row(
            "6",
            "SIGKILL, no spare, two replicas",
            "backward",
            Expected("goes on with fewer ranks, same global batch", events=(_recovered(max_s=_MAX_NEW_GRID_S),)),
            _kill(3, "backward"),
            pipeline=2,
            data=2,
        ),
        Row(
            "7",
            "SIGKILL, no spare, one replica",
            "forward",
            Expected("goes on with a pipeline of 3", events=(_recovered(max_s=_MAX_NEW_GRID_S),)),
            _kill(1, "forward"),
        ),
        Row(
            "7.first-step",
            "SIGKILL before there is a copy",
            "forward of step 1",
            Expected("a spare takes over", events=(_recovered(),)),
            "kill:process=1:step=1:phase=forward",
            spares=1,
        ),
        Row(
            "11",
            "SIGKILL of an idle spare",
            "between steps",
            Expected("noticed, training is not disturbed", events=(Event("spare lost"),), absent=("recovered",)),
            acts=(Act("SIGKILL", "process 4"),),
            spares=1,
        ),
    )


def _several() -> tuple[Row, ...]:
    """Return the rows in which more than one process dies."""
    first = _kill(1, "forward")
    return (
        Row(
            "8",
            "SIGKILL of two ranks that keep no copies for each other",
            "forward",
            Expected("both replaced, at most 1 step lost", events=(_recovered(),)),
            f"{first};{_kill(3, 'forward')}",
            pipeline=_SIX,
            spares=2,
        ),
        Row(
            "9",
            "SIGKILL of a rank and of its neighbour",
            "forward",
            Expected("another rank of the machine has both copies, at most 1 step lost", events=(_recovered(),)),
            f"{first};{_kill(3, 'forward')}",
            spares=2,
        ),
        Row(
            "9.all",
            "SIGKILL of every rank",
            "between steps",
            Expected(
                "spares go on from the last checkpoint, in place",
                events=(_recovered(max_lost_steps=None),),
            ),
            acts=tuple(Act("SIGKILL", f"process {process}") for process in range(4)),
            spares=4,
            settings=("checkpoint.every=2",),
        ),
        *(
            Row(
                f"10.{phase}",
                "second SIGKILL during the recovery",
                phase,
                Expected("the recovery starts again", events=(_recovered(),)),
                f"{first};kill:process=3:phase={phase}",
                pipeline=_SIX,
                spares=2,
            )
            for phase in _RECOVERY_PHASES
        ),
        Row(
            "12",
            "SIGKILL of the spare that takes over",
            "restore",
            Expected("the next spare takes over", events=(_recovered(),)),
            f"{first};kill:process=4:phase=restore",
            spares=2,
        ),
    )


ROWS = (*_one_by_one(), *_several())
