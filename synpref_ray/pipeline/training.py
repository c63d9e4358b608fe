"""Training as a step: a set of labelled pairs in, a model folder under its fingerprint out; a model that is there already is not trained again.

With the weights lie the training record, the parity record (see `pipeline/parity.py`) and a model card. A model that fails parity stays where it is,
and `train_model` ends with the reason, in every run, without training it again.
"""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from synpref_ray.bundled import digest_folder, digest_model, pin_model, plain_name, resolve_model
from synpref_ray.pipeline.cluster import tell_if_no_room
from synpref_ray.pipeline.metrics import TrainingWatch
from synpref_ray.pipeline.parity import check_model, read_parity, require_parity
from synpref_ray.pipeline.training_batches import prepare_set
from synpref_ray.reporting.run import Run
from synpref_ray.reward.checkpoints import TrainingFolder
from synpref_ray.reward.model import load_tokenizer, read_row_layout
from synpref_ray.reward.model_card import CARD_FILE, DEFAULT_CARD, CardConfig, DataSummary, describe_backbone, model_card, summarise_pairs
from synpref_ray.reward.parity_record import DEFAULT_PARITY, ParityConfig
from synpref_ray.reward.ray_trainer import run_on_ray
from synpref_ray.reward.render import RENDER_VERSION
from synpref_ray.reward.trainer import make_model
from synpref_ray.reward.training_config import RESOURCE_SETTINGS, TrainConfig
from synpref_ray.reward.training_data import TrainingData, prepare_data
from synpref_ray.reward.training_record import TrainingRecord
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.models import RECORD_FILE, StoredModel, model_is_stored, store_model
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.sets import AS_INGESTED, PairSet, iter_shards
from synpref_ray.tables.sidecars import fingerprint
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import versions_of

TRAIN_VERSION = 3  # 3: under bfloat16 the residual stream is bfloat16 too, which changes what is learnt
SAMPLED_PAIRS = 1000  # ours: of a set, this many are read to draw the few on which engines are compared
PairTable: TypeAlias = pa.Table | Callable[[], pa.Table]
"""Pairs that fit in memory, or what reads them; it is called only where something trains or is measured."""
TrainingPairs = tuple[PairTable, str] | PairSet
"""Pairs with `chosen` the preferred reply: a table and its digest, or a set of the workspace of any size."""


def train_model(
    run: Run,
    storage: Storage,
    name: str,
    *,
    train: TrainingPairs,
    gold: tuple[PairTable, str] | None,
    config: TrainConfig,
    parity: ParityConfig = DEFAULT_PARITY,
    card: CardConfig = DEFAULT_CARD,
    data_name: str = "",
) -> tuple[StoredModel, TrainingRecord]:
    """Train `models/<name>-<fp8>`, or return it if it is there; then check it against other engines and write its card.

    A training that was killed goes on from its last checkpoint.

    Args:
        gold: the pairs that pick the checkpoint, and their digest; None keeps the last step.
        data_name: what the card calls the training pairs.

    Raises:
        ParityError: the engines disagree about the model's rewards. It stays in the workspace, with its record.
    """
    started = time.monotonic()
    config = config.model_copy(update={"backbone": pin_model(config.backbone)})
    digest = train.digest if isinstance(train, PairSet) else train[1]
    digests = {"backbone": digest_model(config.backbone), "train": digest, "gold": gold[1] if gold else ""}
    if isinstance(train, PairSet) and any(member.as_ingested for member in train.members):
        digests["labels"] = AS_INGESTED  # models of earlier versions were trained on such sets with flips applied
    unused: set[str] = set() if config.evaluate_every_steps else {"evaluate_every_steps"}  # models from before this setting keep their names
    settings = config.model_dump(mode="json", exclude=RESOURCE_SETTINGS | {"backbone"} | unused)
    settings["versions"] = versions_of("torch", "transformers", "tokenizers", "deepspeed")
    settings["render_version"] = RENDER_VERSION
    stored = f"{name}-{fingerprint('train', TRAIN_VERSION, settings, digests)[:8]}"
    trained = False
    if not model_is_stored(storage, stored):
        with Lease(storage, f"models/.lease-{stored}.json") as lease:
            if not model_is_stored(storage, stored):  # or another driver stored it before the lease was ours
                folder = TrainingFolder(storage, f"tmp/train-{stored}")
                folder.claim(stored)
                data = _prepare(run, train, _table(gold[0]) if gold else None, config, folder)
                _train_and_store(data, config, folder, stored, lease, _summarise(data_name, train))
                trained = True
    record = TrainingRecord.model_validate(json.loads(storage.read_bytes(f"models/{stored}/{RECORD_FILE}")))
    model = StoredModel(storage, stored, _digest(storage, stored))
    pairs, dropped = record.num_pairs + sum(record.num_dropped.values()), record.num_dropped
    epochs = config.num_epochs
    run.step(f"train {name}", rows=pairs, computed=pairs if trained else 0, rejected=dropped, seconds=time.monotonic() - started, epochs=epochs)
    check_model(run, model, lambda: _sample(train), parity, max_length_tokens=config.max_length_tokens)
    text = model_card(
        stored,
        record,
        read_parity(model),
        backbone=describe_backbone(plain_name(config.backbone), resolve_model(config.backbone, weights=False)),
        data=_summarise(data_name, train) if record.num_by_source is None else DataSummary(data_name, record.num_by_source),
        config=card,
    )
    storage.write_bytes(f"{model.path}/{CARD_FILE}", text.encode())
    require_parity(model, parity)
    return model, record


