"""The chaos suite: Stage 1 and Stage 2 killed again and again, each time with the result of a quiet run in the sense of DESIGN, section 2.

One quiet run makes the wanted tables and records; every scenario starts from a copy of the workspace before its job. Three real-model runs with kills
are `tests/pipeline/test_kills.py`; these have stand-ins for models, and everything else real.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import psutil
import yaml

from synpref_ray.tables.objects import S3Objects
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.storage import Storage
from tests.chaos.killer import Killer, Kind, plan_kills
from tests.chaos.stand_ins import DIMENSION, LanguageModel
from tests.llm.http_server import LocalServer
from tests.pipeline.small_loop import REPOSITORY, SIZES, SmallLoop, environment, finished_shards
from tests.s3 import S3Server, server_program
from tests.s3_proxy import FaultProxy, share_of

RUN_JOB = REPOSITORY / "tests" / "chaos" / "run_job.py"
INLINE_ROWS = {"stage1": 20_000, "stage2": 0}  # Stage 2's rules run as tasks of the cluster, as at scale; Stage 1's would cost minutes
FAULT_SHARE = 0.02
REQUESTS_AT_RISK = 64  # two engines, two shards each: eight requests under way and up to eight replies not yet in the journal
SHARDS_AT_RISK = 8  # two workers, each with four tasks given to it


@dataclass(frozen=True)
class Scenario:
    """One job, where it runs, and what is killed meanwhile."""

    job: Literal["stage1", "stage2"]
    where: Literal["laptop", "cluster", "s3"]
    kills: tuple[Kind, ...]
    seed: int

    @property
    def name(self) -> str:
        """What reports call it."""
        return f"{self.job}-{self.where}-{self.seed}"


def _kills(driver: int = 0, actor: int = 0, worker: int = 0, node: int = 0) -> tuple[Kind, ...]:
    counts: dict[Kind, int] = {"driver": driver, "actor": actor, "worker": worker, "node": node}
    return tuple(kind for kind, count in counts.items() for _ in range(count))


SCENARIOS = (
    Scenario("stage1", "laptop", _kills(driver=4, actor=4, worker=2), 1),
    Scenario("stage1", "laptop", _kills(driver=3, actor=5, worker=2), 2),
    Scenario("stage2", "laptop", _kills(driver=3, actor=3, worker=2), 3),
    Scenario("stage2", "laptop", _kills(driver=2, actor=4, worker=2), 4),
    Scenario("stage1", "cluster", _kills(driver=1, actor=3, worker=1, node=2), 5),
    Scenario("stage2", "cluster", _kills(driver=1, actor=2, worker=1, node=2), 6),
    Scenario("stage1", "s3", _kills(driver=3, actor=3), 7),
    Scenario("stage2", "s3", _kills(driver=2, actor=2, worker=1), 8),
)
"""Sixty kills planned, so that fifty are delivered where a job ends before the last of its own."""


class Suite:
    """The data, the endpoint and the wanted results that all scenarios share."""

    def __init__(self, root: Path, server: LocalServer, loop: SmallLoop):
        self.root = root
        self.loop = loop
        self._server = server
        self._wanted: dict[str, dict[str, bytes]] = {}
        self._rows: dict[str, int] = {}

    @classmethod
    @contextmanager
    def started(cls, root: Path) -> Iterator["Suite"]:
        """Start the endpoint, and run both stages once without a kill."""
        loop = SmallLoop(root)
        model = LanguageModel()
        with LocalServer(model) as server:
            write_configs(loop, server.url)
            suite = cls(root, server, loop)
            workspace = root / "quiet"
            loop.run("ingest", workspace, "ray.dashboard=false")
            model.know([row for name in SIZES for row in read_pool(workspace, name)], str(loop.truth))
            shutil.copytree(workspace, root / "before-stage1")
            for job in ("stage1", "stage2"):
                killer = suite._killer(job, str(workspace), environment(), root / f"quiet-{job}")
                killer.run([])
                suite._wanted[job] = contents(Storage(str(workspace)))
                suite._rows[job] = rows_computed(root / f"quiet-{job}.computed")
                if job == "stage1":
                    shutil.copytree(workspace, root / "before-stage2")
            yield suite

    def _killer(self, job: str, workspace: str, env: dict[str, str], log: Path, **more: Any) -> Killer:
        command = [sys.executable, str(RUN_JOB), f"{log}.computed", str(self.loop.truth), str(INLINE_ROWS[job]), job]
        command += ["--config", str(self.loop.config[job]), f"workspace={workspace}"]
        return Killer(command, env, self._progress, Path(f"{log}.log"), **more)

    def _progress(self) -> int:
        """Return a number that grows with every shard computed and every eight requests."""
        computed = sum(path.stat().st_size for path in self.root.glob("*.computed")) // 16
        return computed + len(self._server.seen) // 8

    def run(self, scenario: Scenario) -> dict[str, Any]:
        """Run one scenario; return its line of the report.

        Raises:
            AssertionError: the result is not that of the quiet run, or more than what was in flight was computed again.
        """
        job, log = scenario.job, self.root / scenario.name
        asked_before, already = len(self._server.seen), {_text(seen.body) for seen in self._server.seen}
        with ExitStack() as stack:
            finished: dict[Path, tuple[int, int]] = {}
            given = stack.enter_context(WHERE[scenario.where](self.root, scenario))

            def remember() -> None:
                if scenario.where != "s3":
                    finished.update({path: state for path, state in finished_shards(Path(given.workspace)).items() if path not in finished})

            killer = self._killer(job, given.workspace, given.environment, log, nodes=given.nodes, remove_node=given.remove_node, on_kill=remember)
            outcome = killer.run(plan_kills(scenario.kills, scenario.seed))
            with patch.dict(os.environ, given.storage_environment):
                storage = Storage(given.workspace)
                found, left_over = contents(storage), leftovers(storage)
            now = finished_shards(Path(given.workspace)) if scenario.where != "s3" else {}
        assert found.keys() == self._wanted[job].keys(), f"{scenario.name}: {sorted(found.keys() ^ self._wanted[job].keys())[:5]}"
        different = [path for path in found if found[path] != self._wanted[job][path]]
        assert not different, f"{scenario.name}: {len(different)} of {len(found)} tables and records differ: {different[:5]}"
        assert not left_over, f"{scenario.name}: left behind: {left_over[:5]}"
        again = [path for path, state in finished.items() if now.get(path) != state]
        assert not again, f"{scenario.name}: {len(again)} finished shards were written again: {again[:5]}"
        kills = sum(outcome.kills.values())
        asked = [_text(seen.body) for seen in self._server.seen[asked_before:]]
        assert {*asked} <= already, f"{scenario.name}: other requests than in the quiet run"
        repeated = len(asked) - len({*asked})
        recomputed = rows_computed(Path(f"{log}.computed")) - self._rows[job]
        assert repeated <= kills * REQUESTS_AT_RISK
        assert recomputed <= kills * SHARDS_AT_RISK * 8, "more rows than shards of 8 pairs in flight"
        return {
            "scenario": scenario.name,
            "kills": dict(+outcome.kills),
            "planned_but_too_late": dict(outcome.undelivered),
            "driver_starts": outcome.starts,
            "failed_starts": outcome.failed_starts,
            "ray_not_up": outcome.ray_not_up,
            "storage_faults": given.faults(),
            "tables_and_records": len(found),
            "rows_scored_embedded_trained_again": max(0, recomputed),
            "requests_asked_again": repeated,
            "of_requests": len({*asked}),
            "seconds": round(outcome.seconds, 1),
        }


@dataclass(frozen=True)
class Given:
    """Where a scenario runs."""

    workspace: str
    environment: dict[str, str]
    storage_environment: dict[str, str]
    nodes: Callable[[], list[psutil.Process]] | None = None
    remove_node: Callable[[], None] | None = None
    faults: Callable[[], int] = lambda: 0


@contextmanager
def on_laptop(root: Path, scenario: Scenario) -> Iterator[Given]:
    """A folder, and a Ray that each driver starts for itself."""
    workspace = root / scenario.name
    shutil.copytree(root / f"before-{scenario.job}", workspace)
    yield Given(str(workspace), environment(), {})


@contextmanager
def on_cluster(root: Path, scenario: Scenario) -> Iterator[Given]:
    """A folder, and three nodes of a cluster on this machine, the head without CPUs for work."""
    from ray.cluster_utils import Cluster

    workspace = root / scenario.name
    shutil.copytree(root / f"before-{scenario.job}", workspace)
    with patch.dict(os.environ, environment(), clear=True):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
        workers = [cluster.add_node(num_cpus=4, object_store_memory=200 << 20) for _ in range(2)]
        try:
            cluster.wait_for_nodes()

            def remove_node() -> None:
                cluster.remove_node(workers.pop(0), allow_graceful=False)
                workers.append(cluster.add_node(num_cpus=4, object_store_memory=200 << 20))

            given = {**environment(), "RAY_ADDRESS": cluster.address}
            yield Given(str(workspace), given, {}, lambda: [psutil.Process()], remove_node)
        finally:
            cluster.shutdown()


@contextmanager
def on_s3(root: Path, scenario: Scenario) -> Iterator[Given]:
    """A prefix on a real S3 server behind a proxy that lets one call in fifty fail."""
    program = server_program()
    assert program is not None
    with S3Server(program) as server:
        prefix, faultless = f"{server.make_prefix()}/ws", server.environment(server.url)
        with patch.dict(os.environ, faultless):
            before = root / f"before-{scenario.job}"
            for path in sorted(path for path in before.rglob("*") if path.is_file()):
                Storage(prefix).upload(path, path.relative_to(before).as_posix())
        plan = share_of(FAULT_SHARE, scenario.seed, ("500", "503", "reset", "lost", "cut", "slow"))
        with FaultProxy(server.address, plan) as proxy:
            yield Given(prefix, {**environment(), **server.environment(proxy.url)}, faultless, faults=lambda: sum(proxy.faults.values()))


WHERE = {"laptop": on_laptop, "cluster": on_cluster, "s3": on_s3}


def write_configs(loop: SmallLoop, url: str) -> None:
    """Lay endpoints, two workers a step and the stand-ins' sizes over the small loop's configs."""
    engine = {"base_url": url, "model": "stand-in", "api": "chat", "guidance": "none", "logprobs": False}
    engine |= {"max_concurrent_requests": 8, "backoff_seconds": 0.05}
    step = {"engine": engine, "num_workers": 2, "concurrent_shards": 2}
    for job in ("stage1", "stage2"):
        values = yaml.safe_load(loop.config[job].read_text())
        values |= {
            "taggers": [{**step, "tagger": {"max_input_tokens": 8000}}],
            "judges": [{**step, "judge": {"judge": "stand-in", "max_exemplars": 2, "max_input_tokens": 8000}}],
            "score": {"num_workers": 2},
            "embed": {"num_workers": 2, "dimension": DIMENSION},
            "parity": {"enabled": False},  # it compares engines on real weights; tests/pipeline/test_parity_gate.py
            "ray": {"dashboard": False, "object_store_memory_bytes": 200 << 20},
        }
        loop.config[job].write_text(yaml.safe_dump(values))


def read_pool(workspace: Path, name: str) -> list[dict[str, Any]]:
    """Return a pool's rows."""
    rows: list[dict[str, Any]] = open_pool(Storage(str(workspace)), name).read_all(["pair_id", "chosen", "rejected"]).to_pylist()
    return rows


