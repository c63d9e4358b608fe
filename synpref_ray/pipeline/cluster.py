"""Connecting to Ray: a given cluster, or a local one that this process starts, with the settings that shard-aligned streaming needs."""

import logging
import math
import os
import socket
import uuid
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from pydantic import Field
from ray.data import DataContext, ExecutionResources
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from synpref_ray.config import Settings
from synpref_ray.errors import InputError, SynprefError
from synpref_ray.tables.pools import MAX_BYTES_PER_SHARD
from synpref_ray.tables.storage import Storage

logger = logging.getLogger(__name__)
NODE_GONE = (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError)
"""What a task bound to a node raises when that node has left meanwhile, as nodes of an autoscaling cluster do."""

PROGRESS_LOG_SECONDS = "300"
"""Between two blocks of Ray Data's progress in a log that is no terminal; ours: at Ray's ten seconds they drown the lines of our steps."""


class RayConfig(Settings):
    """How a job reaches Ray. Inside `ray job submit`, or with RAY_ADDRESS set, the given cluster is used and `num_cpus` ignored."""

    num_cpus: int = 8  # ours: logical, so that actors that wait on each other never starve on a 2-core laptop
    object_store_memory_bytes: int = 1 * 2**30  # ours: shards of 64 MiB stream; a local run needs no more
    dashboard: bool = True
    """Whether a local Ray shows its dashboard."""
    max_cpus: int = Field(
        default=112, ge=1
    )  # ours: the 8 nodes of 16 CPUs of cluster/'s files, less one for what holds CPUs beside (an index in memory)
    """CPUs of a given cluster that tasks without a GPU ask for at once, at most. Keep it below what its nodes without GPUs hold when all are
    up: Ray's autoscaler only prefers those, and starts nodes with GPUs for every task that they have no room for. Raise it on a cluster of your
    own that is always up; jobs that run side by side share the nodes, so divide it among them."""


def configure_ray_data(max_cpus: float = math.inf) -> None:
    """Set what whole-shard streaming relies on: large blocks are not split, and errors of ours arrive as themselves.

    Args:
        max_cpus: what work without GPUs may ask for at once (`RayConfig.max_cpus`), by Ray Data and by `tasks.run_tasks`; infinite: no bound.
    """
    os.environ.setdefault("RAY_DATA_NON_TTY_PROGRESS_LOG_INTERVAL", PROGRESS_LOG_SECONDS)  # read when the first dataset runs
    context = DataContext.get_current()
    bounded = {} if math.isinf(max_cpus) else {"cpu": max_cpus, "gpu": 0.0}  # no GPU: what Ray Data asks for ahead is then no node that has some
    context.execution_options.resource_limits = ExecutionResources.for_limits(**bounded)
    context.target_max_block_size = 16 * MAX_BYTES_PER_SHARD  # a decoded shard with embeddings stays one block
    context.raise_original_map_exception = True
    # Bounds on restarts and retries have no named parameter in Ray 2.60, and without them there are none.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated", category=RayDeprecationWarning)


def cpu_bound() -> float:
    """Return how many CPUs work without GPUs may ask for at once; infinite on a local Ray, which starts no nodes."""
    return float(DataContext.get_current().execution_options.resource_limits.cpu)


