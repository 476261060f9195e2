"""How the suite is collected: tests over ranks run in jobs of their own, slow ones only when asked for.

A plain pytest never touches MPI. It does not collect ``tests/mpi``; ``tests/test_ranks.py`` starts these under
``mpirun`` instead, also when they are given as paths or selected by ``-k`` and ``-m``.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fresh, on_rank
from support.ranks import NO_TESTS, RANK_ARGUMENTS

TESTS = Path(__file__).parent
RANKS_FILE = TESTS / "test_ranks.py"
MPI_TESTS = TESTS / "mpi"


def take_signals_back() -> None:
    """Undo what nohup or a shell's background job did to signals: the commands under test would inherit it."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Leave out slow tests unless ``-m`` is given, and turn paths below ``tests/mpi`` into jobs."""
    take_signals_back()
    selection = ["-k", config.option.keyword] if config.option.keyword else []
    selection += ["-m", config.option.markexpr] if config.option.markexpr else []
    config.option.markexpr = config.option.markexpr or "not slow"
    if config.getoption("--with-mpi"):
        on_rank.pytest_configure(config)
        return
    inside = [argument for argument in config.args if _is_mpi_test(config, argument)]
    if inside:
        others = [argument for argument in config.args if argument not in inside]
        config.args[:] = [*others, f"{RANKS_FILE}::test_on_ranks"]
    paths = [str(config.invocation_params.dir / argument) for argument in inside] or [str(MPI_TESTS)]
    config.stash[RANK_ARGUMENTS] = [*selection, *paths]


def pytest_report_header() -> str:
    """Name the seed of random inputs."""
    return f"random inputs: HPCPIPE_TEST_SEED={fresh.SEED}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test random inputs of its own."""
    fresh.start(item.nodeid)


def _is_mpi_test(config: pytest.Config, argument: str) -> bool:
    path = config.invocation_params.dir / argument.partition("::")[0]
    return path.resolve().is_relative_to(MPI_TESTS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keep a plain process away from the modules that use MPI."""
    if not config.getoption("--with-mpi") and collection_path.is_relative_to(MPI_TESTS):
        return True
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let ``-k test_on_ranks`` mean all tests over ranks."""
    if item.path.is_relative_to(MPI_TESTS):
        item.extra_keyword_matches.update((RANKS_FILE.name, "test_on_ranks"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Let ``-k`` and ``-m`` select among the tests inside a job, not among the jobs."""
    jobs = [item for item in items if item.path == RANKS_FILE and item.get_closest_marker("slow") is None]
    items[:] = [item for item in items if item not in jobs]
    result = yield
    if jobs and _selects_any(config.stash[RANK_ARGUMENTS]):
        items += jobs
    elif jobs:
        config.hook.pytest_deselected(items=jobs)
    return result


def _selects_any(arguments: list[str]) -> bool:
    """Ask a process of its own, which may import MPI, whether any test over ranks is selected."""
    if not {"-k", "-m"} & set(arguments):
        return True
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--with-mpi", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *arguments], cwd=TESTS.parent, capture_output=True, stdin=subprocess.DEVNULL, timeout=120
    )
    return result.returncode != NO_TESTS
