"""What a training run reads: its batches on storage, the gold that picks the checkpoint, and the loader that keeps a rank supplied.

The driver tokenises, plans and writes the batches once (`prepare_data`, or the steps of `pipeline.training` for data that no single process
holds); a worker opens their index and fetches its own micro-batches, some steps ahead, in a thread. Paper: App. E gives lengths and batch sizes;
the rest is ours.
"""

import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from synpref_ray.errors import InputError
from synpref_ray.reward.batch_store import BatchIndex, Microbatch, decode, open_batches, write_window
from synpref_ray.reward.pair_groups import RowLayout, group_pairs, prompt_keys
from synpref_ray.reward.render import RenderedPairs, render_pairs, template_digest
from synpref_ray.reward.tokenise import TokensInMemory, tokenise_pairs
from synpref_ray.reward.training_config import TrainConfig
from synpref_ray.reward.training_plan import BatchSpec, Piece, deal_to_ranks, microbatches, plan_window, plan_windows
from synpref_ray.tables.storage import Storage


@dataclass(frozen=True)
class TrainingData:
    """One run's data; small enough to travel to every worker."""

    storage: Storage
    folder: str
    """Where the batches are, under the root of `storage`."""
    num_windows: int
    num_pairs: int
    num_dropped: dict[str, int]
    gold: tuple[Microbatch, ...] | None
    """The pairs to choose the checkpoint by; None keeps the last step."""
    num_gold_dropped: dict[str, int]
    template_digest: str
    num_epochs: int

    def open(self) -> BatchIndex:
        """Return the index of the batches."""
        return open_batches(self.storage, self.folder, self.num_windows)

    @property
    def num_gold_pairs(self) -> int:
        return sum(len(batch.pair_ids) for batch in self.gold or ())


def batch_spec(config: TrainConfig, layout: RowLayout) -> BatchSpec:
    """Return what decides the batches of a run."""
    return BatchSpec(config.seed, config.num_epochs, config.global_batch_pairs, config.shuffle_window_pairs, config.max_tokens_per_microbatch, layout)


def prepare_data(
    tokenizer: Any, train: pa.Table, gold: pa.Table | None, config: TrainConfig, layout: RowLayout, storage: Storage, folder: str
) -> TrainingData:
    """Tokenise two tables that fit in memory, plan the batches and write them under `folder`.

    Raises:
        InputError: a table is empty, or every pair of it is too long.
    """
    tokens = tokenise_pairs(tokenizer, train, config.max_length_tokens)
    dropped = count_dropped(tokens["drop_reason"])
    shards, spec = TokensInMemory(tokens), batch_spec(config, layout)
    require_pairs("train", sum(shards.counts), tokens.num_rows, dropped)
    windows = plan_windows(sum(shards.counts), spec)
    for window in windows:
        write_window(storage, folder, window.number, plan_window(shards, window, spec))
    chosen_by, gold_dropped = prepare_gold(tokenizer, gold, config, layout)
    return TrainingData(
        storage, folder, len(windows), sum(shards.counts), dropped, chosen_by, gold_dropped, template_digest(tokenizer), config.num_epochs
    )


def prepare_gold(
    tokenizer: Any, gold: pa.Table | None, config: TrainConfig, layout: RowLayout
) -> tuple[tuple[Microbatch, ...] | None, dict[str, int]]:
    """Return gold as micro-batches, and how many of its pairs were dropped, by reason.

    Raises:
        InputError: gold is given and none of it can be used.
    """
    if gold is None:
        return None, {}
    rendered = render_pairs(tokenizer, gold, config.max_length_tokens)
    usable = rendered.usable()
    dropped = dict(Counter(reason for reason in rendered.drop_reasons if reason is not None))
    require_pairs("gold", len(usable), len(rendered), dropped)
    groups = group_pairs({i: rendered.sequences(i) for i in usable}, prompt_keys(gold["prompt"]), layout)
    batches = microbatches(groups, config.max_tokens_per_microbatch)
    return tuple(Microbatch(batch, _ids(rendered, batch)) for batch in batches), dropped


