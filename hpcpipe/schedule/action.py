"""The words of the schedule language: a kind, a stage and a microbatch make an action."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from hpcpipe.errors import UsageError


class Kind(StrEnum):
    """What an action does.

    ``F`` forward, ``B`` whole backward, ``I`` gradient of the input, ``W`` gradient of the weights. ``RECV_F`` posts
    the receive of a stage's input and ``SEND_F`` starts the send of its output; ``RECV_B`` and ``SEND_B`` do the same
    for the gradient that enters a stage from behind and the one that leaves it in front. ``REDUCE`` starts the sum of a
    stage's gradients over the replicas, and ``STEP`` updates its weights; both are once per step.
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    REDUCE = "REDUCE"
    STEP = "STEP"

    # Enum's own hash is a Python function, and every pass over a schedule looks kinds up.
    __hash__ = str.__hash__


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
UPDATE = frozenset({Kind.REDUCE, Kind.STEP})
"""What a stage does once per step, whatever its microbatches; the microbatch of these actions is 0."""

_PATTERN = re.compile(r"([A-Z]+(?:_[A-Z]+)?)(\d+)(?:\.(\d+))?")


class Action(NamedTuple):
    """One thing that a rank does: written ``F2.0`` for the forward of stage 2, microbatch 0, and ``STEP2``."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        # An UPDATE of another microbatch does not exist, and the message that says so must show it.
        if self.microbatch == 0 and self.kind in UPDATE:
            return f"{self.kind}{self.stage}"
        return f"{self.kind}{self.stage}.{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Read an action from its written form.

        Raises
        ------
        UsageError
            If the text is not an action.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None or match[1] not in Kind.__members__ or (match[3] is None) != (match[1] in UPDATE):
            raise UsageError(
                f"'{text}' is not an action: write kind, stage, microbatch, such as F2.0 or SEND_B1.3, or STEP2"
            )
        return cls(Kind(match[1]), int(match[2]), int(match[3] or 0))


@dataclass(frozen=True)
class Schedule:
    """The stage-to-rank map and one ordered list of actions per rank.

    Attributes
    ----------
    name : str
        The name of the generator or file that it came from.
    num_microbatches : int
        Microbatches of one step that flow through this pipeline.
    stage_to_rank : tuple of int
        The pipeline rank that holds each stage.
    actions : tuple of tuple of Action
        One list per pipeline rank.
    """

    name: str
    num_microbatches: int
    stage_to_rank: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        """Number of stages over all ranks."""
        return len(self.stage_to_rank)

    @property
    def num_ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    @property
    def is_forward_only(self) -> bool:
        """Whether the schedule has no backward, as evaluation and generation."""
        return all(action.kind not in (Kind.B, Kind.I, Kind.W) for actions in self.actions for action in actions)

    def stages_of(self, rank: int) -> list[int]:
        """Return the stages that a rank holds, in ascending order."""
        return [stage for stage, holder in enumerate(self.stage_to_rank) if holder == rank]

    def input_crosses(self, stage: int) -> bool:
        """Whether the input of a stage comes from another rank."""
        return stage > 0 and self.stage_to_rank[stage - 1] != self.stage_to_rank[stage]

    def output_crosses(self, stage: int) -> bool:
        """Whether the output of a stage goes to another rank."""
        return stage + 1 < self.num_stages and self.input_crosses(stage + 1)
