"""Small parts of what judges numbers."""

import numpy as np
import pytest

from hpcpipe.train.guard_actions import is_finite
from hpcpipe.train.guard_state import most_trusted


@pytest.mark.parametrize(
    ("values", "owner", "expected"),
    [
        ([7, 7], 0, 7),
        ([7, 8], 0, 7),
        ([7, 8], 1, 8),
        ([7, 8, 8], 0, 8),
        ([7, 8, 9], 2, 9),
        ([7, 7, 8, 8], 3, 8),
        ([7, 7, 8, 9], 2, 8),
        ([7, 7, 7, 9], 3, 7),
    ],
)
def test_the_majority_is_trusted_and_else_the_owner(values, owner, expected):
    assert most_trusted(values, owner) == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_element_that_is_not_finite_is_seen(bad):
    array = np.full((5, 1001), 3e38, np.float32)
    array[::2] *= -1
    assert is_finite(array)
    assert is_finite(np.zeros(0, np.float32))
    for place in (0, 2500, array.size - 1):
        broken = array.copy()
        broken.flat[place] = bad
        assert not is_finite(broken)
