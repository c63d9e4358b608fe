"""Embeddings of a pair's prompt and attributes: what "similar" means in both retrievals. Paper: Sec. 3.2, Step 2 embeds (x, a) with
jina-embeddings-v3.

Shapes: P pairs or texts, W windows, T tokens, E embedding size.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from synpref_ray.bundled import resolve_model
from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, SchemaError
from synpref_ray.schema import DropReason, Message
from synpref_ray.tables.pools import require_columns

logger = logging.getLogger(__name__)

ATTRIBUTES = ("task_category", "objectivity", "controversiality", "desired_attributes", "annotation_guideline")
EMBEDDING_REQUIRES = ("pair_id", "prompt", *ATTRIBUTES)


class EmbedderConfig(Settings):
    """The embedding model and how it runs. Pooling and normalising are the model's own (its modules.json), whatever the model.

    Both sides of a retrieval are (x, a), so both are embedded alike: a model that tells queries from passages gets one `prefix`, or one `task`.
    """

    model: str = "sentence-transformers/all-MiniLM-L6-v2"  # ours: bundled, runs anywhere; Paper: Sec. 3.2 takes jinaai/jina-embeddings-v3
    trust_remote_code: bool = False  # jina-embeddings-v3 brings its own modelling code, which is run only if this says so
    prefix: str = ""  # ours: written before every text, for models that want an instruction; a long text's later windows go without
    task: str = ""  # the adapter of a model that has several: text-matching for jina-embeddings-v3
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # ours: exact on CPUs; bfloat16 on GPUs
    device: str = "cpu"
    """Where the model runs, as torch names it."""
    batch_windows: int = Field(default=32, ge=1)  # ours: 32 windows of 256 tokens keep two cores busy and fit any GPU
    max_window_tokens: int = Field(default=256, ge=8)  # what all-MiniLM-L6-v2 was trained for; 8192 for jina-embeddings-v3
    num_threads: int = Field(default=2, ge=1)  # ours: torch's threads on CPU, set by hand because Ray's CPUs are logical


class TextEmbedder(Protocol):
    """Anything that turns texts into unit vectors."""

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...


def embeddings_schema(dimension: int) -> pa.Schema:
    """Return the schema of an embeddings sidecar for vectors of this size."""
    return pa.schema(
        [
            pa.field("pair_id", pa.string(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), dimension)),
            pa.field("drop_reason", pa.string()),
        ]
    )


def serialise_for_embedding(prompt: Sequence[Message], attributes: Mapping[str, str | None]) -> str:
    """Return the text that stands for (x, a): the conversation as `role: content` lines, a blank line, then the attributes that are known.

    Paper: Sec. 3.2 embeds (x, a) and never the replies. Our choice: how the two are written, which the paper leaves open.
    """
    turns = [f"{message['role']}: {message['content']}" for message in prompt]
    known = [f"{name.replace('_', ' ')}: {attributes[name]}" for name in ATTRIBUTES if attributes.get(name)]
    return "\n".join([*turns, "", *known]) if known else "\n".join(turns)


class Embedder:
    """A sentence-transformers model. Build it with `load`."""

    def __init__(self, model: Any, config: EmbedderConfig) -> None:
        self._model = model
        self._config = config

    @classmethod
    def load(cls, config: EmbedderConfig) -> Self:
        """Load the model.

        Raises:
            InputError: the model is missing.
            ConfigError: `max_window_tokens` exceeds the positions that the model has, or it brings code that is not trusted.
        """
        import torch
        from sentence_transformers import SentenceTransformer

        started = time.monotonic()
        folder = resolve_model(config.model)
        if not config.trust_remote_code and (code := _own_code(Path(folder))):
            raise ConfigError(f"{config.model} brings its own code ({code}): read it, and set embedder.trust_remote_code=true to run it")
        torch.set_num_threads(config.num_threads)
        kwargs = {"dtype": getattr(torch, config.dtype)}
        model = SentenceTransformer(folder, device=config.device, trust_remote_code=config.trust_remote_code, model_kwargs=kwargs)
        positions = min(model.tokenizer.model_max_length, _num_positions(Path(folder)))
        if config.max_window_tokens > positions:
            raise ConfigError(f"max_window_tokens is {config.max_window_tokens}, but {config.model} reads at most {positions} tokens")
        logger.info("embedder %s from %s on %s in %.1f s", config.model, folder, model.device, time.monotonic() - started)
        return cls(model, config)

    @property
    def dimension(self) -> int:
        """E."""
        return int(self._model.get_embedding_dimension())

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return (P, E) unit vectors, in the order of the texts.

        Our choice: a text longer than `max_window_tokens` is read in windows of that size, and its vector is their mean weighted by tokens;
        so long prompts are never cut, and their attributes, which come last, count.
        """
        import torch

        sums = np.zeros((len(texts), self.dimension), dtype=np.float64)
        windows, owners = self._windows([self._config.prefix + text for text in texts])
        task = {"task": self._config.task} if self._config.task else {}
        by_length = sorted(range(len(windows)), key=lambda window: (len(windows[window]), window))
        for start in range(0, len(by_length), self._config.batch_windows):
            batch = by_length[start : start + self._config.batch_windows]
            features = self._model.tokenizer.pad({"input_ids": [windows[window] for window in batch]}, return_tensors="pt")
            with torch.inference_mode():
                vectors = self._model({name: value.to(self._model.device) for name, value in features.items()}, **task)["sentence_embedding"]
            for window, vector in zip(batch, vectors.float().cpu().numpy(), strict=True):
                sums[owners[window]] += vector.astype(np.float64) * len(windows[window])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return np.asarray(sums / np.maximum(norms, np.finfo(np.float32).tiny), dtype=np.float32)

    def _windows(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Return the token ids of all windows, special tokens included, and the text each belongs to."""
        if not texts:
            return [], []
        encoded = self._model.tokenizer(
            list(texts), truncation=True, max_length=self._config.max_window_tokens, return_overflowing_tokens=True, verbose=False
        )
        return encoded["input_ids"], encoded["overflow_to_sample_mapping"]


def _own_code(folder: Path) -> str:
    """Return the name of a class that a model folder defines in code of its own; empty where it has none."""
    classes = []
    if (folder / "modules.json").is_file():
        classes = [module["type"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    classes += json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).values()
    return next((str(name) for name in classes if not str(name).startswith("sentence_transformers.")), "")


def _num_positions(folder: Path) -> int:
    """Return how many tokens a model's config allows; models that say nothing have no such bound."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings", 1 << 30))


def add_embeddings(shard: pa.Table, embedder: TextEmbedder) -> pa.Table:
    """Embed every pair of a shard that has attributes (`embeddings_schema`, rows and order kept).

    Args:
        shard: with `EMBEDDING_REQUIRES`; a pair without any attribute (the tagger failed, or was not asked) gets null and `no_attributes`.
    """
    require_columns(shard, EMBEDDING_REQUIRES, step="embed")
    attributes = shard.select(list(ATTRIBUTES)).to_pylist()
    tagged = [any(values.values()) for values in attributes]
    prompts = shard.column("prompt").to_pylist()
    texts = [serialise_for_embedding(prompts[row], attributes[row]) for row, has_any in enumerate(tagged) if has_any]
    vectors = np.zeros((shard.num_rows, embedder.dimension), dtype=np.float32)
    vectors[np.array(tagged, dtype=bool)] = embedder.embed(texts)
    missing = pa.array([not has_any for has_any in tagged], pa.bool_())
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), embedder.dimension, mask=missing)
    reasons = pa.array([None if has_any else DropReason.NO_ATTRIBUTES.value for has_any in tagged], pa.string())
    return pa.table([shard.column("pair_id"), embedding, reasons], schema=embeddings_schema(embedder.dimension))


def embedding_matrix(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """Return a column of embeddings without nulls as (P, E) float32.

    Raises:
        SchemaError: the column holds something else, or nulls.
    """
    if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32() or column.null_count:
        raise SchemaError(f"expected embeddings (fixed-size lists of float32, no nulls), found {column.type} with {column.null_count} nulls")
    parts = [np.asarray(chunk.flatten().to_numpy(zero_copy_only=False), dtype=np.float32) for chunk in column.chunks]
    values = np.concatenate(parts) if parts else np.zeros(0, dtype=np.float32)
    return values.reshape(-1, column.type.list_size)
