"""The cells of the matrix that compares bits: schedule x ranks of the pipeline x microbatches."""

from dataclasses import dataclass

from hpcpipe.errors import UsageError
from hpcpipe.schedule.build import GENERATORS, build

PIPELINES = (1, 2, 3, 4, 8)
FEW = 4
"""Pipelines of up to so many ranks run all their cells always."""


@dataclass(frozen=True)
class Variant:
    """A schedule with a number of stages per rank."""

    name: str
    chunks: int

    def __str__(self) -> str:
        return f"{self.name}-{self.chunks}"


VARIANTS = tuple(
    Variant(name, chunks)
    for name, generator in GENERATORS.items()
    if name != "forward"
    for chunks in ((generator.chunks,) if generator.chunks else (1, 2, 3))
)


def microbatch_counts(pipeline: int) -> list[int]:
    """Return the numbers of microbatches of a pipeline's cells."""
    return sorted({1, 2, 3, pipeline, 2 * pipeline, 2 * pipeline + 1})


def layers_of(pipeline: int) -> int:
    """Return the fewest blocks that fill three stages per rank, the last of them with the head alone."""
    return 3 * pipeline - 1


def refusal(variant: Variant, pipeline: int, microbatches: int) -> str | None:
    """Return the reason for which a cell is not defined, or None where it is."""
    try:
        build(variant.name, pipeline, microbatches, variant.chunks)
    except UsageError as error:
        return str(error)
    return None


def legal_counts(variant: Variant, pipeline: int) -> list[int]:
    """Return the numbers of microbatches for which a variant is defined, among those of the matrix."""
    return [m for m in microbatch_counts(pipeline) if refusal(variant, pipeline, m) is None]


def always_run(variant: Variant, pipeline: int) -> list[int]:
    """Return the cells that run in every test: on many ranks the smallest step, and one of a microbatch per rank."""
    legal = legal_counts(variant, pipeline)
    return legal if pipeline <= FEW else [m for m in legal if m in (legal[0], pipeline)]
