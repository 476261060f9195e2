"""Bad input: one message that names key or file, numbers and cure, the right code, soon, and nothing half-written."""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from support.commands import Finished, bits, contents, events, run, status, step_rows, wait_until
from support.runs import Runs

LIMIT_S = 5.0
FAILING_RANK = Path(__file__).parents[1] / "support/failing_rank.py"


def limit_s() -> float:
    """Return the seconds in which a bad start must be over, more where other programs use the machine."""
    return LIMIT_S * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def assert_refused(finished: Finished, directory: Path, code: int, *parts: str) -> None:
    """Check the one message, the codes, and the time."""
    (message,) = finished.messages
    assert finished.stderr.startswith("hpcpipe: error: ")
    assert "Traceback" not in finished.stderr
    for part in parts:
        assert part in message, message
    assert finished.code == code
    # A run that is done stays so.
    found = status(directory)
    assert found["state"] == ("done" if "later_start" in found else "failed")
    told = found.get("later_start", found)
    assert told["exit_code"] == code
    assert told["cause"] in message
    assert finished.elapsed_s < limit_s()


def unchanged(before: dict[str, bytes], directory: Path) -> None:
    """See that metrics and checkpoints are what they were, and that nothing half-written lies about."""
    after = contents(directory)
    small = {"status.json", "events.jsonl"}
    assert {name: after[name] for name in after if name not in small} == {
        name: before[name] for name in before if name not in small
    }
    assert not [path for path in directory.rglob("*") if "partial" in path.name or path.name.startswith("trash-")]
    assert not (directory / "lock.json").exists()


@pytest.mark.parametrize(
    ("num_ranks", "settings", "parts"),
    [
        (2, ["train.stpes=3"], ["train.stpes", "train.steps"]),
        (3, ["parallel.pipeline=2", "parallel.data=2"], ["pipeline = 2", "data = 2", "4 ranks", "3 ranks", "-n 4"]),
        (3, ["parallel.data=2"], ["parallel.data = 2", "3", "-n 4"]),
        (3, ["model.layers=1"], ["model.layers = 1", "3 stages", "model.layers = 2", "-n 1"]),
        (3, ["parallel.partition=[2,2,2]"], ["parallel.partition = [2, 2, 2]", "6 layers", "model.layers = 5"]),
        (2, ["parallel.schedule=forward"], ["parallel.schedule = forward", "no backward", "1f1b"]),
        (2, ["model.vocab=200"], ["model.vocab = 200", "257", "model.vocab = 257"]),
        (2, ["model.vocab=300", "model.width=48"], ["width", "48", "32", "vocab", "300", "257", "run.name"]),
        (3, ["model.layers=6", "model.tied=false"], ["layers", "6", "5", "tied", "run.name"]),
    ],
)
def test_configurations_that_cannot_be(runs: Runs, copy_of_finished, num_ranks: int, settings, parts) -> None:
    directory = copy_of_finished("run")
    before = contents(directory)
    finished = runs.train("run", num_ranks, "train.steps=30", *settings)
    assert_refused(finished, directory, 64, *parts)
    unchanged(before, directory)


def test_a_new_run_that_cannot_be_makes_nothing_but_its_status(runs: Runs) -> None:
    finished = runs.train("run", 2, "train.stpes=3")
    assert_refused(finished, runs.directory("run"), 64, "train.stpes")
    assert list(contents(runs.directory("run"))) == ["status.json"]


def test_without_a_configuration(runs: Runs) -> None:
    finished = run(["launch", "-n", 2, "train", runs.root / "nowhere.toml"], runs.root / "output")
    assert finished.code == 64
    (message,) = finished.messages
    assert "nowhere.toml" in message
    assert finished.elapsed_s < limit_s()


def missing(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5000)


def text(path: Path) -> None:
    path.write_text("To be or not to be")


@pytest.mark.parametrize(
    ("damage", "num_ranks", "parts"),
    [
        (missing, 3, ["no such token file", "hpcpipe data prepare"]),
        (truncated, 2, ["truncated", "{expected}", "{found}", "hpcpipe data prepare"]),
        (text, 1, ["not a token file"]),
    ],
)
def test_damaged_token_files(runs: Runs, tokens: Path, copy_of_finished, damage, num_ranks: int, parts) -> None:
    path = runs.root / "my-tokens.h5"
    shutil.copy(tokens, path)
    numbers = {"expected": path.stat().st_size, "found": path.stat().st_size - 5000}
    damage(path)
    directory = copy_of_finished("run")
    before = contents(directory)
    finished = runs.train("run", num_ranks, f"data.file={path}", "train.steps=30")
    assert_refused(finished, directory, 65, str(path), *(part.format(**numbers) for part in parts))
    unchanged(before, directory)


