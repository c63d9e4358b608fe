"""The annotation job: a pool's queue goes in, people judge it in the browser, verdicts come out where Stage 1 reads them.

Paper: Sec. 3.2 (human verification of the seed and of every round's selection). Layout: `annotation/queues/<pool>.parquet` says which pairs of a
pool people are asked about, `annotation/verdicts.parquet` what they said; the database holds everything else.
"""

import getpass
import json
import logging
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, SecretStr

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.human.accounts import Accounts, check_name
from synpref_ray.human.assignments import AnnotationQueue, NewItem
from synpref_ray.human.consensus import ConsensusConfig
from synpref_ray.human.database import Database, Role
from synpref_ray.human.label_studio import import_annotations, labelling_config, make_tasks
from synpref_ray.human.protocol import ProtocolConfig
from synpref_ray.human.results import ATTRIBUTES, Results, Snapshot, adjudication_table, attribute_table, skip_table, verdict_table, vote_table
from synpref_ray.human.serving import ServeConfig, check_files, serve
from synpref_ray.human.web import Site, create_app
from synpref_ray.ingest.readers import open_binary
from synpref_ray.llm.guidelines import guideline_for
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.pipeline.verification import ANNOTATION, EDITED_TAGS, VERDICTS, notes_path, queue_path
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.rules.annotation_queue import QUEUE_ORDER_SCHEMA, QueueConfig, order_queue
from synpref_ray.tables.pools import Pool, open_pool
from synpref_ray.tables.sidecars import Sidecar, list_sidecars, zip_shard

DATABASE = f"{ANNOTATION}/annotations.db"
logger = logging.getLogger(__name__)


class UserConfig(Settings):
    """The account that `annotate.py user` adds or changes; several names, with commas between them, get a made-up secret each."""

    name: str = ""
    """The name to sign in with; several names have commas between them."""
    role: Literal["", "annotator", "admin"] = ""
    """What the person may do; empty: what the account may already, annotator for a new one."""
    active: bool = True
    """Whether the account may sign in; false closes one that is there."""
    secret_file: str = ""  # empty: asked for on a terminal, else made up and printed once; never part of a config


