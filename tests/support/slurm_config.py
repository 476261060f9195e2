"""The files of a private Slurm: configuration, prolog, epilog, and what starts a virtual node."""

import os
import pwd
import socket
from dataclasses import dataclass
from pathlib import Path

_CONFIG = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire={cred_expire}
{listen}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
TmpFS={root}/tmp/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
SlurmctldDebug=verbose
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
MpiDefault=none
TaskProlog={root}/task_prolog
Epilog={root}/epilog
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait={kill_wait}
MinJobAge=3600
EnforcePartLimits=ALL
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Boards=1 SocketsPerBoard=1"
    " CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=512000 TmpDisk=1000 State=UNKNOWN\n"
)
_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=scavenge Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=spot Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE State=UP
"""
# Nodes repeat process ids, so in a shared folder the session files of two nodes would meet.
_TASK_PROLOG = """\
#!/bin/sh
echo "export TMPDIR={root}/tmp/$SLURMD_NODENAME"
"""
# proctrack/linuxproc follows parents: what lost its parent outlives its job.
_EPILOG = """\
#!/bin/sh
for pid in $(ls /proc | grep '^[0-9]*$'); do
    has() {{ grep -qzxsF "$1" "/proc/$pid/environ"; }}
    if has "SLURM_JOB_ID=$SLURM_JOB_ID" && has "SLURM_CONF={root}/slurm.conf" &&
        has "SLURMD_NODENAME=$SLURMD_NODENAME" && ! has SLURM_SCRIPT_CONTEXT=epilog_slurmd; then
        kill -KILL "$pid"
    fi
done 2>/dev/null
exit 0
"""
# Process 1 of a node: gives it a name, memory and a disk of its own, and collects orphans.
_NODE_START = """\
#!/bin/bash
hostname "$1" && mount --bind {root}/hosts /etc/hosts && mount -t tmpfs -o mode=1777 tmpfs /dev/shm &&
    mount -t tmpfs -o mode=755 tmpfs {root}/tmp && mkdir -m 1777 {root}/tmp/"$1" || exit 1
slurmd -D -f {root}/slurm.conf -N "$1" &
slurmd=$!
while kill -0 $slurmd 2>/dev/null; do wait $slurmd; done
"""


@dataclass(frozen=True)
class Shape:
    """What a private Slurm is made of.

    Attributes
    ----------
    num_nodes : int
        Virtual nodes ``n1``, ``n2`` and so on.
    cpus : int
        Processors that each claims to have, whatever the machine has.
    has_namespaces : bool
        Nodes have host names, process tables, ``/dev/shm`` and temporary folders of their own.
    node_timeout_s, kill_wait_s, cred_expire_s : int
        Silence after which a node is down; from SIGTERM to SIGKILL; what a requeued job waits at least,
        120 where this is less than 5.
    """

    num_nodes: int = 3
    cpus: int = 8
    has_namespaces: bool = True
    node_timeout_s: int = 10
    kill_wait_s: int = 5
    cred_expire_s: int = 5

    @property
    def nodes(self) -> list[str]:
        """Their names."""
        return [f"n{number}" for number in range(1, self.num_nodes + 1)]


def write(root: Path, shape: Shape) -> None:
    """Write every file that the daemons read.

    Parameters
    ----------
    root : Path
        The cluster's own folder.
    shape : Shape
        What to make.
    """
    host = socket.gethostname().partition(".")[0]
    port = _free_ports(shape.num_nodes + 2)
    text = _CONFIG.format(
        root=root,
        host=host,
        port=port,
        slurmd_port=port + 1,
        user=pwd.getpwuid(os.geteuid()).pw_name,
        listen=_listen(host),
        cred_expire=shape.cred_expire_s,
        node_timeout=shape.node_timeout_s,
        kill_wait=shape.kill_wait_s,
    )
    for number, name in enumerate(shape.nodes):
        node_host = name if shape.has_namespaces else host
        text += _NODE.format(name=name, host=node_host, port=port + 2 + number, cpus=shape.cpus)
    (root / "slurm.conf").write_text(text + _PARTITIONS)
    names = "".join(f"127.0.0.1 {name}\n" for name in ("localhost", host, *shape.nodes))
    (root / "hosts").write_text(names)
    for name, script in (("task_prolog", _TASK_PROLOG), ("epilog", _EPILOG), ("node_start", _NODE_START)):
        (root / name).write_text(script.format(root=root))
        (root / name).chmod(0o755)


def _listen(host: str) -> str:
    """Keep daemons off other machines' reach where the host's name allows it; elsewhere MUNGE guards them."""
    try:
        is_local = socket.gethostbyname(host) == "127.0.0.1"
    except OSError:
        is_local = False
    # Told not to listen everywhere, they listen on what the host's name resolves to.
    return "CommunicationParameters=NoCtldInAddrAny,NoInAddrAny" if is_local else ""


def _free_ports(count: int) -> int:
    """Return the first of several free ports in a row."""
    for first in range(20000 + os.getpid() % 400 * 24, 31000, 24):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError("no free ports in a row")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
