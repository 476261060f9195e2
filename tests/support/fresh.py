"""Random inputs that are new in every run of the suite, and can be had again.

The report's header names the seed; ``HPCPIPE_TEST_SEED`` takes it, and a test then gets the same inputs, whichever
other tests run.
"""

import os
import zlib

import numpy as np

SEED = int(os.environ.get("HPCPIPE_TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
RANDOM = np.random.default_rng()
"""Starts anew before each test."""


def start(test: str) -> None:
    """Let a test's random numbers depend on its name and the suite's seed only."""
    RANDOM.bit_generator.state = np.random.default_rng([SEED, zlib.crc32(test.encode())]).bit_generator.state
