"""The grid of ranks: pipeline stages times data replicas. Only this room knows how ranks are numbered."""

from dataclasses import dataclass
from typing import cast

from mpi4py import MPI


@dataclass(frozen=True)
class Grid:
    """The place of a rank, and the communicators along the two axes.

    Attributes
    ----------
    comm : Comm
        All ranks.
    pipeline, data : int
        Degrees: stages per replica, and replicas.
    stage_rank, replica : int
        This rank's place in its pipeline, and the replica it belongs to.
    pipeline_comm : Comm
        The ranks of this replica, numbered by their place in the pipeline.
    data_comm : Comm
        The ranks at this place of all replicas, numbered by replica.
    owns_comm : bool
        Whether `comm` is freed with the grid; else it is the caller's.
    """

    comm: MPI.Intracomm
    pipeline: int
    data: int
    stage_rank: int
    replica: int
    pipeline_comm: MPI.Intracomm
    data_comm: MPI.Intracomm
    owns_comm: bool = False

    def world_rank(self, replica: int, stage_rank: int) -> int:
        """Return the rank that stands at a place of the grid."""
        return replica * self.pipeline + stage_rank

    def communicators(self) -> tuple[MPI.Intracomm, ...]:
        """Return every communicator, all ranks' last."""
        return self.pipeline_comm, self.data_comm, self.comm

    def free(self) -> None:
        """Free the communicators of the grid; every rank calls it."""
        self.pipeline_comm.Free()
        self.data_comm.Free()
        if self.owns_comm:
            self.comm.Free()


def make_grid(comm: MPI.Intracomm, pipeline: int, data: int, *, owns_comm: bool = False) -> Grid:
    """Lay the grid over a communicator whose size is ``pipeline * data``.

    The ranks of a pipeline are neighbours, since they talk in every action and replicas only once a step.
    """
    replica, stage_rank = divmod(comm.rank, pipeline)
    pipeline_comm = cast(MPI.Intracomm, comm.Split(color=replica, key=stage_rank))
    data_comm = cast(MPI.Intracomm, comm.Split(color=stage_rank, key=replica))
    return Grid(comm, pipeline, data, stage_rank, replica, pipeline_comm, data_comm, owns_comm)


def line_grid(comm: MPI.Intracomm) -> Grid:
    """Return all ranks of a communicator in one row, without communicators of their own: for setting up."""
    return Grid(comm, comm.size, 1, comm.rank, 0, comm, comm)
