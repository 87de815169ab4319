"""A real Slurm of one node on localhost, in a folder of the test's own: slurmctld and slurmd without munge."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=3
SlurmctldPort={controller}
SlurmdPort={daemon}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=60
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def available() -> str:
    """Why there is no Slurm to test with; empty if there is."""
    needed = ("slurmctld", "slurmd", "sbatch", "scontrol")
    missing = [name for name in needed if shutil.which(name, path=_path()) is None]
    return f"{', '.join(missing)} not installed (Debian: slurm-wlm)" if missing else ""


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"


def _free_ports(n: int) -> list[int]:
    found = [socket.socket() for _ in range(n)]
    for one in found:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in found]
    for one in found:
        one.close()
    return ports


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Environment variables under which Slurm's commands reach the cluster."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    controller, daemon = _free_ports(2)
    conf = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    conf.write_text(CONF.format(host=host, user=getpass.getuser(), controller=controller, daemon=daemon, folder=folder))
    environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": _path()}
    processes = []
    try:
        for command in (["slurmctld", "-D", "-f", str(conf), "-i"], ["slurmd", "-D", "-f", str(conf), "-N", host]):
            with (folder / f"{command[0]}.out").open("wb") as out:
                processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
            time.sleep(0.5)
        _wait_until_idle(environment, folder)
        yield {"SLURM_CONF": str(conf), "PATH": _path()}
    finally:
        subprocess.run(["scancel", f"--user={getpass.getuser()}"], env=environment, check=False, capture_output=True)
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        seen = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True)
        if seen.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.out"))
    raise RuntimeError(f"Slurm did not start: {seen.stdout}{seen.stderr}\n{logs}")
