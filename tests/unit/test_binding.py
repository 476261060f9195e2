"""Which cores ranks get, on made-up machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcpipe.cluster.binding import BIND, Binding, bind, deal, find_cores
from hpcpipe.cluster.launcher import find_mpirun, mpirun_command, rank_environment, this_machine

ASKED = {BIND: "cores"}


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def machine(root: Path, num_domains: int, num_cores: int, num_hardware_threads: int = 1) -> frozenset[int]:
    """Describe a machine; the second hardware threads are numbered after all first ones, as Linux does on x86."""
    total = num_domains * num_cores
    for core in range(total):
        siblings = [core + total * thread for thread in range(num_hardware_threads)]
        for cpu in siblings:
            listed = ",".join(map(str, siblings)) + "\n"
            write(root, f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", listed)
    for domain in range(num_domains):
        first = domain * num_cores
        spans = [(first + total * thread, first + total * thread + num_cores - 1) for thread in range(2)]
        listed = ",".join(f"{a}-{b}" for a, b in spans[:num_hardware_threads])
        write(root, f"sys/devices/system/node/node{domain}/cpulist", listed + "\n")
    return frozenset(range(total * num_hardware_threads))


def spans(binding: Binding) -> list[list[int]]:
    return [sorted(binding.processors(index)) for index in range(len(binding.ranks))]


def test_cores_and_domains_are_found(tmp_path: Path) -> None:
    processors = machine(tmp_path, 2, 2, 2)
    assert find_cores(processors, tmp_path) == [[{0, 4}, {1, 5}], [{2, 6}, {3, 7}]]
    assert find_cores({1, 3, 7}, tmp_path) == [[{1}], [{3, 7}]]
    assert find_cores({4, 5, 0}, tmp_path) == [[{0, 4}, {5}]]


def test_a_machine_that_says_nothing_is_one_domain_of_single_processors(tmp_path: Path) -> None:
    assert find_cores({3, 0, 1}, tmp_path) == [[{0}, {1}, {3}]]


@pytest.mark.parametrize(
    ("num_domains", "num_cores", "num_ranks", "num_threads", "expected"),
    [
        (1, 4, 2, 2, ["01", "23"]),
        (1, 4, 4, 1, ["0", "1", "2", "3"]),
        (2, 4, 2, 4, ["0123", "4567"]),
        (2, 4, 2, 2, ["01", "45"]),
        (2, 4, 4, 1, ["0", "2", "4", "6"]),
        (2, 4, 3, 2, ["01", "23", "45"]),
        (4, 2, 2, 4, ["0123", "4567"]),
        (4, 2, 2, 1, ["0", "4"]),
        (2, 3, 3, 2, ["01", "23", "45"]),
        (2, 3, 2, 3, ["012", "345"]),
        (1, 4, 5, 1, []),
        (2, 2, 2, 3, []),
    ],
)
def test_ranks_lie_within_domains_where_they_can(
    tmp_path: Path, num_domains: int, num_cores: int, num_ranks: int, num_threads: int, expected: list[str]
) -> None:
    domains = find_cores(machine(tmp_path, num_domains, num_cores), tmp_path)
    dealt = ["".join(str(min(core)) for core in cores) for cores in deal(domains, num_ranks, num_threads)]
    assert dealt == expected


def test_no_core_is_dealt_twice(tmp_path: Path) -> None:
    domains = find_cores(machine(tmp_path, 3, 5), tmp_path)
    for num_ranks in range(1, 16):
        for num_threads in range(1, 15 // num_ranks + 1):
            dealt = deal(domains, num_ranks, num_threads)
            cores = [core for cores in dealt for core in cores]
            assert len(dealt) == num_ranks
            assert len(cores) == len(set(cores)) == num_ranks * num_threads


def test_ranks_take_whole_cores(tmp_path: Path) -> None:
    processors = machine(tmp_path, 1, 4, 2)
    binding = bind([4, 5], [processors, processors], 2, ASKED, tmp_path)
    assert spans(binding) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert (binding.num_cores, binding.are_apart, binding.is_oversubscribed) == (4, True, False)
    assert binding.own_cores(1) == ({2, 6}, {3, 7})
    assert binding.describe() == "2 ranks with 2 threads each: rank 4 on 0-1,4-5, rank 5 on 2-3,6-7"


def test_ranks_inside_a_mask_take_cores_of_the_mask(tmp_path: Path) -> None:
    machine(tmp_path, 2, 4)
    mask = frozenset({2, 3, 5, 6})
    assert spans(bind([0, 1], [mask, mask], 2, ASKED, tmp_path)) == [[2, 3], [5, 6]]


@pytest.mark.parametrize("environ", [{}, {BIND: "none"}])
def test_ranks_that_nobody_asked_to_bind_stay_where_they_are(tmp_path: Path, environ: dict[str, str]) -> None:
    processors = machine(tmp_path, 1, 4)
    binding = bind([0, 1], [processors, processors], 2, environ, tmp_path)
    assert spans(binding) == [[0, 1, 2, 3]] * 2
    assert binding.own_cores(0) == ()
    assert binding.describe() == "2 ranks with 2 threads each share 0-3, not bound"


def test_ranks_that_the_launcher_has_bound_keep_their_cores(tmp_path: Path) -> None:
    machine(tmp_path, 1, 4)
    binding = bind([0, 1], [frozenset({0, 2}), frozenset({1, 3})], 2, ASKED, tmp_path)
    assert spans(binding) == [[0, 2], [1, 3]]
    assert binding.own_cores(1) == ({1}, {3})
    assert binding.describe() == "2 ranks with 2 threads each: rank 0 on 0,2, rank 1 on 1,3"
    overlapping = bind([0, 1], [frozenset({0, 1}), frozenset({1, 2})], 1, ASKED, tmp_path)
    assert spans(overlapping) == [[0, 1], [1, 2]]
    assert not overlapping.are_apart


def test_ranks_on_the_hardware_threads_of_one_core_own_none(tmp_path: Path) -> None:
    machine(tmp_path, 1, 1, 2)
    binding = bind([0, 1], [frozenset({0}), frozenset({1})], 1, ASKED, tmp_path)
    assert (binding.num_cores, binding.is_oversubscribed) == (1, True)
    assert spans(binding) == [[0], [1]]
    assert binding.own_cores(0) == ()


@pytest.mark.parametrize(("num_ranks", "num_threads"), [(8, 1), (2, 2), (3, 1)])
def test_more_threads_than_cores_share_them(tmp_path: Path, num_ranks: int, num_threads: int) -> None:
    processors = machine(tmp_path, 1, 2)
    binding = bind(range(num_ranks), [processors] * num_ranks, num_threads, ASKED, tmp_path)
    assert spans(binding) == [[0, 1]] * num_ranks
    assert binding.is_oversubscribed
    assert binding.describe().endswith("share 0-1: more threads than cores")


def test_a_rank_bound_to_fewer_cores_than_threads_is_oversubscribed(tmp_path: Path) -> None:
    machine(tmp_path, 1, 8)
    binding = bind([0, 1], [frozenset({0}), frozenset({1, 2, 3})], 2, ASKED, tmp_path)
    assert binding.is_oversubscribed
    assert binding.describe() == "2 ranks with 2 threads each: rank 0 on 0, rank 1 on 1-3: more threads than cores"


def test_a_lone_rank_has_every_core(tmp_path: Path) -> None:
    processors = machine(tmp_path, 2, 4)
    binding = bind([3], [processors], 8, ASKED, tmp_path)
    assert spans(binding) == [list(range(8))]
    assert len(binding.own_cores(0)) == 8
    assert binding.describe() == "8 threads on 0-7"
    assert bind([3], [processors], 9, ASKED, tmp_path).describe() == "9 threads on 0-7: more threads than cores"


def test_under_a_quota_no_core_is_anyone_s(tmp_path: Path) -> None:
    processors = machine(tmp_path, 1, 8)
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "400000 100000")
    binding = bind([0, 1], [processors, processors], 2, ASKED, tmp_path)
    assert (binding.num_cores, binding.is_oversubscribed, binding.are_apart) == (4, False, False)
    assert bind([0, 1], [processors, processors], 3, ASKED, tmp_path).is_oversubscribed


def test_cores_that_slurm_shows_but_does_not_grant_are_not_taken(tmp_path: Path) -> None:
    processors = machine(tmp_path, 1, 8)
    for granted, is_bound in (("4(x2)", False), ("8", True), ("16", True), ("", True)):
        environ = {**ASKED, "SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": granted}
        binding = bind([0, 1], [processors, processors], 2, environ, tmp_path)
        assert (binding.num_cores, binding.are_apart) == (8 if is_bound else 4, is_bound)


def test_many_ranks_are_told_in_one_line(tmp_path: Path) -> None:
    processors = machine(tmp_path, 1, 12)
    told = bind(range(12), [processors] * 12, 1, ASKED, tmp_path).describe()
    assert told.endswith("rank 6 on 6, rank 7 on 7 and 4 more")


PROGRAM = """
import os, sys
from hpcpipe.mpi import runtime
world = runtime.start()
world.bind(int(sys.argv[1]))
print(world.rank, *sorted(os.sched_getaffinity(0)), world.tightest.num_ranks, world.tightest.num_cores, flush=True)
runtime.stop(world)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(("extra", "is_bound"), [((), True), (("--bind-to", "none"), False)])
def test_real_ranks_are_bound(extra: tuple[str, ...], is_bound: bool) -> None:
    environ = rank_environment("tests", None)
    program = [sys.executable, "-c", PROGRAM, "1"]
    command = mpirun_command(find_mpirun(), 2, program, this_machine(), extra, environ)
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    masks = [[int(word) for word in line.split()[1:-2]] for line in sorted(result.stdout.splitlines())]
    everything = sorted(os.sched_getaffinity(0))
    if is_bound:
        assert set(masks[0]).isdisjoint(masks[1]) and set(masks[0] + masks[1]) <= set(everything)
    else:
        assert masks == [everything] * 2
    assert all(line.split()[-2] == "2" for line in result.stdout.splitlines())
