"""Choosing the next token."""

import numpy as np
import pytest

from hpcpipe.train.generate import choose, uniform


def test_temperature_zero_takes_the_most_likely():
    assert choose(np.array([0.0, 3.0, 2.0], np.float32), 0.0, 0.999) == 1


def test_numbers_fall_into_the_parts_of_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.25], np.float32))
    assert [choose(logits, 1.0, number) for number in (0.0, 0.49, 0.51, 0.74, 0.76, 0.999999)] == [0, 0, 1, 1, 2, 2]


def test_lower_temperature_is_sharper():
    logits = np.array([0.0, 1.0], np.float32)
    numbers = [uniform(1, position) for position in range(2000)]
    shares = [np.mean([choose(logits, t, number) for number in numbers]) for t in (2.0, 1.0, 0.25)]
    assert shares == sorted(shares)
    assert shares[1] == pytest.approx(np.e / (1 + np.e), abs=0.03)


def test_random_numbers_are_a_function_of_seed_and_position():
    numbers = [uniform(1, position) for position in range(1000)]
    assert numbers == [uniform(1, position) for position in range(1000)]
    assert numbers != [uniform(2, position) for position in range(1000)]
    assert min(numbers) >= 0 and max(numbers) < 1
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.03)


def test_extreme_logits_are_safe():
    assert choose(np.array([1e30, -1e30], np.float32), 1e-3, 0.5) == 0