def require_pairs(kind: str, num_usable: int, num_given: int, dropped: dict[str, int]) -> None:
    """Refuse data of which nothing is left."""
    if not num_usable:
        raise InputError(f"no {kind} pair to use: {num_given} given, dropped: {dropped or 'none'}")


def count_dropped(reasons: pa.ChunkedArray) -> dict[str, int]:
    """Count drop reasons, nulls aside."""
    return {entry["values"]: entry["counts"] for entry in reasons.value_counts().to_pylist() if entry["values"] is not None}


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch for this rank. One of weight 0 only keeps step with the other ranks: it runs, and counts for nothing."""

    microbatch: Microbatch
    weight: float


def load_pieces(pieces: Sequence[Piece], batches: Sequence[Microbatch]) -> list[LoadedBatch]:
    """Return a rank's share of micro-batches that are in memory."""
    return [_load(piece, batches[piece.number]) for piece in pieces]


class StepLoader:
    """Yields, for every optimizer step from `first_step` on, this rank's micro-batches; fetches `prefetch_steps` steps ahead in a thread.

    From object storage they come onto the local disk first, so that a slow moment of the storage is bridged without holding them in memory.
    """

    def __init__(self, index: BatchIndex, storage: Storage, *, rank: int, world_size: int, first_step: int, prefetch_steps: int):
        self._index, self._rank, self._world_size = index, rank, world_size
        self._steps = range(first_step, index.num_steps + 1)
        self._prefetch_steps = prefetch_steps
        self._spool = None if storage.is_local else tempfile.TemporaryDirectory(prefix="synpref_ray-batches-")
        self.stalled_seconds = 0.0
        """How long `__iter__` has waited for data."""

    def __iter__(self) -> Iterator[list[LoadedBatch]]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as thread:
            try:
                ahead = deque(thread.submit(self._fetch, step) for step in self._steps[: self._prefetch_steps])
                for number in range(len(self._steps)):
                    began = time.perf_counter()
                    pieces, blobs = ahead.popleft().result()
                    self.stalled_seconds += time.perf_counter() - began
                    ahead.extend(thread.submit(self._fetch, step) for step in self._steps[number + self._prefetch_steps :][:1])
                    yield [_load(piece, decode(_content(blob))) for piece, blob in zip(pieces, blobs, strict=True)]
            finally:
                thread.shutdown(wait=True, cancel_futures=True)
                if self._spool is not None:
                    self._spool.cleanup()

    def _fetch(self, step: int) -> tuple[list[Piece], list[bytes | Path]]:
        numbers = self._index.batches_of(step)
        groups, tokens = (self._index.column(name, numbers).tolist() for name in ("groups", "padded_tokens"))
        pieces = deal_to_ranks(groups, tokens, self._world_size)[self._rank]
        blobs: list[bytes | Path] = []
        for place, piece in enumerate(pieces):
            blob = self._index.fetch(numbers[piece.number])
            if self._spool is None:
                blobs.append(blob)
                continue
            file = Path(self._spool.name) / f"{step}-{place}"
            file.write_bytes(blob)
            blobs.append(file)
        return pieces, blobs


def _content(blob: bytes | Path) -> bytes:
    if isinstance(blob, bytes):
        return blob
    content = blob.read_bytes()
    blob.unlink()
    return content


def _load(piece: Piece, batch: Microbatch) -> LoadedBatch:
    empty = piece.start == piece.stop
    return LoadedBatch(batch.part(0, 1) if empty else batch.part(piece.start, piece.stop), 0.0 if empty else 1.0)


def _ids(rendered: RenderedPairs, batch: Sequence[Any]) -> tuple[str, ...]:
    return tuple(rendered.pair_ids[pair] for group in batch for pair in group.pairs)
