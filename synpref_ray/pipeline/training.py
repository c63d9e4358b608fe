"""Training as a step: a set of labelled pairs in, a model folder under its fingerprint out; a model that is there already is not trained again.

With the weights lie the training record, the parity record (see `pipeline/parity.py`) and a model card. A model that fails parity stays where it is,
and `train_model` ends with the reason, in every run, without training it again.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from synpref_ray.bundled import digest_folder, resolve_model
from synpref_ray.pipeline.parity import check_model, read_parity, require_parity
from synpref_ray.reporting.run import Run
from synpref_ray.reward.model_card import CARD_FILE, DEFAULT_CARD, CardConfig, describe_backbone, model_card, summarise_pairs
from synpref_ray.reward.parity_record import DEFAULT_PARITY, ParityConfig
from synpref_ray.reward.ray_trainer import train_reward_model
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_record import TrainingRecord
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.models import RECORD_FILE, StoredModel, model_is_stored, store_model
from synpref_ray.tables.pools import content_digest
from synpref_ray.tables.sidecars import fingerprint
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import versions_of

TRAIN_VERSION = 1
# What a config says about the machine and not about the result: how the global batch is spread and what is recomputed changes it by float error only.
RESOURCE_SETTINGS = {"num_threads", "use_gpu", "num_workers", "max_tokens_per_microbatch", "gradient_checkpointing", "zero_stage"}


def train_model(
    run: Run,
    storage: Storage,
    name: str,
    *,
    train: tuple[pa.Table, str],
    gold: tuple[pa.Table, str] | None,
    config: TrainConfig,
    parity: ParityConfig = DEFAULT_PARITY,
    card: CardConfig = DEFAULT_CARD,
    data_name: str = "",
) -> tuple[StoredModel, TrainingRecord]:
    """Train `models/<name>-<fp8>`, or return it if it is there; then check it against other engines and write its card.

    Args:
        train: pairs with `chosen` the preferred reply, and their digest.
        gold: the pairs that pick the checkpoint, and their digest; None keeps the last step.
        data_name: what the card calls the training pairs.

    Raises:
        ParityError: the engines disagree about the model's rewards. It stays in the workspace, with its record.
    """
    started = time.monotonic()
    backbone = resolve_model(config.backbone)
    digests = {"backbone": digest_folder(backbone), "train": train[1], "gold": gold[1] if gold else ""}
    settings = config.model_dump(mode="json", exclude=RESOURCE_SETTINGS | {"backbone"})
    settings["versions"] = versions_of("torch", "transformers", "deepspeed")
    stored = f"{name}-{fingerprint('train', TRAIN_VERSION, settings, digests)[:8]}"
    computed = 0
    if not model_is_stored(storage, stored):
        with Lease(storage, f"models/.lease-{stored}.json") as lease:
            if not model_is_stored(storage, stored):  # or another driver stored it before the lease was ours
                _train(storage, stored, train[0], gold[0] if gold else None, config.model_copy(update={"backbone": backbone}), lease)
                computed = train[0].num_rows
    record = TrainingRecord.model_validate(json.loads(storage.read_bytes(f"models/{stored}/{RECORD_FILE}")))
    model = StoredModel(storage, stored, _digest(storage, stored))
    run.step(f"train {name}", rows=train[0].num_rows, computed=computed, rejected={}, seconds=time.monotonic() - started)
    check_model(run, model, train[0], parity, max_length_tokens=config.max_length_tokens)
    text = model_card(
        stored,
        record,
        read_parity(model),
        backbone=describe_backbone(config.backbone, backbone),
        data=summarise_pairs(data_name, train[0]),
        config=card,
    )
    storage.write_bytes(f"{model.path}/{CARD_FILE}", text.encode())
    require_parity(model, parity)
    return model, record


def _train(storage: Storage, stored: str, train: pa.Table, gold: pa.Table | None, config: TrainConfig, lease: Lease) -> None:
    elsewhere = Path(tempfile.gettempdir()) / f"synpref_ray-{content_digest(storage.url)[:8]}"  # a host may serve several workspaces
    parent = Path(storage.local_path("tmp")) if storage.is_local else elsewhere
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(f"{stored}-*"):  # of a run that was killed; the lease says that nobody else is at it
        shutil.rmtree(left_over, ignore_errors=True)
    scratch = tempfile.mkdtemp(dir=parent, prefix=f"{stored}-")
    try:
        output = str(Path(scratch) / "model")
        train_reward_model(train, gold, config, output, str(Path(scratch) / "ray"))
        lease.check()
        store_model(storage, stored, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(storage: Storage, stored: str) -> str:
    """Return the model's content digest, from its own local folder, or as first written down on object storage."""
    path = f"models/{stored}.digest"
    if storage.is_local:
        return digest_folder(storage.local_path(f"models/{stored}"))
    if not storage.exists(path):
        storage.write_bytes(path, digest_folder(StoredModel(storage, stored, f"new-{stored}").local_folder()).encode())
    return storage.read_bytes(path).decode()
