"""Rows 40 to 49 of the fault matrix: signals, the launcher, clocks, memory, files, MPI, and a user's code."""

from hpcpipe.chaos.row import FULL_DISK, Act, Event, Expected, Row
from hpcpipe.errors import ExitCode

_STOPPED = Expected(
    "checkpoint, exit 75, nothing lost when it is started again",
    code=ExitCode.STOPPED,
    bits="restart",
    events=(Event("stopped"),),
    max_end_s=15.0,
)
_FULL_DISK = f"""\
cd "$HPCPIPE_CHAOS_FOLDER" && mkdir {FULL_DISK} && mount -t tmpfs -o size=4k tmpfs {FULL_DISK}
head -c 4096 /dev/zero > {FULL_DISK}/metrics.jsonl
cd "$OLDPWD"
"""
_UNDISTURBED = Expected("training is not disturbed", absent=("recovered",))


def _failed(told: str, text: str = "all leave with exit 71 and say why; started again, nothing is lost") -> Expected:
    return Expected(text, code=ExitCode.RANK_FAILED, bits="restart", told=(told,))


def _asked_to_stop() -> tuple[Row, ...]:
    """Return the rows in which the run is to end early."""
    return (
        Row("40.usr1", "SIGUSR1 to the launcher", "step", _STOPPED, acts=(Act("SIGUSR1", "launch"),)),
        Row("40.term", "SIGTERM to the launcher", "step", _STOPPED, acts=(Act("SIGTERM", "launch"),)),
        Row(
            "40.twice",
            "SIGTERM, and again during the write",
            "step, write",
            _STOPPED,
            acts=(Act("SIGTERM", "launch"), Act("SIGTERM", "launch")),
        ),
        Row("41.int", "SIGINT (Ctrl-C)", "step", _STOPPED, acts=(Act("SIGINT", "launch"),)),
        Row("41.hup", "SIGHUP (closed terminal)", "step", _STOPPED, acts=(Act("SIGHUP", "launch"),)),
        Row(
            "42.mpirun",
            "SIGKILL of mpirun",
            "step",
            Expected(
                "exit 71, no process is left; started again, nothing is lost",
                code=ExitCode.RANK_FAILED,
                bits="restart",
                max_end_s=10.0,
            ),
            acts=(Act("SIGKILL", "mpirun"),),
        ),
        Row(
            "42.supervisor",
            "SIGKILL of the node's supervisor",
            "step",
            _UNDISTURBED,
            acts=(Act("SIGKILL", "supervisor"),),
        ),
    )


def _of_the_machine() -> tuple[Row, ...]:
    """Return the rows in which the machine has too little of something."""
    clock = "clock:process={process}:shift={shift}:step={{step}}"
    return (
        Row("43.later", "clock of process 0 jumps by +1 h", "step", _UNDISTURBED, clock.format(process=0, shift=3600)),
        Row(
            "43.earlier", "clock of process 0 jumps by -1 h", "step", _UNDISTURBED, clock.format(process=0, shift=-3600)
        ),
        Row("43.other", "clock of process 2 is 1 h ahead", "all", _UNDISTURBED, "clock:process=2:phase=setup"),
        Row(
            "44",
            "no memory for one rank",
            "backward",
            _failed("MemoryError"),
            "memory:process=1:step={step}:phase=backward",
            spares=1,
        ),
        Row(
            "45.absent",
            "/dev/shm cannot be written",
            "start",
            _UNDISTURBED,
            before="mount -t tmpfs -o ro,size=4k tmpfs /dev/shm",
            is_alone=True,
        ),
        Row(
            "45.full",
            "/dev/shm is full",
            "start",
            _UNDISTURBED,
            before="mount -t tmpfs -o size=64k tmpfs /dev/shm",
            is_alone=True,
        ),
        Row(
            "45.few-files",
            "too few open files allowed (ulimit -n 32)",
            "start",
            Expected("ends at once, says so", code=ExitCode.RANK_FAILED, bits="restart"),
            before="ulimit -n 32",
        ),
        Row(
            "45.no-files",
            "process 0 can open no more files",
            "step",
            Expected(
                "exit 74 with the file's name; started again, nothing is lost", code=ExitCode.DISK, bits="restart"
            ),
            "files:process=0:step={step}:phase=update",
        ),
        Row(
            "46",
            "SIGKILL of a middle stage, messages over TCP",
            "forward",
            Expected(
                "a spare takes over, at most 1 step lost", events=(Event("recovered", max_lost_steps=1, max_s=2.0),)
            ),
            "kill:process=1:step={step}:phase=forward:microbatch={microbatch}",
            spares=1,
            environ={"OMPI_MCA_btl": "self,tcp"},
        ),
    )


def _of_programs() -> tuple[Row, ...]:
    """Return the rows about what MPI lacks, and defects in programs."""
    return (
        Row(
            "47",
            "SIGKILL without MPI's fault tolerance",
            "forward",
            _failed("recovery", "says at start that recovery is off, exit 71; started again, nothing is lost"),
            "kill:process=1:step={step}:phase=forward",
            options=("--recovery", "off"),
        ),
        Row(
            "48",
            "exception in a user's code on one rank",
            "backward",
            _failed("InjectedError"),
            "raise:process=2:step={step}:phase=backward",
            spares=1,
        ),
        Row(
            "48.exit",
            "sys.exit in a user's code on one rank",
            "forward",
            Expected("it dies, and the others go on without it", events=(Event("recovered", max_lost_steps=1),)),
            "exit:process=1:step={step}:phase=forward:code=3",
        ),
        Row(
            "49.removed",
            "metrics.jsonl is removed",
            "step",
            Expected("training is not disturbed", absent=("recovered",), keeps_metrics=False),
            acts=(Act("remove", "metrics.jsonl"),),
        ),
        Row(
            "49.full",
            "metrics.jsonl is on a full disk",
            "step",
            Expected(
                "training is not disturbed, dropped rows are counted",
                absent=("recovered",),
                events=(Event("rows dropped"),),
                told=("metrics.jsonl could not be written",),
                keeps_metrics=False,
            ),
            acts=(Act("fill", "metrics.jsonl"),),
            before=_FULL_DISK,
            is_alone=True,
        ),
    )


ROWS = (*_asked_to_stop(), *_of_the_machine(), *_of_programs())
