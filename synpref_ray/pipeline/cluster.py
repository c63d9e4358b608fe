"""Connecting to Ray: a given cluster, or a local one that this process starts, with the settings that shard-aligned streaming needs."""

import logging
import os
import socket
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.tables.pools import MAX_BYTES_PER_SHARD
from synpref_ray.tables.storage import Storage

logger = logging.getLogger(__name__)
NODE_GONE = (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError)
"""What a task bound to a node raises when that node has left meanwhile, as nodes of an autoscaling cluster do."""


class RayConfig(Settings):
    """How a job reaches Ray. Inside `ray job submit`, or with RAY_ADDRESS set, the given cluster is used and `num_cpus` ignored."""

    num_cpus: int = 8  # ours: logical, so that actors that wait on each other never starve on a 2-core laptop
    object_store_memory_bytes: int = 1 * 2**30  # ours: shards of 64 MiB stream; a local run needs no more
    dashboard: bool = True
    """Whether a local Ray shows its dashboard."""


def configure_ray_data() -> None:
    """Set what whole-shard streaming relies on: large blocks are not split, and errors of ours arrive as themselves."""
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = 16 * MAX_BYTES_PER_SHARD  # a decoded shard with embeddings stays one block
    context.raise_original_map_exception = True
    # Bounds on restarts and retries have no named parameter in Ray 2.60, and without them there are none.
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated", category=RayDeprecationWarning)


@contextmanager
def ray_session(config: RayConfig, storage: Storage) -> Iterator[None]:
    """Connect to the given cluster, or start a local Ray and stop it again; check that every node sees the workspace."""
    given = bool(os.environ.get("RAY_ADDRESS"))
    if ray.is_initialized():
        configure_ray_data()
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
        )
        if config.dashboard:
            logger.info("Ray dashboard: http://%s (if it asks for a token: ray get-auth-token)", context.dashboard_url)
    configure_ray_data()
    try:
        probe_workspace(storage)
        yield
    finally:
        ray.shutdown()


def _connect() -> None:
    address = os.environ["RAY_ADDRESS"]
    try:
        ray.init(logging_level=logging.WARNING)
    except ConnectionError as error:
        raise InputError(
            f"cannot reach the Ray cluster at RAY_ADDRESS={address} ({' '.join(str(error).split())}); is it up, and does it want its token "
            "(RAY_AUTH_MODE=token)?"
        ) from None


def probe_workspace(storage: Storage) -> None:
    """Check that a local workspace on more than one node is a shared file system, and that object storage has conditional writes.

    A node that leaves meanwhile need not see the workspace.

    Raises:
        InputError: a node cannot read what the driver wrote, or the driver what the node wrote; or a conditional write replaced an object.
    """
    if not storage.is_local:
        _probe_conditions(storage)
        return
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if len(nodes) < 2:
        return
    token = uuid.uuid4().hex
    storage.write_bytes(f"probe/{token}/driver", token.encode())
    try:
        for node in nodes:
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                answer = ray.get(_probe.options(scheduling_strategy=where).remote(storage, token))
            except NODE_GONE:
                continue
            if answer != token or not storage.exists(f"probe/{token}/{node['NodeID']}"):
                raise InputError(
                    f"the workspace {storage.url} is a local folder that node {node['NodeManagerHostname']} does not share with "
                    f"{socket.gethostname()}; use a shared file system or an s3:// workspace"
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