def _table(pairs: PairTable) -> pa.Table:
    return pairs if isinstance(pairs, pa.Table) else pairs()


def _sample(train: TrainingPairs) -> pa.Table:
    """Return pairs enough to draw a sample from: all of a table, the first shards of a set."""
    if not isinstance(train, PairSet):
        return _table(train[0])
    tables: list[pa.Table] = []
    for table in iter_shards(train, ["prompt", "chosen", "rejected"]):
        tables.append(table)
        if sum(read.num_rows for read in tables) >= SAMPLED_PAIRS:
            break
    return pa.concat_tables(tables)


def _summarise(name: str, train: TrainingPairs) -> DataSummary:
    """Count the training pairs by source, one shard of a set at a time."""
    counts: Counter[str] = Counter()
    for table in iter_shards(train, ["source"]) if isinstance(train, PairSet) else [_table(train[0])]:
        counts.update(summarise_pairs(name, table).num_by_source)
    return DataSummary(name, dict(sorted(counts.items(), key=lambda entry: (-entry[1], str(entry[0])))))


def _prepare(run: Run, train: TrainingPairs, gold: pa.Table | None, config: TrainConfig, folder: TrainingFolder) -> TrainingData:
    """Plan the batches; they depend on the size of micro-batches too, which may change between a kill and the next start."""
    batches = f"{folder.path}/batches-{config.max_tokens_per_microbatch}"
    if isinstance(train, PairSet):
        return prepare_set(run, train, gold, config, config.backbone, folder.storage, batches)
    backbone = resolve_model(config.backbone, weights=False)
    layout = read_row_layout(backbone, config.max_tokens_per_microbatch)
    return prepare_data(load_tokenizer(backbone), _table(train[0]), gold, config, layout, folder.storage, batches)


def _train_and_store(data: TrainingData, config: TrainConfig, folder: TrainingFolder, stored: str, lease: Lease, summary: DataSummary) -> None:
    storage, started = folder.storage, time.perf_counter()
    elsewhere = Path(tempfile.gettempdir()) / f"synpref_ray-{content_digest(storage.url)[:8]}"  # a host may serve several workspaces
    parent = Path(storage.local_path("tmp")) if storage.is_local else elsewhere
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(f"{stored}-*"):  # of a run that was killed; the lease says that nobody else is at it
        shutil.rmtree(left_over, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=parent, prefix=f"{stored}-"))
    try:
        tell_if_no_room(f"train {stored}", 1.0, float(config.use_gpu))
        record = run_on_ray(data, config, folder, str(scratch / "ray"), TrainingWatch(stored))
        seconds = {**record.seconds, "total": time.perf_counter() - started}
        record = record.model_copy(update={"seconds": seconds, "num_by_source": dict(summary.num_by_source)})
        make_model(folder, record, str(scratch / "model"))
        lease.check()
        if not storage.is_local:
            storage.write_bytes(_digest_path(stored), digest_folder(str(scratch / "model")).encode())
        store_model(storage, stored, str(scratch / "model"))
        folder.remove()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(storage: Storage, stored: str) -> str:
    """Return the model's content digest, from its own local folder, or as written down on object storage when the model was stored."""
    if storage.is_local:
        return digest_folder(storage.local_path(f"models/{stored}"))
    return storage.read_bytes(_digest_path(stored)).decode()


def _digest_path(stored: str) -> str:
    return f"models/{stored}.digest"
