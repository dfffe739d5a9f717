"""A real slurmctld and slurmd on loopback, for tests: Debian's slurm-wlm, installed or unpacked into a folder.

Programs are looked for on PATH, and in the folder $PAM_SLURM_ROOT, into which slurmctld, slurmd, slurm-client,
slurm-wlm-basic-plugins and what they need were unpacked (`apt-get download`, `dpkg -x`). Nothing is fetched,
and nothing outside of the given folder is written.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CONFIGURATION = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# Their names are addresses of this machine, where programs that are given them find it.
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000 Gres=gpu:2\n"
WAIT_SECONDS = 30.0


class NoSlurm(Exception):
    """Why there is no Slurm on this machine."""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _environment(folder: Path) -> tuple[dict[str, str], list[str]]:
    """What programs of Slurm need to be found and to find their parts; further lines of the configuration."""
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin"}
    lines = []
    root = os.environ.get("PAM_SLURM_ROOT")
    if root:
        usr = Path(root).resolve() / "usr"
        environment["PATH"] = f"{usr}/bin:{usr}/sbin:{environment['PATH']}"
        plugins = next(iter(sorted(usr.glob("lib/*/slurm-wlm"))), None)
        if plugins is None:
            raise NoSlurm(f"$PAM_SLURM_ROOT ({root}) holds no usr/lib/*/slurm-wlm")
        environment["LD_LIBRARY_PATH"] = f"{plugins.parent}:{plugins}"
        lines.append(f"PluginDir={plugins}")
    return environment, lines


def _program(name: str, environment: dict[str, str]) -> str:
    # Debian's own names; packages that were only unpacked lack the alternatives without -wlm.
    for wanted in (name, f"{name}-wlm"):
        if found := shutil.which(wanted, path=environment["PATH"]):
            return found
    raise NoSlurm(f"{name} is neither on PATH nor in $PAM_SLURM_ROOT (Debian: slurm-wlm)")


@contextmanager
def real_slurm(folder: Path, nodes: int = 1) -> Iterator[dict[str, str]]:
    """Start a cluster of nodes 127.0.0.1 and so on, configured in ``folder``; yields the environment of its commands.

    Raises NoSlurm with the reason where that is not possible here. All daemons are ended with the context.
    """
    environment, lines = _environment(folder)
    programs = {name: _program(name, environment) for name in ("slurmctld", "slurmd", "slurmstepd")}
    for name in ("sbatch", "srun", "squeue", "scancel", "sinfo"):
        _program(name, environment)
    if os.getuid() != 0:
        raise NoSlurm("slurmd must be started by root")
    names = [f"127.0.0.{number}" for number in range(1, nodes + 1)]
    for name in ("state", *(f"spool/{name}" for name in names)):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    text = "".join(NODE.format(name=name, host=host, port=_free_port()) for name in names)
    text += CONFIGURATION.format(host=host, user="root", port=_free_port(), folder=folder)
    (folder / "slurm.conf").write_text(text + "".join(f"{line}\n" for line in lines))
    # Nothing here asks for control groups; what is found by itself, version 2, would need systemd.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # devices that are there
    env = {**os.environ, **environment}
    logs = [folder / "slurmctld.log", *(folder / f"slurmd-{name}.log" for name in names)]
    with ExitStack() as stack:
        node = [programs["slurmd"], "-D", "-d", programs["slurmstepd"], "-N"]
        commands = [[programs["slurmctld"], "-D"], *([*node, name] for name in names)]
        for command, log in zip(commands, logs, strict=True):
            file = stack.enter_context(log.open("wb"))
            daemon = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            seen = subprocess.run(["sinfo", "-h", "-o", "%t %D"], env=env, capture_output=True, text=True, check=False)
            if seen.stdout.strip() == f"idle {nodes}":
                break
            if time.monotonic() > deadline:
                last = "; ".join(" ".join(log.read_text(errors="replace").splitlines()[-2:]) for log in logs)
                raise NoSlurm(f"slurmctld and slurmd did not come up in {WAIT_SECONDS:.0f} s: {last}")
            time.sleep(0.2)
        yield environment
