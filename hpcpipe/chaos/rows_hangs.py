"""Rows 16 to 21 of the fault matrix: a writer that dies, ranks that stand still, wait for nothing, or are slow."""

from hpcpipe.chaos.row import Act, Event, Expected, Row
from hpcpipe.chaos.setting import CHECKPOINT_EVERY
from hpcpipe.errors import ExitCode

_HANG = ("recovery.hang_s=3",)
_NAMED_S = 15.0

_CULPRIT_KILLED = Expected(
    "process 1 is named and killed within 15 s, a spare takes over",
    events=(Event("hang", cause="process 1", max_s=_NAMED_S), Event("recovered", max_lost_steps=1)),
)

ROWS = (
    Row(
        "16",
        "SIGKILL of a checkpoint writer",
        "write",
        Expected("training goes on, the next checkpoint is written", events=(Event("checkpoint failed"),)),
        acts=(Act("SIGKILL", "writer 1", CHECKPOINT_EVERY + 1),),
        environ={"HPCPIPE_TEST_DISK": "slow=3e5"},
    ),
    Row(
        "17",
        "SIGSTOP for 3 s",
        "forward",
        Expected("goes on by itself", absent=("recovered",)),
        "stop:process=1:step={step}:phase=forward:seconds=3",
        spares=1,
    ),
    Row(
        "18",
        "SIGSTOP for ever",
        "forward",
        _CULPRIT_KILLED,
        "stop:process=1:step={step}:phase=forward",
        spares=1,
        settings=_HANG,
    ),
    Row(
        "19",
        "computes for ever with Python's lock",
        "forward",
        _CULPRIT_KILLED,
        "spin:process=1:step={step}:phase=forward",
        spares=1,
        settings=_HANG,
    ),
    Row(
        "20",
        "receive with a wrong tag, in every attempt",
        "forward",
        Expected(
            "no kill loop: who waits for whom, exit 71", code=ExitCode.RANK_FAILED, bits="restart", told=("waits for",)
        ),
        "wrongtag:rank=2:step={step}:times=0",
        settings=_HANG,
        limit_s=120.0,
    ),
    Row(
        "21",
        "one rank 3 times slower",
        "from step 15 on",
        Expected("named within 20 steps", events=(Event("straggler", cause="process 1"),)),
        "slow:process=1:step=15-45:factor=3",
        settings=("train.steps=45", "train.decay_steps=45", "model.width=128", "model.context=64"),
        limit_s=120.0,
    ),
)
