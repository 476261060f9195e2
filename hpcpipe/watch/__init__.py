"""What a process outside MPI sees of the ranks of its node: heartbeats, flight recorder, hangs and who causes them."""
