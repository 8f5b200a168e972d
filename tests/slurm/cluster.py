"""A Slurm cluster of its own on this machine, for tests: a controller and nodes, each in namespaces of its own.

A node has its own address, host name and process numbers, so that it can be killed as a whole, as by a power cut. Needs
root and Debian's slurmctld, slurmd, slurm-client and munge; nothing outside of the cluster's folder is written, and
whatever it starts ends with this process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2 util-linux"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# Launchers' variables are exported into a job by sbatch, and would be taken for its own.
LAUNCHERS = ("SLURM", "SBATCH", "SRUN", "MASTER_", "TORCHELASTIC", "RANK", "WORLD_SIZE", "LOCAL_RANK")
POLL_SECONDS = 0.1

CONFIGURATION = """\
ClusterName=test{number}
SlurmctldHost={host}({subnet}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=30
KillWait=5
BatchStartTimeout=60
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=300 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def reason_to_skip() -> str | None:
    """Why no cluster can be started here; None if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"Slurm cannot be had: {', '.join(missing)} not found; apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "Slurm cannot be had: starting its daemons needs root"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"Slurm cannot be had: no namespaces here ({probe.stderr.strip()})" if probe.returncode else None


class Cluster:
    """A controller and nodes n1, n2 ... of one GPU each; a device that stands for one, which no program may use.

    Args:
        folder: a short path, for sockets are in it.
        number: 1 to 249, of which ports, addresses and names of interfaces are made.
    """

    def __init__(self, folder: Path, number: int, nodes: int = 2) -> None:
        self.folder, self.number = folder, number
        self.nodes = [f"n{index + 1}" for index in range(nodes)]
        self.subnet, self.port = f"10.213.{number}", 26_000 + 20 * number
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Return when all nodes are idle."""
        self._write_configuration()
        self._lay_network()
        munged = ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket"]
        munged += [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._run("munged", munged)
        self._until((self.folder / "munge.socket").exists, 30)
        self._run("slurmctld", ["slurmctld", "-D", "-c", "-f", f"{self.folder}/slurm.conf"])
        for node in self.nodes:
            self.boot(node)
        self._until(lambda: self.states() == ["idle"] * len(self.nodes), 60)

    def boot(self, node: str) -> None:
        """Start a node."""
        unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        place = ["nsenter", f"--net=/run/netns/{self._namespace(node)}", *unshare]
        self._run(node, [*place, str(HERE / "node.sh"), str(self.folder), node])

    def crash(self, node: str) -> None:
        """Kill everything on a node at once, and let the controller know, which would notice it in a minute."""
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        self.command("scontrol", "update", f"nodename={node}", "state=down", "reason=crash")

    def stop(self) -> None:
        """End everything that was started; to be called even if `start` failed."""
        for name in (*self.nodes, "slurmctld", "munged"):
            if name in self._daemons:
                self._daemons[name].kill()
                self._daemons.pop(name).wait()
        self._clear_network()

    def command(self, *words: str, cwd: Path | None = None, check: bool = True) -> str:
        """Output of a command in this cluster's environment."""
        done = subprocess.run(words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self) -> list[str]:
        """Every node's state; none while the controller does not answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.command("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
        return []

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        line = self.command("scontrol", "show", "job", "--oneliner", number)
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def wait(
        self, number: str, states: Sequence[str] = ENDED, restarts: int = 0, timeout: float = 600
    ) -> dict[str, str]:
        """The job once it is in one of these states, started again so often."""
        found: dict[str, str] = {}

        def reached() -> bool:
            nonlocal found
            found = self.job(number)
            wanted = found["JobState"] in states and int(found["Restarts"]) >= restarts
            assert wanted or found["JobState"] not in ENDED, f"job {number} ended before it was wanted: {found}"
            return wanted

        self._until(reached, timeout, lambda: f"job {number} is {found}")
        return found

    def wait_for_port(self, node: str, port: int, timeout: float = 300) -> None:
        """Return when a program on a node answers at its loopback address."""
        probe = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        command = ["nsenter", f"--net=/run/netns/{self._namespace(node)}", sys.executable, "-c", probe]
        self._until(
            lambda: subprocess.run(command, capture_output=True, timeout=60).returncode == 0,
            timeout,
            lambda: f"nothing answers at port {port} of {node}",
        )

    def wait_for_file(self, path: Path, number: str, timeout: float = 600) -> None:
        """Return when a file is there, while its job runs."""

        def there() -> bool:
            assert self.job(number)["JobState"] not in ENDED, f"job {number} ended before {path} was there"
            return path.exists()

        self._until(there, timeout, lambda: f"{path} is not there; job {number} is {self.job(number)}")

    def _until(
        self, reached: Callable[[], bool], timeout: float, describe: Callable[[], str] = lambda: "the cluster is not up"
    ) -> None:
        end = time.monotonic() + timeout
        while not reached():
            dead = [name for name, process in self._daemons.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(f"--- {log}\n{log.read_text()[-1500:]}" for log in self.folder.glob("*.log"))
                raise AssertionError(f"{describe()} (ended: {dead})\n{logs}")
            time.sleep(POLL_SECONDS)

    def _run(self, name: str, command: list[str]) -> None:
        log = self.folder / f"{name}.output.log"
        with log.open("ab") as output:
            # A killed test session takes its cluster along.
            words = ["setpriv", "--pdeathsig", "KILL", *command]
            self._daemons[name] = subprocess.Popen(
                words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _write_configuration(self) -> None:
        host = os.uname().nodename.partition(".")[0]
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr={self._address(node)} Port={self.port + 1} CPUs=8 "
            "RealMemory=64000 Gres=gpu:1 State=UNKNOWN"
            for node in self.nodes
        ]
        values = {"host": host, "number": self.number, "subnet": self.subnet, "port": self.port}
        text = CONFIGURATION.format(folder=self.folder, nodes="\n".join(lines), **values)
        (self.folder / "slurm.conf").write_text(text)
        # Slurm takes any character device for a GPU.
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        # Named, because its detection needs /sys/fs/cgroup.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = ["127.0.0.1 localhost", f"{self.subnet}.1 {host}"]
        hosts += [f"{self._address(node)} {node}" for node in self.nodes]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _address(self, node: str) -> str:
        return f"{self.subnet}.{10 + int(node[1:])}"

    def _namespace(self, node: str) -> str:
        return f"vdtrain{self.number}{node}"

    def _lay_network(self) -> None:
        # A session that was killed leaves its interfaces.
        self._clear_network()
        bridge = f"vdt{self.number}"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self.subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for node in self.nodes:
            namespace, cable = self._namespace(node), f"{bridge}{node}"
            _ip("netns", "add", namespace)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", cable, "master", bridge, "up")
            _ip("-n", namespace, "addr", "add", f"{self._address(node)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", namespace, "link", "set", device, "up")

    def _clear_network(self) -> None:
        for node in self.nodes:
            _ip("link", "del", f"vdt{self.number}{node}", check=False)
            _ip("netns", "del", self._namespace(node), check=False)
        _ip("link", "del", f"vdt{self.number}", check=False)


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
