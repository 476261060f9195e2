"""MPI: the only room that imports mpi4py. Start and stop, the grid of ranks, messages, collectives, agreement."""