def tell_if_no_room(what: str, num_cpus: float, num_gpus: float) -> None:
    """Say so once, before the work, if no node that is there now could hold one of its workers: Ray then waits without a word, maybe for ever.

    Our choice: no error, since nodes may come, and Ray has no public way to ask which would.
    """
    if not ray.is_initialized():
        return
    nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if any(node.get("CPU", 0) >= num_cpus and node.get("GPU", 0) >= num_gpus for node in nodes):
        return
    logger.warning(
        "%s waits for a node with %g CPUs and %g GPUs; the nodes that are up have at most %g and %g. If the cluster has node types of that size, "
        "one comes in minutes; if not, nothing ever begins (ray status tells what is asked for)",
        *(what, num_cpus, num_gpus),
        *(max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")),
    )


@contextmanager
def data_context(num_gpus: float) -> Iterator[None]:
    """Make datasets whose workers take `num_gpus` each; with GPUs their number of workers is their only bound."""
    context = DataContext.get_current().copy()
    if num_gpus:
        context.execution_options.resource_limits = ExecutionResources.for_limits()
    with DataContext.current(context):
        yield


@contextmanager
def ray_session(config: RayConfig, storage: Storage) -> Iterator[None]:
    """Connect to the given cluster, or start a local Ray and stop it again; check that every node sees the workspace."""
    given = bool(os.environ.get("RAY_ADDRESS"))
    max_cpus = config.max_cpus if given else math.inf
    if ray.is_initialized():
        configure_ray_data(max_cpus)
        yield
        return
    if given:
        _connect()
    else:
        context = ray.init(
            address="local",
            num_cpus=max(config.num_cpus, os.cpu_count() or 1),
            object_store_memory=config.object_store_memory_bytes,
            include_dashboard=config.dashboard,
            logging_level=logging.WARNING,
            _system_config=local_ray_settings(config.dashboard),
        )
        if config.dashboard:
            logger.info("Ray dashboard: http://%s (if it asks for a token: ray get-auth-token)", context.dashboard_url)
    configure_ray_data(max_cpus)
    if (cpus := ray.cluster_resources().get("CPU", 0)) > max_cpus:  # type: ignore[no-untyped-call]
        logger.info("work without GPUs takes at most %d of the cluster's %d CPUs at once (ray.max_cpus)", max_cpus, cpus)
    try:
        probed = probe_workspace(storage)
        try:
            yield
        except (SynprefError, FileNotFoundError):
            probe_nodes(storage, probed)  # that a file is not there for a node that came since tells less than what is wrong with the node
            raise
        probe_nodes(storage, probed)
    finally:
        ray.shutdown()


def local_ray_settings(dashboard: bool) -> dict[str, Any]:
    """Return what a local Ray is told besides its size (`ray.init(_system_config=…)`): to leave a small machine's cores to models.

    Our choice: Ray starts as many workers ahead as it has logical CPUs, of which `RayConfig.num_cpus` gives it more than cores, and keeps an idle one
    for every CPU that nothing takes; here they start when asked and as many stay as there are cores. Metrics and the history of tasks are for the
    dashboard. On a two-core machine all that cost 0.4 CPU seconds in every ten, and each wake-up halts a model's threads (docs/llm.md, "The machine's
    cores").
    """
    settings: dict[str, Any] = {"num_workers_soft_limit": os.cpu_count() or 1, "enable_worker_prestart": False}
    if not dashboard:
        settings |= {"enable_metrics_collection": False, "task_events_report_interval_ms": 0}
    return settings


def _connect() -> None:
    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(logging_level=logging.WARNING)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise InputError(
            f"cannot reach the Ray cluster at RAY_ADDRESS={address} ({' '.join(str(error).split())}); is it up, and does it want its token "
            "(RAY_AUTH_MODE=token)?"
        ) from None


def probe_workspace(storage: Storage) -> set[str]:
    """Check that a local workspace on more than one node is a shared file system, and that object storage has conditional writes.

    Returns:
        The ids of the nodes that need not be asked again.

    Raises:
        InputError: a node cannot read what the driver wrote, or the driver what the node wrote; or a conditional write replaced an object.
    """
    if storage.is_local:
        return probe_nodes(storage)
    _probe_conditions(storage)
    return set()


def probe_nodes(storage: Storage, probed: Collection[str] = ()) -> set[str]:
    """Check that a local workspace is the same folder on all nodes but those that were probed before; return the ids of all nodes.

    For a job's end, too: a cluster that grows with its load has no workers when a job begins. One that leaves meanwhile need not see it.

    Raises:
        InputError: as `probe_workspace`.
    """
    if not storage.is_local:
        return set()
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    new = {node: host for node, host in nodes.items() if node not in probed}
    if len(nodes) > 1 and new:
        _probe_each(storage, new)
    return {*nodes}


def _probe_each(storage: Storage, nodes: Mapping[str, str]) -> None:
    """Check that every one of some nodes ({id: host name}) reads what this process writes, and this process what they write."""
    token = uuid.uuid4().hex
    storage.write_bytes(f"probe/{token}/driver", token.encode())
    try:
        where = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
        answers = {node: _probe.options(scheduling_strategy=where[node]).remote(storage, token) for node in nodes}
        for node, host in nodes.items():
            try:
                answer = ray.get(answers[node])
            except NODE_GONE:
                continue
            if answer != token or not storage.exists(f"probe/{token}/{node}"):
                raise InputError(
                    f"the workspace {storage.url} is a local folder that node {host} does not share with {socket.gethostname()}; "
                    "use a shared file system or an s3:// workspace"
                )
    finally:
        for path in storage.list_files(f"probe/{token}"):
            storage.delete(path)


def _probe_conditions(storage: Storage) -> None:
    """Check that object storage refuses to create what is there: leases rest on it, and older servers ignore the condition in silence."""
    path = f"probe/{uuid.uuid4().hex}"
    try:
        if not storage.create_exclusive(path, b"first") or storage.create_exclusive(path, b"second"):
            raise InputError(f"{storage.url} ignores conditional writes (If-None-Match), on which leases rest; use a storage that honours them")
    finally:
        storage.delete(path)


@ray.remote(num_cpus=0)
def _probe(storage: Storage, token: str) -> str:
    path = f"probe/{token}/driver"
    if not storage.exists(path):
        return ""
    storage.write_bytes(f"probe/{token}/{ray.get_runtime_context().get_node_id()}", b"seen")
    return storage.read_bytes(path).decode()
