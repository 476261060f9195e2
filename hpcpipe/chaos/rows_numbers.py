"""Rows 30 to 33 of the fault matrix: numbers that are not finite, and bits that flip."""

from hpcpipe.chaos.row import Event, Expected, Row
from hpcpipe.errors import ExitCode

_SKIPPED = Expected("skipped on all ranks, the stage is named", bits="twin", events=(Event("step skipped"),))
_FIRST_IS_BAD = "nan:in=gradient:step={step}"
_FOUND = Expected("found and repaired, nothing lost", events=(Event("corruption"),))


def _not_finite(name: str, kind: str, data: str) -> Row:
    where = ":microbatch={microbatch}" if data == "activation" else ""
    inject = f"{kind}:process=1:in={data}:step={{step}}{where}"
    return Row(name, f"{kind} in one {data}", "step", _SKIPPED, inject, twin=_FIRST_IS_BAD)


def _flipped(name: str, fault: str, inject: str, data: int = 1) -> Row:
    # Two replicas, where there are any, compare what one replica alone has to remember.
    return Row(
        name, fault, "step", _FOUND, f"{inject}:step={{step}}:seed={{seed}}", pipeline=4 // data, data=data, spares=1
    )


ROWS = (
    _not_finite("30.nan-activation", "nan", "activation"),
    _not_finite("30.inf-activation", "inf", "activation"),
    _not_finite("30.nan-gradient", "nan", "gradient"),
    _not_finite("30.inf-gradient", "inf", "gradient"),
    Row(
        "31",
        "NaN in every gradient from one step on",
        "5 steps",
        Expected("skips, goes back, then exit 70", code=ExitCode.NUMERICS, bits="restart", told=("not finite",)),
        "nan:process=1:in=gradient:step={step}-{after}:times=0",
    ),
    _flipped("32.exponent", "exponent bit of a weight", "flip:process=1:in=weight", data=2),
    _flipped("32.mantissa", "lowest bit of a weight", "flip:process=3:in=weight:bit=0", data=2),
    _flipped("33.weight", "exponent bit of a weight, one replica", "flip:process=2:in=weight"),
    _flipped("33.moment", "exponent bit of a moment", "flip:process=2:in=moment"),
    _flipped("33.message", "exponent bit of a message", "flip:process=2:in=message:microbatch={microbatch}"),
    Row(
        "33.copy",
        "exponent bit of a copy that is restored",
        "recovery",
        Expected("found, another source is used", events=(Event("recovered"),)),
        "kill:process=1:step={step}:phase=forward;flip:in=copy",
        spares=1,
    ),
)
