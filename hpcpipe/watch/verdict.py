"""From what ranks show of themselves to who hangs: pure functions of one look at them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hpcpipe.watch.layout import Phase, State
from hpcpipe.watch.process import IN_KERNEL, STOPPED, TRACED

_DEVICE_PATIENCE = 6.0
_ALIVE_S = 2.0
SLOW, _STEADY = 2.0, 1.5
"""How many times longer than usual is slow, and what the others may take without being slow too."""


@dataclass(frozen=True)
class Rank:
    """A live process of the run, as its supervisor sees it.

    Attributes
    ----------
    process : int
        Process number.
    state : State
        What it shows.
    quiet_s : float
        Seconds since its last event, as far as the supervisor itself got to run.
    silent_s : float
        The same since its last event or sign of life.
    role : int
        The rank that it is in the grid; -1: a spare, or not known.
    mode : str
        State of the process, a letter as in proc(5).
    waits_for : str
        In its own words; empty where it has not said so.
    pace : float
        How many times longer than usual its own part of a step takes; 0: not known.
    """

    process: int
    state: State
    quiet_s: float
    silent_s: float
    role: int = -1
    mode: str = "S"
    waits_for: str = ""
    pace: float = 0.0

    @property
    def name(self) -> str:
        """Which process it is, and which rank."""
        return f"process {self.process}" + (f" (rank {self.role})" if self.role >= 0 else "")

    @property
    def limit_s(self) -> float:
        """How long it may stay as it is; 0: for ever."""
        return self.state.limit_ns * 1e-9

    @property
    def is_active(self) -> bool:
        """Whether it is a part of what the others do together."""
        return self.state.phase not in (Phase.SPARE, Phase.ENDED)

    @property
    def place(self) -> str:
        """What it does, as ``step 12, F2.1``."""
        state = self.state
        parts = [f"step {state.step}"] if state.step else []
        parts += [state.phase.name.lower()] if state.phase is not Phase.TRAIN or not state.kind else []
        parts += [name_action(state.kind, state.stage, state.microbatch)] if state.kind else []
        return ", ".join(parts)


def name_action(kind: str, stage: int, microbatch: int) -> str:
    """Return an action or message in the language of schedules, ``F2.1``."""
    if stage < 0:
        return kind
    return f"{kind}{stage}" if microbatch < 0 or kind in ("REDUCE", "STEP") else f"{kind}{stage}.{microbatch}"


def find_culprits(ranks: Sequence[Rank]) -> list[Rank]:
    """Return the ranks that keep the others waiting and will not end that by themselves.

    Those are past their deadline without an event while they compute, or without a sign of life while they wait: they
    are suspended, compute for ever, or are stuck in a call. All that are suspended are returned, otherwise one: the
    first of those that do not wait, since the others may only wait for it in a way that does not show.

    Parameters
    ----------
    ranks : sequence of Rank
        All live ones of the node.

    Returns
    -------
    list of Rank
        Empty while nobody is past its deadline. Also where every rank is suspended, as by Ctrl-Z or by a batch system:
        that is somebody's wish.
    """
    if len(ranks) > 1 and all(rank.mode == STOPPED for rank in ranks):
        return []
    stuck = [rank for rank in ranks if _is_stuck(rank)]
    stopped = [rank for rank in stuck if rank.mode == STOPPED]
    if stopped:
        return stopped
    stuck.sort(key=lambda rank: (bool(rank.state.wait), rank.state.phase is Phase.RECOVER, rank.state.event_ns))
    return stuck[:1]


def is_deadlock(ranks: Sequence[Rank]) -> bool:
    """Return whether all active ranks wait for each other and are well, but nothing moves beyond all deadlines.

    Parameters
    ----------
    ranks : sequence of Rank
        All live processes of the run: where some are not seen, nothing can be said.
    """
    active = [rank for rank in ranks if rank.is_active]
    if not active or not all(rank.state.wait and rank.limit_s and rank.silent_s < _ALIVE_S for rank in active):
        return False
    return min(rank.quiet_s for rank in active) > max(rank.limit_s for rank in active)


def is_straggling(rank: Rank) -> bool:
    """Return whether a rank has been still for longer than ever before, and than a fifth of what makes it a hang."""
    still_s = rank.silent_s if rank.state.wait else rank.quiet_s
    return rank.limit_s > 0 and still_s > rank.limit_s / 5


def find_slow(ranks: Sequence[Rank]) -> list[Rank]:
    """Return the ranks whose own part of a step takes twice as long as before, while that of the others does not."""
    training = [rank for rank in ranks if rank.state.phase is Phase.TRAIN and rank.pace]
    others = [rank.pace for rank in training if rank.pace < SLOW]
    if not others or len(others) < len(training) / 2 or median(others) > _STEADY:
        return []
    return [rank for rank in training if rank.pace >= SLOW]


def _is_stuck(rank: Rank) -> bool:
    patience = rank.limit_s * (_DEVICE_PATIENCE if rank.mode == IN_KERNEL else 1.0)
    still_s = rank.silent_s if rank.state.wait else rank.quiet_s
    return patience > 0 and rank.mode != TRACED and still_s > patience