def test_a_token_file_that_goes_bad_below_the_run(runs: Runs, tokens: Path, copy_of_finished) -> None:
    path = runs.root / "my-tokens.h5"
    content = bytearray(tokens.read_bytes())
    place = len(content) * 3 // 4
    content[place] ^= 4
    path.write_bytes(content)
    directory = copy_of_finished("run")
    before = contents(directory / "checkpoints")
    finished = runs.train("run", 2, f"data.file={path}", "train.steps=30")
    assert_refused(finished, directory, 65, str(path), "damaged between byte", "hpcpipe data prepare")
    assert contents(directory / "checkpoints") == before


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def checkpoint(directory: Path, step: int) -> Path:
    return directory / f"checkpoints/step-{step:08d}"


@pytest.mark.parametrize(("name", "num_ranks"), [("rank-0000.h5", 1), ("rank-0001.h5", 3), ("manifest.json", 2)])
def test_a_damaged_newest_checkpoint(runs: Runs, finished_run, copy_of_finished, name: str, num_ranks: int) -> None:
    directory = copy_of_finished("run")
    flip(checkpoint(directory, 20) / name)
    finished = runs.train("run", num_ranks)
    assert finished.code == 0, finished.stderr
    assert status(directory)["state"] == "done"
    (refused,) = events(directory, "checkpoint refused")
    assert refused["path"] == str(checkpoint(directory, 20))
    assert name in refused["problem"]
    assert "passed over step-00000020" in finished.stdout
    assert f"resumed from {checkpoint(directory, 15)}" in finished.stdout
    assert bits(directory) == bits(finished_run)
    verified = runs.hpcpipe("checkpoint", "verify", directory)
    assert verified.code == 0, verified.stdout


