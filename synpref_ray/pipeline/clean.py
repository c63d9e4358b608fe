"""What `jobs/clean.py` does: list what of a workspace nothing refers to, and remove it when told to. Guide: docs/faults.md.

Our choice: nothing is ever removed as a side effect of another job. While a job runs in the workspace nothing is removed at all; a table's lease is
taken while the table goes, and its seal goes first, so that a removal that is cut off leaves an unfinished table and never a torn one.
"""

from pydantic import Field

from synpref_ray.errors import RunConflictError
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.tables.garbage import Item, find_items, live_runs
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.storage import Storage


class CleanConfig(JobConfig):
    """What may go."""

    unfinished: bool = False  # ours: unfinished tables and trainings hold work that a job would go on from
    """Also remove unfinished tables and trainings, and what was written since a job began that has not finished."""
    max_shown: int = Field(default=60, ge=1)  # ours: two screens; the rest is counted
    """Lines of the list."""


def list_garbage(config: CleanConfig) -> str:
    """Return what would be removed, and what is kept and why, as text; removes nothing."""
    items = find_items(config.storage, unfinished=config.unfinished)
    running = live_runs(config.storage)
    note = f"\n{', '.join(running)}: a job is running; nothing can be removed until it ends" if running else ""
    return describe_items(items, config.storage.url, config.max_shown) + note


def remove_garbage(config: CleanConfig, run: Run) -> str:
    """Remove what nothing refers to; return the closing table.

    Raises:
        RunConflictError: a job is running in this workspace.
    """
    storage = config.storage
    running = [folder for folder in live_runs(storage) if folder != run.folder]
    if running:
        raise RunConflictError(f"{storage.join(running[0])} is a job that is running: what it needs cannot be told before it ends; wait, or stop it")
    items = find_items(storage, unfinished=config.unfinished)
    gone = []
    for item in items:
        if item.may_go and _remove(storage, item):
            gone.append(item)
            run.event("removed", what=item.kind, path=item.path, bytes=item.num_bytes)
    run.metrics.update({"removed": [item.path for item in gone], "removed_bytes": sum(item.num_bytes for item in gone)})
    return describe_items(items, storage.url, config.max_shown) + f"\nremoved {len(gone)}"


def describe_items(items: list[Item], url: str, max_shown: int) -> str:
    """Return the items as a table, those that may go first, and their sum."""
    going = [item for item in items if item.may_go]
    shown = [*sorted(going, key=lambda item: -item.num_bytes), *(item for item in items if not item.may_go)]
    rows = [(item.kind, item.path, _size(item.num_bytes) if item.may_go else "", item.kept or "nothing refers to it") for item in shown[:max_shown]]
    lines = [f"workspace {url}", format_table(("what", "path", "size", "why"), rows)]
    if len(shown) > max_shown:
        lines.append(f"… and {len(shown) - max_shown} more")
    lines.append(f"{len(going)} of {len(items)} may go, {_size(sum(item.num_bytes for item in going))}")
    return "\n".join(lines)


def _remove(storage: Storage, item: Item) -> bool:
    """Remove an item, its seal first; False if another driver has taken it up meanwhile."""
    if item.kind == "training":
        lease, seals = f"models/.lease-{item.path.removeprefix('tmp/train-')}.json", [f"{item.path}/identity.json"]
    elif item.kind == "model":
        lease, seals = f"models/.lease-{item.path.removeprefix('models/')}.json", [f"{item.path}/training_record.json", f"{item.path}.digest"]
    elif item.kind == "gathered pool":
        lease, seals = f"{item.path}/lease.json", storage.list_files(f"{item.path}/versions")
    elif item.kind == "index parts":
        lease, seals = f"{item.path.removesuffix('/parts')}/lease.json", []
    else:
        lease, seals = f"{item.path}/lease.json", [f"{item.path}/manifest.json"]
    try:
        with Lease(storage, lease):
            for seal in seals:
                storage.delete(seal)
            storage.delete_folder(item.path)
    except RunConflictError:
        return False
    for folder in _rejects_of(storage, item):
        storage.delete_folder(folder)
    return True


def _rejects_of(storage: Storage, item: Item) -> list[str]:
    """Return the folders of the rows that the removed tables had refused: `rejects/<step>/<pool>-<table>-<version>`."""
    parts = item.path.split("/")
    if parts[0] != "pools":
        return []
    found = []
    for step in storage.list_folders("rejects"):
        for name in storage.list_folders(f"rejects/{step}"):
            if name == "-".join(parts[1:]) or (item.kind == "gathered pool" and name.startswith(f"{parts[1]}-")):
                found.append(f"rejects/{step}/{name}")
    return found


def _size(num_bytes: int) -> str:
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
