"""Machines on one machine, for tests: each a node of Ray with a network address, host name, shared memory and temporary folder of its own.

All of it lives in namespaces: `in_own_network` puts a process into a network of its own, where that process starts a head and adds machines. What
is under `Machines.own` is another folder on every machine; everything else is the one file system that all of them share.
"""

import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

import psutil
import ray

RAY = str(Path(sys.executable).parent / "ray")
NETWORK = "10.77.0"
HEAD = f"{NETWORK}.1"
PORT = 6379
STARTS = 10
"""How often a machine is started at most: Ray gives a node half a minute (no setting of 2.60 says more), which is not enough where much else runs."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def can_make_machines() -> bool:
    """Whether this user may make namespaces and connect them."""
    if any(shutil.which(program) is None for program in ("unshare", "ip", "mount")):
        return False
    trial = in_own_network(
        ["sh", "-c", "mount -t tmpfs none /mnt && ip link add veth1 type veth peer name veth2 && unshare -n -m -u hostname machine"]
    )
    return subprocess.run(trial, capture_output=True, check=False).returncode == 0


def in_own_network(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command` with a network, mounts and process ids of its own; all that it started goes when it ends."""
    up = f"ip link set lo up && ip link add bridge0 type bridge && ip addr add {HEAD}/24 dev bridge0 && ip link set bridge0 up"
    return ["unshare", "-n", "-m", "-p", "--fork", "--kill-child", "--mount-proc", "sh", "-c", f'{up} && "$@"', "sh", *command]


def with_token(environment: dict[str, str], file: Path) -> dict[str, str]:
    """Write a token, and return the environment of processes that ask for it and give it; Ray reads that once, when it is imported."""
    file.write_text(secrets.token_hex(32))
    plain = {key: value for key, value in environment.items() if not key.startswith("RAY_")}
    return {**plain, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


class Machines:
    """A head, which takes no work, at `HEAD`, and the machines that were added; for a process that `in_own_network` started.

    Args:
        root: a new folder that all machines share; `own` and `hidden` in it are the exceptions.
        session: a folder for Ray's files, with a short name: the path of a socket in it may have 107 bytes.
        environment: of the head and of every driver that connects to it, with what `with_token` gave this process.
    """

    def __init__(self, root: Path, session: str, environment: dict[str, str]):
        self.own, self.hidden = root / "own", root / "hidden"
        """Folders with other contents on each machine: `own` on every one, `hidden` on those that are told so."""
        self._logs = root / "logs"
        for folder in (self.own / "tmp", self.hidden, self._logs):
            folder.mkdir(parents=True)
        (root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{i} machine-{i}\n" for i in range(1, 10)))
        self._hosts = root / "hosts"
        self._session = session
        self.environment = {
            **environment,
            **{"TMPDIR": str(self.own / "tmp"), "XDG_CACHE_HOME": str(self.own / "cache")},
        }
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> str:
        """Ray's address."""
        return f"{HEAD}:{PORT}"

    @property
    def driver(self) -> dict[str, str]:
        """The environment of a job that uses this cluster."""
        return {**self.environment, "RAY_ADDRESS": self.address}

    def __enter__(self) -> "Machines":
        subprocess.run(["mount", "--bind", str(self._hosts), "/etc/hosts"], check=True)
        head = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false", f"--temp-dir={self._session}"]
        for _ in range(STARTS):
            self._start(1, [], head)
            if self._wait(1, self._is_connected):
                return self
            # What is left of it holds its ports.
            for process in psutil.process_iter(["cmdline"]):
                if any(self._session in word for word in process.info["cmdline"] or []):
                    process.kill()
        raise RuntimeError(f"the head did not come up: {self.log(1)}")

    def _is_connected(self) -> bool:
        """Connect this process to the head, if it is there."""
        try:
            ray.init(address=self.address, logging_level="WARNING")
        except ConnectionError:
            return False
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ray.shutdown()  # Ray's own processes go with this one

    def add(self, *, num_cpus: int, num_gpus: int = 0, hides: bool = False) -> int:
        """Start a machine and wait until Ray knows it; return its number, which its address ends with.

        Args:
            num_gpus: as Ray counts them; no device is asked for.
            hides: whether `hidden` is a folder of its own there.
        """
        number = max(self._processes) + 1
        ready, own = self._logs / f"machine-{number}.ready", [str(self.own), self._session, "/dev/shm"]
        mounts = [f"mount -t tmpfs none {folder}" for folder in (*own, *([self.hidden] if hides else []))]
        network = [f"hostname machine-{number}", "ip link set lo up", f"touch {ready}"]
        network += ["until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done"]
        network += [f"ip addr add {NETWORK}.{number}/24 dev eth0", "ip link set eth0 up"]
        script = " && ".join([*mounts, f"mkdir {self.own}/tmp", *network, 'exec "$@"'])
        before = ["unshare", "-n", "-m", "-u", "-p", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script, "sh"]
        for _ in range(STARTS):
            ready.unlink(missing_ok=True)
            subprocess.run(["ip", "link", "delete", f"m{number}"], capture_output=True, check=False)  # of the start before
            self._start(number, before, [f"--address={self.address}", f"--num-cpus={num_cpus}", f"--num-gpus={num_gpus}"])
            if self._wait(number, ready.exists) and self._connect(number) and self._wait(number, partial(self._is_node, number)):
                return number
        raise RuntimeError(f"machine {number} did not come up: {self.log(number)}")

    def _connect(self, number: int) -> bool:
        """Lay a cable from a machine to the bridge."""
        pid = self._processes[number].pid
        subprocess.run(f"ip link add m{number} type veth peer name eth0 netns {pid}".split(), check=True)
        subprocess.run(f"ip link set m{number} master bridge0 up".split(), check=True)
        return True

    def _wait(self, number: int, is_done: Callable[[], bool]) -> bool:
        """Wait until something is so; return False if the machine's Ray ended before."""
        while not is_done():
            if self._processes[number].poll() is not None:
                return False
            time.sleep(0.2)
        return True

    def _is_node(self, number: int) -> bool:
        """Whether Ray knows a machine as a living node."""
        return any(node["Alive"] and node["NodeManagerAddress"] == f"{NETWORK}.{number}" for node in ray.nodes())  # type: ignore[no-untyped-call]

    def see(self, number: int, path: Path) -> Path:
        """Return a path as this process can open it, to what machine `number` has there."""
        return Path(f"/proc/{self._processes[number].pid}/root{path}")

    def received_bytes(self, number: int) -> int:
        """Return how much the network has brought to a machine so far."""
        lines = subprocess.run(["ip", "-s", "link", "show", f"m{number}"], capture_output=True, text=True, check=True).stdout.splitlines()
        sent = next(place for place, line in enumerate(lines) if line.strip().startswith("TX:"))  # by this end of the cable: received there
        return int(lines[sent + 1].split()[0])

    def log(self, number: int) -> str:
        """Return the end of what a machine's Ray said."""
        return (self._logs / f"machine-{number}.log").read_text()[-3000:]

    def _start(self, number: int, before: Sequence[str], options: Sequence[str]) -> None:
        command = [*before, RAY, "start", f"--node-ip-address={NETWORK}.{number}", *options]
        command += ["--object-store-memory=200000000", "--disable-usage-stats", "--block"]
        with (self._logs / f"machine-{number}.log").open("w") as log:
            self._processes[number] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