class AnnotateConfig(JobConfig):
    """Everything the annotation job needs."""

    database: SecretStr = SecretStr("")  # empty: SQLite in the workspace; else postgresql+psycopg://user@host/name
    pool: str = "seed"
    """The pool whose pairs are judged."""
    attributes: str = ""  # fingerprint of the pool's attributes; empty: the only finished ones
    notes: str = ""  # JSONL: pair_id, chosen, rejected (what an LLM says of each reply); empty: what jobs/preverify.py noted, if it was run
    label_studio: str = ""  # from_label_studio: a project's JSON export
    queue: QueueConfig = QueueConfig()
    protocol: ProtocolConfig = ProtocolConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    serve: ServeConfig = ServeConfig()
    user: UserConfig = UserConfig()
    export_folder: str = Field(default=ANNOTATION, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")  # under the workspace

    def open_database(self, *, make: bool = True) -> Database:
        """Return the database, made if it is not there.

        Raises:
            InputError: the workspace has none, and `make` is false: a mistyped workspace must not look like an empty queue.
        """
        url = self.database.get_secret_value()
        if not url:
            if not self.storage.is_local:
                raise InputError(
                    f"the workspace {self.workspace} is on no local disk, where SQLite could keep accounts and verdicts: name a database "
                    "(database=postgresql+psycopg://USER@HOST/NAME, or database=sqlite:////FOLDER/annotations.db on this machine)"
                )
            path = Path(self.storage.local_path(DATABASE))
            if not make and not path.exists():
                raise InputError(
                    f"nobody is asked anything in the workspace {self.workspace}: it has no {DATABASE}; fill a queue first "
                    f"(python jobs/annotate.py queue workspace={self.workspace} pool=POOL), or name the workspace that has one"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)  # accounts are in it; SQLite gives its other files the same mode
            url = f"sqlite:///{path}"
        return Database(url)


def check_annotate(config: AnnotateConfig) -> None:
    """Check what can be checked without writing anything."""
    check_files(config.serve)
    if config.notes:
        _read_notes(config.notes)


def fill_queue(config: AnnotateConfig, run: Run) -> str:
    """Put a pool's pairs into the queue; what is there already stays as it is."""
    pool = open_pool(config.storage, config.pool)
    pairs, order = plan_queue(pool, open_attributes(pool, config.attributes), config.queue)
    notes = _read_notes(config.notes) if config.notes else _stored_notes(pool)
    rows = {row["pair_id"]: row for row in pairs.to_pylist()}
    asked = _with_earlier(config, order)
    fewest = config.consensus.min_verdicts
    # All that were ever asked about, so that a run which died between the file and the database is made good by the next.
    items = [_item(pool, rows[entry["pair_id"]], entry, fewest, notes.get(entry["pair_id"], {})) for entry in asked.to_pylist()]
    database = config.open_database()
    # The file first: a pair of the database that the file lacks would look as if nobody had been asked.
    config.storage.write_table(queue_path(pool.name), asked)
    num_new = AnnotationQueue(database, config.protocol).add(items)
    database.close()
    counts = {"queued": len(items), "new": num_new, "verdicts_wanted": sum(item.required for item in items)}
    counts["with_notes"] = sum(any(item.notes.values()) for item in items)
    run.metrics["queue"] = {"pool": pool.name, **counts}
    return format_table(("queue", "pairs", "new", "verdicts wanted", "with notes"), [(pool.name, *map(str, counts.values()))])


def open_attributes(pool: Pool, fingerprint: str) -> Sidecar:
    """Return a pool's attributes: those that the fingerprint names, or the only ones.

    Raises:
        InputError: Stage 1 has not tagged the pool yet, or has tagged it more than once and none is named.
    """
    found = list_sidecars(pool, "attributes", fingerprint or None)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(sorted(sidecar.fingerprint[:8] for sidecar in found))
        raise InputError(f"pool {pool.name!r} was tagged {len(found)} times: name one table of attributes (attributes=FINGERPRINT; there: {names})")
    named = f" with the fingerprint {fingerprint}" if fingerprint else ""
    raise InputError(
        f"pool {pool.name!r} has no finished attributes{named}, and the queue goes by them: run jobs/stage1.py annotator.kind=queue "
        f"workspace={pool.storage.url}, which tags the pool and then says what to run"
    )


def plan_queue(pool: Pool, attributes: Sidecar, config: QueueConfig) -> tuple[pa.Table, pa.Table]:
    """Return a pool's pairs with their attributes, and in which order people verify which of them (QUEUE_ORDER_SCHEMA).

    Raises:
        InputError: there is nothing to verify.
    """
    columns = {name: name for name in ATTRIBUTES}
    pool_columns = ["prompt_group", "prompt", "chosen", "rejected"]
    tables = [zip_shard(pool, shard.number, pool_columns, [(attributes, columns)]) for shard in pool.shards]
    if not tables:
        raise InputError(f"pool {pool.name!r} has no pairs")
    pairs = pa.concat_tables(tables)
    is_retrieved = "source_pool" in pool.read(pool.shards[0].number).column_names
    order = order_queue(pairs, config, retrieved=is_retrieved)
    if not order.num_rows:
        raise InputError(f"queue.max_fraction={config.max_fraction:g} of the {pool.num_rows} pairs of pool {pool.name!r} is not one pair")
    return pairs, order


def serve_pages(config: AnnotateConfig, run: Run) -> str:
    """Serve the app until it is stopped."""
    database = config.open_database(make=False)
    results = Results(database, config.consensus)
    site = Site(
        database=database,
        accounts=Accounts(database, config.serve.login),
        queue=AnnotationQueue(database, config.protocol),
        results=results,
        protocol=config.protocol,
        guideline=guideline_for,
        secure=config.serve.secure,
    )
    found = results.snapshot()
    if not any(worker.active for worker in found.workers):
        logger.warning("nobody can sign in yet: python jobs/annotate.py user user.name=NAME workspace=%s", config.workspace)
    if not found.items:
        logger.warning("the queue is empty: python jobs/annotate.py queue workspace=%s pool=POOL fills it", config.workspace)
    serve(create_app(site), config.serve)
    summary = _status(results.snapshot(), run)
    database.close()
    return summary


def save_user(config: AnnotateConfig, run: Run) -> str:
    """Add or change accounts; a made-up secret is shown once and stored only as a hash.

    Raises:
        ConfigError: no fit name, or one secret for several; nothing was changed then.
        InputError: an account that is to be closed is not there.
    """
    user = config.user
    names = [name.strip() for name in user.name.split(",")]
    if not all(names):
        raise ConfigError("name the account: user.name=NAME, or several: user.name=NAME,NAME")
    if len(names) > 1 and user.secret_file:
        raise ConfigError("user.secret_file is the secret of one account: name one, or leave it out and have secrets made up")
    for name in names:
        check_name(name)
    database = config.open_database()
    accounts = Accounts(database, config.serve.login)
    known = {name: accounts.role_of(name) for name in names}
    strangers = [name for name in names if known[name] is None]
    if strangers and not user.active:
        raise InputError(f"there is no account {strangers[0]!r} to close: nothing was changed")
    lines = []
    for name in names:
        role = Role(user.role) if user.role else known[name] or Role.ANNOTATOR
        secret, made = _secret(user, name, alone=len(names) == 1)
        accounts.save_user(name, role, secret, active=user.active)
        ended = "" if known[name] is None else "; earlier sessions have ended"
        lines.append(f"{role.value} {name} {'may sign in' if user.active else 'is closed'}{ended}")
        lines += [f"secret (shown this once): {secret}"] if made and user.active else []
        run.metrics.setdefault("users", []).append({"name": name, "role": role.value, "active": user.active})
    database.close()
    return "\n".join(lines)


def export(config: AnnotateConfig, run: Run) -> str:
    """Write verdicts, votes, attributes and agreement into the workspace."""
    database, storage, folder = config.open_database(make=False), config.storage, config.export_folder
    found = Results(database, config.consensus).snapshot()
    storage.write_table(f"{folder}/votes.parquet", vote_table(database))
    storage.write_table(f"{folder}/skips.parquet", skip_table(database))
    storage.write_table(f"{folder}/adjudications.parquet", adjudication_table(database))
    storage.write_table(f"{folder}/{EDITED_TAGS}", attribute_table(found))
    storage.write_table(f"{folder}/{VERDICTS}", verdict_table(found))  # last: who finds these finds the edits, too
    agreement = {name: entry.model_dump(mode="json") for name, entry in found.agreement().items()}
    storage.write_json(f"{folder}/agreement.json", agreement)
    database.close()
    return _status(found, run) + f"\nverdicts: {storage.join(f'{folder}/{VERDICTS}')}"


def show_status(config: AnnotateConfig, run: Run) -> str:
    """Say where the work stands."""
    database = config.open_database(make=False)
    found = Results(database, config.consensus).snapshot()
    database.close()
    return _status(found, run)


def to_label_studio(config: AnnotateConfig, run: Run) -> str:
    """Write the open pairs as Label Studio tasks, and the labelling config that goes with them."""
    database, folder = config.open_database(make=False), f"{config.export_folder}/label_studio"
    tasks = make_tasks(database, _guideline_of)
    database.close()
    config.storage.write_json(f"{folder}/tasks.json", tasks)
    config.storage.write_bytes(f"{folder}/labelling_config.xml", labelling_config().encode())
    run.metrics["label_studio"] = {"tasks": len(tasks)}
    return f"{len(tasks)} tasks: {config.storage.join(folder)}/tasks.json, with labelling_config.xml beside them"


def from_label_studio(config: AnnotateConfig, run: Run) -> str:
    """Take a JSON export of Label Studio in; verdicts then count like those of our own pages."""
    if not config.label_studio:
        raise ConfigError("name the JSON export of Label Studio: label_studio=FILE")
    with open_binary(config.label_studio) as stream:
        try:
            text = stream.read().decode()
        except UnicodeDecodeError:
            raise InputError(f"{config.label_studio} is not UTF-8") from None
    database = config.open_database(make=False)
    report = import_annotations(database, config.protocol, text)
    database.close()
    run.metrics["label_studio"] = report.model_dump(mode="json")
    rows = [("new", str(report.num_new)), ("unchanged", str(report.num_unchanged)), *((why, str(count)) for why, count in report.refused.items())]
    return format_table(("annotations of Label Studio", str(report.num_annotations)), rows)


VERBS: Mapping[str, Callable[[AnnotateConfig, Run], str]] = {
    "queue": fill_queue,
    "user": save_user,
    "serve": serve_pages,
    "status": show_status,
    "export": export,
    "to_label_studio": to_label_studio,
    "from_label_studio": from_label_studio,
}


def _with_earlier(config: AnnotateConfig, order: pa.Table) -> pa.Table:
    """Return the order together with the pairs of the pool that people were asked about before, smallest rank first; those stay as they were."""
    path = queue_path(config.pool)
    if not config.storage.exists(path):
        return order
    earlier = config.storage.read_table(path, QUEUE_ORDER_SCHEMA.names).cast(QUEUE_ORDER_SCHEMA)
    is_new = pc.invert(pc.is_in(order["pair_id"], value_set=earlier["pair_id"].combine_chunks()))
    return pa.concat_tables([earlier, order.filter(is_new)]).sort_by([("rank", "ascending"), ("pair_id", "ascending")])


def _guideline_of(attributes: Mapping[str, str | None]) -> str:
    try:
        return guideline_for(*(attributes.get(name) or "" for name in ATTRIBUTES[:3]))
    except ValueError:
        return ""  # the tagger gave no attributes


def _item(pool: Pool, row: Mapping[str, Any], entry: Mapping[str, Any], fewest: int, notes: dict[str, str]) -> NewItem:
    return NewItem(
        pair_id=row["pair_id"],
        pool=pool.name,
        prompt=row["prompt"],
        chosen=row["chosen"],
        rejected=row["rejected"],
        rank=entry["rank"],
        selected_by=entry["selected_by"],
        required=max(entry["num_verdicts"], fewest),
        attributes={name: row[name] for name in ATTRIBUTES},
        notes=notes,
    )


def _stored_notes(pool: Pool) -> dict[str, dict[str, str]]:
    """Return the notes that jobs/preverify.py made on the pool's pairs, if it was run."""
    path = notes_path(pool.name)
    if not pool.storage.exists(path):
        return {}
    rows = pool.storage.read_table(path, ["pair_id", "chosen", "rejected"]).to_pylist()
    return {row["pair_id"]: {side: row[side] or "" for side in ("chosen", "rejected")} for row in rows}


def _read_notes(path: str) -> dict[str, dict[str, str]]:
    """Return by pair what was noted of each reply.

    Raises:
        InputError: the file is missing, or a line is not a note.
    """
    notes: dict[str, dict[str, str]] = {}
    with open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                note = {side: str(row.get(side) or "") for side in ("chosen", "rejected")}
                "".join((row["pair_id"], *note.values())).encode()  # JSON may hold half of a surrogate pair: no page can show it
                notes[row["pair_id"]] = note
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{path}, row {number}: expected an object with pair_id, chosen and rejected, all of them Unicode text") from None
    return notes


def _secret(user: UserConfig, name: str, *, alone: bool) -> tuple[str, bool]:
    """Return an account's secret, and whether it was made up here; of one that is closed nobody is asked."""
    if user.secret_file:
        with open_binary(user.secret_file) as stream:
            try:
                return stream.read().decode().strip(), False
            except UnicodeDecodeError:
                raise InputError(f"{user.secret_file} is not UTF-8") from None
    if alone and user.active and sys.stdin is not None and sys.stdin.isatty():
        given = getpass.getpass(f"secret of {name} (empty: make one up): ")
        if given:
            return given, False
    return secrets.token_urlsafe(18), True


def _status(found: Snapshot, run: Run) -> str:
    agreement = found.agreement()
    standings = dict(found.standings)
    run.metrics["annotation"] = {
        "standings": standings,
        "to_adjudicate": len(found.to_adjudicate),
        "agreement": {name: entry.model_dump(mode="json") for name, entry in agreement.items()},
        "annotators": {person.name: {"verdicts": person.num_verdicts, "quality": person.quality} for person in found.workers},
    }
    shared = agreement["all"].num_shared_pairs
    rows = [(name, str(standings.get(name, 0))) for name in ("waiting", "settled", "disputed", "adjudicated")]
    rows += [
        ("to adjudicate", str(len(found.to_adjudicate))),
        ("verdicts", str(agreement["all"].num_votes)),
        ("pairs judged by several", str(shared)),
    ]
    for label, value in (("Krippendorff's alpha", agreement["all"].krippendorff_alpha), ("Cohen's kappa", agreement["all"].cohen_kappa)):
        rows.append((label, "-" if value is None else f"{value:.3f}"))
    return format_table(("annotation", "pairs"), rows)
