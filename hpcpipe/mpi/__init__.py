"""MPI: the only room that imports mpi4py. Start and stop, the grid of ranks, messages, collectives, agreement."""

import mpi4py

# Whichever module of this room is imported first: importing must not start MPI, `hpcpipe.mpi.runtime.start` does.
mpi4py.rc.initialize = False
mpi4py.rc.finalize = False