def contents(storage: Storage) -> dict[str, bytes]:
    """Return every table, set and record of a workspace by path, manifests (which count what a run did) and journals aside; and models by name."""
    found = {f"models/{name}": b"" for name in storage.list_folders("models")}
    for folder in ("pools", "sets", "rounds", "rejects"):
        for path in storage.list_files(folder):
            if "/journal/" not in path and not path.endswith("/manifest.json"):
                found[path] = storage.read_bytes(path)
    return found


def leftovers(storage: Storage) -> list[str]:
    """Return what no finished job may leave behind: leases, training folders, what workers had in hand."""
    if storage.is_local:
        root = Path(storage.url)
        paths = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    else:
        paths = S3Objects.at(storage.url).list_files("")
    return [path for path in paths if ("lease" in path and not path.startswith("runs/")) or path.startswith("tmp/") or "/crashes/" in path]


def rows_computed(log: Path) -> int:
    """Return the pairs that the stand-ins scored and embedded, and the steps that they trained, over all runs that wrote this log."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return sum(1 if kind == "train" else int(rest[-1]) for kind, *rest in lines)


def _text(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True)


def summarise(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of some scenarios: totals, and each scenario's line."""
    kills: Counter[str] = Counter()
    for line in lines:
        kills.update(line["kills"])
    sums = ("failed_starts", "storage_faults", "rows_scored_embedded_trained_again", "requests_asked_again")
    totals = {name: sum(line[name] for line in lines) for name in sums}
    return {"kills": sum(kills.values()), "kills_by_kind": dict(sorted(kills.items())), **totals, "scenarios": list(lines)}
