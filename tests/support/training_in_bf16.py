"""Trains a tiny model in bf16 as one rank, and prints the loss and gradient norm of each step for 1 and 2 threads."""

import json

from mpi4py import MPI
from support.small_training import train

STEPS = 6


def main():
    choices = {"layers": 2, "width": 48, "precision": "bf16", "microbatches": 2}
    results = [train(MPI.COMM_SELF, 1, 1, STEPS, threads=threads, **choices)[0] for threads in (1, 2)]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
