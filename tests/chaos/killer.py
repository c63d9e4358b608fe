"""Kills processes of a running job by a plan that a seed repeats: its driver, actors and workers with SIGKILL, nodes of its cluster."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

Kind = Literal["driver", "actor", "worker", "node"]
TIMEOUT_SECONDS = 1800
POLL_SECONDS = 0.03
IDLE_AFTER_SECONDS = 6.0  # a worker that is busy is looked for so long; then an idle one will do
RAY_NOT_UP = "timed out during startup"
MAX_RAY_NOT_UP = 10
SYSTEM_ACTORS = ("DashboardAgent", "RuntimeEnvAgent", "ActorLocationTracker", "_StatsActor", "_Autoscaling", "DatasetManager")


@dataclass(frozen=True)
class Planned:
    """One kill: of what, after how much more of the job's work, and how many seconds later."""

    kind: Kind
    after_progress: int
    seconds: float


def plan_kills(kinds: Sequence[Kind], seed: int) -> list[Planned]:
    """Return the kills of one run, in an order and at moments that the seed decides."""
    generator = random.Random(seed)
    return [Planned(kind, generator.randint(0, 3), generator.uniform(0.0, 0.8)) for kind in generator.sample([*kinds], len(kinds))]


@dataclass
class Outcome:
    """What happened to one job on its way to the end."""

    kills: Counter[str] = field(default_factory=Counter)
    undelivered: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    failed_starts: int = 0
    """Starts that ended by themselves with an error, though their driver was not killed."""
    ray_not_up: int = 0
    """Starts whose Ray did not come up in the time that it gives itself."""
    seconds: float = 0.0


@dataclass
class Killer:
    """Runs one job to its end, however often it is killed.

    Args:
        command: of the job.
        environment: of its process.
        progress: how far the job's work is, as a number that grows.
        nodes: whose processes hold the workers; none: the driver's own Ray.
        remove_node: takes a node away, and puts another in its place.
        on_kill: called after each kill, for what a test wants to keep.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    progress: Callable[[], int]
    log: Path
    nodes: Callable[[], list[psutil.Process]] | None = None
    remove_node: Callable[[], None] | None = None
    on_kill: Callable[[], None] = lambda: None

    def run(self, plan: Sequence[Planned]) -> Outcome:
        """Kill as planned; what is left of the plan when the job ends is counted as not delivered."""
        outcome, left = Outcome(), list(plan)
        began = time.monotonic()
        while True:
            outcome.starts += 1
            assert outcome.starts <= len(plan) + 4 + MAX_RAY_NOT_UP, f"the job does not come to an end: {self._tail()}"
            with self.log.open("ab") as log:
                driver = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log, cwd=self.log.parent)
            code = self._watch(driver, left, outcome)
            if code == 0:
                break
            if code > 0 and RAY_NOT_UP in self._tail():  # a busy machine: Ray gives itself 30 s
                outcome.ray_not_up += 1
                assert outcome.ray_not_up < MAX_RAY_NOT_UP, "Ray does not start on this machine"
                continue
            outcome.failed_starts += code > 0
            assert outcome.failed_starts <= 1, f"the job failed by itself: {self._tail()}"
        outcome.undelivered.update(planned.kind for planned in left)
        outcome.seconds = time.monotonic() - began
        return outcome

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def _watch(self, driver: "subprocess.Popen[bytes]", left: list[Planned], outcome: Outcome) -> int:
        """Return the driver's exit code, negative where it was killed."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        seen, since = self.progress(), None
        while driver.poll() is None:
            assert time.monotonic() < deadline, f"the job hangs: {self._tail()}"
            time.sleep(POLL_SECONDS)
            if not left or (since is None and self.progress() < seen + left[0].after_progress):
                continue
            since = since or time.monotonic()
            waited = time.monotonic() - since - left[0].seconds
            if waited < 0 or not self._kill(left[0].kind, driver, idle_too=waited > IDLE_AFTER_SECONDS, outcome=outcome):
                continue
            left.pop(0)
            self.on_kill()
            seen, since = self.progress(), None
        return driver.returncode

    def _kill(self, kind: Kind, driver: "subprocess.Popen[bytes]", *, idle_too: bool, outcome: Outcome) -> bool:
        if kind == "driver":
            family = self._family(driver.pid) if self.nodes is None else []
            driver.kill()
            driver.wait()
            _, alive = psutil.wait_procs(family, timeout=20)
            for process in alive:  # Ray's own reaper was slower
                kill(process)
        elif kind == "node":
            if self.remove_node is None or not self._workers(driver, "actor"):
                return False
            self.remove_node()
        else:
            victims = self._workers(driver, kind)
            if not victims and kind == "worker" and idle_too:
                victims, kind = self._workers(driver, "idle"), "worker"
                outcome.kills["worker, idle"] += bool(victims)
                outcome.kills["worker"] -= bool(victims)
            if not victims or not kill(victims[0]):
                return False
        outcome.kills[kind] += 1
        return True

    def _family(self, pid: int) -> list[psutil.Process]:
        try:
            return psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _workers(self, driver: "subprocess.Popen[bytes]", kind: str) -> list[psutil.Process]:
        roots = [driver.pid] if self.nodes is None else [node.pid for node in self.nodes()]
        return [process for root in roots for process in self._family(root) if kind_of(process) == kind]


def kind_of(process: psutil.Process) -> str:
    """Return actor, worker or idle for Ray's processes that work for a job; empty for all others, and for actors that are still being made."""
    try:
        command = process.cmdline()
    except psutil.Error:
        return ""
    title = command[0] if command else ""
    if not title.startswith("ray::") or any(name in title for name in SYSTEM_ACTORS):
        return ""
    if title.startswith("ray::MapWorker"):
        return "" if title.endswith("__init__") else "actor"
    return "idle" if title.startswith("ray::IDLE") else "worker"


def kill(process: psutil.Process) -> bool:
    """Send SIGKILL; False if the process was gone already."""
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