def test_no_checkpoint_is_sound(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    for path in sorted((directory / "checkpoints").iterdir()):
        flip(path / "rank-0001.h5")
    before = contents(directory)
    finished = runs.train("run", 2, "train.steps=30")
    assert_refused(finished, directory, 65, *(f"step-{step:08d}/rank-0001.h5" for step in (5, 10, 15, 20)))
    unchanged(before, directory)


def test_the_checkpoint_that_was_asked_for_is_damaged(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    flip(checkpoint(directory, 20) / "rank-0000.h5")
    before = contents(directory)
    finished = runs.train("run", 2, "--resume", checkpoint(directory, 20), "train.steps=30")
    assert_refused(finished, directory, 65, "step-00000020/rank-0000.h5")
    unchanged(before, directory)


@pytest.mark.parametrize("victim", [0, 2])
def test_an_exception_on_one_rank(runs: Runs, victim: int) -> None:
    words = runs.arguments("run", 3, ["checkpoint.every=2"], ["--recovery", "off"])
    driver = [sys.executable, FAILING_RANK, victim, 6]
    finished = run([*driver, *words], runs.root / "output")
    directory = runs.directory("run")
    assert finished.code == status(directory)["exit_code"] == 71
    assert status(directory)["state"] == "failed"
    assert f"rank {victim}: ZeroDivisionError: made by a test" in status(directory)["cause"]
    assert finished.stderr.count("Traceback") == 1
    assert f"rank {victim} of 3 on " in finished.stderr.splitlines()[0]
    assert finished.stderr.rstrip().endswith("ZeroDivisionError: made by a test")
    assert len(step_rows(directory)) == status(directory)["step"] == 5
    # One that was being written when the rank failed is not valid, and the next start removes it.
    names = {path.name for path in (directory / "checkpoints").glob("step-????????")}
    assert names <= {"step-00000002", "step-00000004"}
    assert status(directory)["checkpoint_step"] == max([0, *(int(name[-8:]) for name in names)])
    assert not names or runs.hpcpipe("checkpoint", "verify", directory).code == 0


@pytest.mark.parametrize(
    ("recovery", "message"),
    # Where ranks survive each other, mpirun ends the others only if none of them has begun to start MPI.
    [("off", "rank 1 ended with exit code 3"), ("on", r"(rank 1 on \S+ has ended|mpirun ended with code 3)")],
)
def test_a_rank_that_does_not_start(runs: Runs, tmp_path: Path, recovery: str, message: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('OMPI_COMM_WORLD_RANK') == '1':\n    os._exit(3)\n"
    )
    words = runs.arguments("run", 3, launch=("--recovery", recovery))
    finished = run(words, runs.root / "output", {"PYTHONPATH": str(tmp_path)}, limit_s=30)
    directory = runs.directory("run")
    assert finished.code == status(directory)["exit_code"] == 71
    (told,) = finished.messages
    assert re.match(f"{message} before the run was done", told)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("moment", ["start", "disk"])
def test_an_error_of_one_rank_at_the_start(runs: Runs, victim: int, moment: str) -> None:
    """The others survive it, and wait in a collective: they leave without a word."""
    words = [sys.executable, FAILING_RANK, victim, moment, *runs.arguments("run", 3)]
    finished = run(words, runs.root / "output", limit_s=30)
    directory = runs.directory("run")
    assert finished.code == status(directory)["exit_code"] == (74 if moment == "disk" else 71)
    if moment == "disk":
        assert finished.stderr == f"hpcpipe: error: rank {victim} of 3: made by a test\n"
    else:
        assert finished.stderr.count("Traceback") == 1
        assert f"rank {victim} of 3 on " in finished.stderr.splitlines()[0]
    assert "made by a test" in status(directory)["cause"]


def test_two_runs_in_one_directory(runs: Runs, finished_run: Path) -> None:
    directory = runs.directory("run")
    first = runs.start("run", 2, "checkpoint.every=0", environ={"HPCPIPE_TEST_MESSAGES": "delay=0.4"})
    try:
        wait_until(lambda: len(step_rows(directory)) >= 2, "two rows", first)
        before = contents(directory)
        second = run(runs.arguments("run", 2), runs.root / "second.output")
        # Wrong settings are found before the lock is looked at; they must not disturb the first run either.
        third = run(runs.arguments("run", 2, ["train.stpes=3"]), runs.root / "third.output")
        after = contents(directory)
        assert first.process.poll() is None, "the first run was over too soon"
        first.process.send_signal(signal.SIGTERM)
        finished = first.wait(30)
        first.assert_nobody_left()
    finally:
        first.kill()
    (message,) = second.messages
    for part in (str(directory), "in use by process", "run.name"):
        assert part in message
    assert (second.code, third.code, len(third.messages)) == (73, 64, 1)
    assert max(second.elapsed_s, third.elapsed_s) < limit_s()
    for name in ("status.json", "config.toml", "lock.json", "events.jsonl"):
        assert after[name] == before[name], name
    assert after["metrics.jsonl"].startswith(before["metrics.jsonl"])
    assert finished.code == 75, finished.stderr
    assert status(directory)["state"] == "stopped"
    runs.train_well("run", 2)
    assert bits(directory) == bits(finished_run)


def test_a_run_directory_that_cannot_be_made(runs: Runs) -> None:
    blocker = runs.root / "blocker"
    blocker.write_text("a file, not a folder")
    finished = runs.train("run", 2, f"run.dir={blocker}")
    assert finished.code == 74
    (message,) = finished.messages
    for part in ("run.dir", str(blocker), "Not a directory", "choose another"):
        assert part in message
    assert finished.elapsed_s < limit_s()
    assert blocker.read_text() == "a file, not a folder"


@pytest.mark.parametrize("settings", [["train.clip=0"], ["parallel.data=2"]])
def test_numbers_that_overflow(runs: Runs, copy_of_finished, settings: list[str]) -> None:
    directory = copy_of_finished("run")
    before = contents(directory / "checkpoints")
    rate = ["train.learning_rate=1e30", "train.min_learning_rate=1e30", "train.steps=30", "checkpoint.every=10"]
    finished = runs.train("run", 2, *rate, *settings)
    assert_refused(finished, directory, 70, "step 2", "train.learning_rate", "1e+30", "last checkpoint")
    assert contents(directory / "checkpoints") == before
    assert runs.hpcpipe("checkpoint", "verify", directory).code == 0


def test_delay_of_the_tests_is_not_a_number(runs: Runs) -> None:
    finished = runs.train("run", 2, environ={"HPCPIPE_TEST_MESSAGES": "delay=soon"})
    assert_refused(finished, runs.directory("run"), 64, "delay=soon")


def test_an_update_that_breaks_the_weights_is_not_kept(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    before = contents(directory / "checkpoints")
    rate = ["train.learning_rate=1e38", "train.min_learning_rate=1e38", "train.warmup_steps=0", "train.steps=21"]
    finished = runs.train("run", 2, *rate)
    assert_refused(finished, directory, 70, "step 21", "train.learning_rate", "1e+38")
    assert contents(directory / "checkpoints") == before


def test_going_back_below_later_steps(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    before = contents(directory)
    finished = runs.train("run", 2, "--resume", checkpoint(directory, 10), "train.steps=12")
    assert_refused(finished, directory, 64, "step-00000020", "1 more", "step 10", "another run.name")
    unchanged(before, directory)


def test_damaged_newer_checkpoints_do_not_push_out_what_is_written(runs: Runs, copy_of_finished) -> None:
    directory = copy_of_finished("run")
    for step in (15, 20):
        flip(checkpoint(directory, step) / "rank-0001.h5")
    finished = runs.train("run", 2, "train.steps=12", "checkpoint.keep=2")
    assert finished.code == 0, finished.stderr
    left = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert left == [f"step-{step:08d}" for step in (10, 12, 15, 20)]
    assert runs.train("run", 2, "train.steps=13", "checkpoint.keep=2").code == 0


def test_a_model_larger_than_the_memory(runs: Runs) -> None:
    finished = runs.train("run", 2, "model.width=4194304", "model.heads=1")
    assert_refused(finished, runs.directory("run"), 64, "GiB per rank", "GiB are free", "model.width")
