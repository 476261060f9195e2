"""Rows 30 to 33 of the fault matrix: numbers that are not finite, and bits that flip."""

from hpcpipe.chaos.row import Event, Expected, Row
from hpcpipe.errors import ExitCode

_REPEATED = Expected("the step is repeated, nothing is lost", events=(Event("not finite once"),))
_SKIPPED = Expected("skipped on all ranks, the stage is named", bits="twin", events=(Event("step skipped"),))
_FIRST_IS_BAD = "nan:in=gradient:step={step}:times=0"


def _not_finite(case: str, kind: str, data: str, *, is_lasting: bool = False) -> Row:
    """Return the row of a number that is not finite, once or each time that the step is tried."""
    where = ":microbatch={microbatch}" if data == "activation" else ""
    times = ":times=0" if is_lasting else ""
    return Row(
        f"30.{case}",
        f"{kind} in one {data}",
        "step, whenever it is tried" if is_lasting else "step",
        _SKIPPED if is_lasting else _REPEATED,
        f"{kind}:process=1:in={data}:step={{step}}{where}{times}",
        twin=_FIRST_IS_BAD if is_lasting else "",
    )


def _flipped(name: str, fault: str, inject: str, event: str, data: int = 1) -> Row:
    """Return the row of a flipped bit, on a grid of four ranks."""
    expected = Expected("found and repaired, nothing lost", events=(Event(event),))
    return Row(name, fault, "step", expected, f"{inject}:step={{step}}:seed={{seed}}", pipeline=4 // data, data=data)


ROWS = (
    _not_finite("nan-activation", "nan", "activation"),
    _not_finite("inf-activation", "inf", "activation"),
    _not_finite("nan-gradient", "nan", "gradient"),
    _not_finite("inf-gradient", "inf", "gradient"),
    _not_finite("lasting-activation", "nan", "activation", is_lasting=True),
    _not_finite("lasting-gradient", "inf", "gradient", is_lasting=True),
    Row(
        "31",
        "NaN in every gradient of five steps",
        "steps",
        Expected("skips, goes back, then exit 70", code=ExitCode.NUMERICS, bits="restart", told=("not finite",)),
        "nan:process=1:in=gradient:step={step}-{after}:times=0",
    ),
    _flipped("32.exponent", "exponent bit of a weight", "flip:process=1:in=weight", "state changed", data=2),
    _flipped("32.mantissa", "lowest bit of a weight", "flip:process=3:in=weight:bit=0", "state changed", data=2),
    _flipped("33.weight", "exponent bit of a weight, one replica", "flip:process=2:in=weight", "state changed"),
    _flipped("33.moment", "exponent bit of a moment", "flip:process=2:in=moment", "state changed"),
    _flipped(
        "33.message",
        "exponent bit of a message",
        "flip:process=2:in=message:microbatch={microbatch}",
        "message changed",
    ),
    Row(
        "33.copy",
        "exponent bit of a copy in every memory",
        "before a recovery",
        Expected("found, goes on from elsewhere", events=(Event("recovered"),)),
        "kill:process=1:step={step}:phase=forward;flip:in=copy:step={before}:seed={seed}",
        spares=1,
    ),
)
