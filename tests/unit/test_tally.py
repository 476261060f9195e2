"""Sums over messages: they balance if nothing has changed, and say between whom if something has."""

import numpy as np
import pytest
from support.fresh import RANDOM

from hpcpipe.kernels.digest import digest
from hpcpipe.mpi.tally import Tally, differing_links

SIZE = 4


class Wire:
    """Ranks that send each other arrays."""

    def __init__(self):
        self.tallies = [Tally(digest) for _ in range(SIZE)]
        self.arrivals = []

    def send(self, sender, receiver, change=lambda array: None):
        array = RANDOM.standard_normal(300).astype(np.float32)
        self.tallies[sender].add_sent(receiver, array)
        arrived = array.copy()
        change(arrived)
        self.arrivals.append((sender, receiver, arrived))

    def deliver(self):
        for index in RANDOM.permutation(len(self.arrivals)):
            sender, receiver, array = self.arrivals[index]
            self.tallies[receiver].add_received(sender, array)

    @property
    def balance(self):
        return sum(tally.balance() for tally in self.tallies) % 2**64

    @property
    def links(self):
        return differing_links([tally.row(SIZE) for tally in self.tallies])


def flip(array):
    array.view(np.uint32)[RANDOM.integers(array.size)] ^= np.uint32(1 << RANDOM.integers(32))


def chatter(wire):
    for _ in range(20):
        sender, receiver = RANDOM.choice(SIZE, 2, replace=False)
        wire.send(int(sender), int(receiver))


def test_what_arrives_whole_balances():
    wire = Wire()
    chatter(wire)
    assert wire.balance != 0
    wire.deliver()
    assert wire.balance == 0
    assert wire.links == []


@pytest.mark.parametrize("link", [(0, 1), (3, 0), (2, 1)])
def test_a_flipped_bit_is_seen_and_its_link_named(link):
    wire = Wire()
    chatter(wire)
    wire.send(*link, change=flip)
    wire.deliver()
    assert wire.balance != 0
    assert wire.links == [link]


def test_two_changed_links_are_both_named():
    wire = Wire()
    chatter(wire)
    wire.send(0, 1, change=flip)
    wire.send(1, 0, change=flip)
    wire.deliver()
    assert wire.links == [(0, 1), (1, 0)]


def test_a_message_that_got_lost_is_seen():
    wire = Wire()
    chatter(wire)
    wire.arrivals.pop()
    wire.deliver()
    assert wire.balance != 0


def test_a_tally_begins_anew():
    tally = Tally(digest)
    tally.add_sent(1, np.ones(5, np.float32))
    tally.add_received(2, np.ones(7, np.float32))
    assert tally.balance() != 0
    tally.clear()
    assert tally.balance() == 0
    assert tally.row(SIZE) == [0] * (2 * SIZE)
