"""Planned micro-batches on storage: what a training run reads instead of pairs.

The order of an epoch is cut into windows of whole optimizer steps. A window's micro-batches lie one after the other in one file, each an Arrow
stream of its own, with an index beside it that says where each one is and how much work it holds. So a rank fetches exactly its micro-batches,
by byte range, from a local disk or from object storage; the whole plan of 26 million pairs is an index of about 140 MB; and the position in
the data is one integer, the optimizer step. Our choice throughout.

Shape legend: P pairs, M micro-batches of the whole run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.errors import InputError
from synpref_ray.reward.packing import Group, PackingStats, packing_stats
from synpref_ray.reward.pair_groups import PairGroup, num_pairs
from synpref_ray.tables.storage import Storage

MICROBATCH_SCHEMA = pa.schema(
    [
        pa.field("sequences", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("prefix_tokens", pa.int32(), nullable=False),
        pa.field("shared", pa.bool_(), nullable=False),
        pa.field("pair_ids", pa.list_(pa.string()), nullable=False),
        pa.field("chosen", pa.list_(pa.int32()), nullable=False),
        pa.field("rejected", pa.list_(pa.int32()), nullable=False),
    ]
)
COUNTS = ("groups", "pairs", "padded_tokens", "computed_tokens", "unique_tokens", "sequence_tokens")
INDEX_SCHEMA = pa.schema([pa.field(name, pa.int64(), nullable=False) for name in ("step", "window", "offset", "length", *COUNTS)])
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Microbatch:
    """Groups that go through the model together, and the ids of their pairs in the order of `pair_groups.pair_places`."""

    groups: tuple[PairGroup, ...]
    pair_ids: tuple[str, ...]

    def part(self, start: int, stop: int) -> "Microbatch":
        """Return the groups number `start` to `stop` - 1."""
        kept, before = self.groups[start:stop], num_pairs(self.groups[:start])
        return Microbatch(kept, self.pair_ids[before : before + num_pairs(kept)])


@dataclass(frozen=True)
class PlannedStep:
    """The micro-batches of one optimizer step (numbered from 1), with the ids that their groups' pair numbers stand for."""

    step: int
    batches: tuple[tuple[PairGroup, ...], ...]
    pair_ids: Sequence[str]


class BatchIndex:
    """Where the micro-batches of a run are, by optimizer step (from 1); a few columns of numbers, the same on every rank."""

    def __init__(self, storage: Storage, folder: str, table: pa.Table):
        self._storage, self._folder = storage, folder
        self._columns: dict[str, Counts] = {name: table[name].to_numpy() for name in INDEX_SCHEMA.names}
        steps = self._columns["step"]
        self.num_steps = int(steps[-1]) if len(steps) else 0
        self._first = np.searchsorted(steps, np.arange(1, self.num_steps + 2))

    def batches_of(self, step: int) -> range:
        """Return the numbers (0 to M - 1) of the micro-batches of an optimizer step, largest first as they were planned."""
        return range(int(self._first[step - 1]), int(self._first[step]))

    def column(self, name: str, numbers: range) -> Counts:
        """Return a column of COUNTS for micro-batches."""
        return self._columns[name][numbers.start : numbers.stop]

    def stats(self, numbers: range) -> PackingStats:
        """Return the token counts of micro-batches."""
        values = {name: int(self.column(name, numbers).sum()) for name in ("sequence_tokens", "unique_tokens", "computed_tokens", "padded_tokens")}
        return PackingStats(**values)

    @property
    def num_pairs(self) -> int:
        """Pairs of all steps; with several epochs a pair counts once in each."""
        return int(self._columns["pairs"].sum())

    def fetch(self, number: int) -> bytes:
        """Return a micro-batch as stored; `decode` makes groups of it."""
        offset, length, window = (int(self._columns[name][number]) for name in ("offset", "length", "window"))
        return self._storage.read_range(_data_path(self._folder, window), offset, length)


def write_window(storage: Storage, folder: str, window: int, steps: Iterable[PlannedStep]) -> None:
    """Write the micro-batches of a window, then its index, which seals it."""
    sink = pa.BufferOutputStream()
    rows: list[tuple[int, ...]] = []
    for planned in steps:
        for groups in planned.batches:
            offset = sink.tell()
            _encode(groups, planned.pair_ids, sink)
            stats = packing_stats([group.group for group in groups], [range(len(groups))])
            counts = (stats.padded_tokens, stats.computed_tokens, stats.unique_tokens, stats.sequence_tokens)
            rows.append((planned.step, window, offset, sink.tell() - offset, len(groups), num_pairs(groups), *counts))
    storage.write_bytes(_data_path(folder, window), sink.getvalue().to_pybytes())
    columns = list(zip(*rows, strict=True)) or [()] * len(INDEX_SCHEMA)
    storage.write_table(_index_path(folder, window), pa.table([pa.array(column, pa.int64()) for column in columns], schema=INDEX_SCHEMA))


def written_windows(storage: Storage, folder: str) -> set[int]:
    """Return the numbers of the windows that are whole."""
    names = [PurePosixPath(path).name for path in storage.list_files(folder)]
    return {int(name.removesuffix(".index.parquet").rpartition("-")[2]) for name in names if name.endswith(".index.parquet")}


def open_batches(storage: Storage, folder: str, num_windows: int) -> BatchIndex:
    """Return the index of all windows.

    Raises:
        InputError: a window is missing, or steps are not numbered 1, 2, 3, ….
    """
    if missing := sorted(set(range(num_windows)) - written_windows(storage, folder)):
        raise InputError(f"{storage.join(folder)} lacks {len(missing)} of {num_windows} windows of batches (the first is {missing[0]})")
    table = pa.concat_tables([storage.read_table(_index_path(folder, window)) for window in range(num_windows)])
    steps = table["step"].to_numpy()
    if not len(steps) or steps[0] != 1 or not np.isin(np.diff(steps), (0, 1)).all():
        raise InputError(f"{storage.join(folder)} does not hold the optimizer steps from 1 on, each in one window and in order")
    return BatchIndex(storage, folder, table)


def decode(blob: bytes) -> Microbatch:
    """Return the groups of a stored micro-batch; token ids are views of `blob`, not copies. Pair numbers count from 0 in the micro-batch."""
    with pa.ipc.open_stream(pa.py_buffer(blob)) as reader:
        batch = reader.read_next_batch()
    lists = batch.column("sequences")
    replies = lists.values  # list<int32>, one entry per sequence
    tokens, ends = replies.values.to_numpy(), replies.offsets.to_numpy()
    group_ends = lists.offsets.to_numpy()
    plain = batch.select(["prefix_tokens", "shared", "pair_ids", "chosen", "rejected"]).to_pylist()
    groups: list[PairGroup] = []
    ids: list[str] = []
    for number, row in enumerate(plain):
        places = range(int(group_ends[number]), int(group_ends[number + 1]))
        sequences = tuple(tokens[ends[place] : ends[place + 1]] for place in places)
        numbers = tuple(range(len(ids), len(ids) + len(row["pair_ids"])))
        group = Group(sequences, row["prefix_tokens"], row["shared"])
        groups.append(PairGroup(group, numbers, tuple(row["chosen"]), tuple(row["rejected"])))
        ids += row["pair_ids"]
    return Microbatch(tuple(groups), tuple(ids))


def _encode(groups: Sequence[PairGroup], ids: Sequence[str], sink: pa.BufferOutputStream) -> None:
    sequences = [list(group.group.sequences) for group in groups]
    columns = {
        "sequences": pa.array(sequences, MICROBATCH_SCHEMA.field("sequences").type),
        "prefix_tokens": pa.array([group.group.prefix_tokens for group in groups], pa.int32()),
        "shared": pa.array([group.group.shared for group in groups], pa.bool_()),
        "pair_ids": pa.array([[ids[pair] for pair in group.pairs] for group in groups], pa.list_(pa.string())),
        "chosen": pa.array([group.chosen for group in groups], pa.list_(pa.int32())),
        "rejected": pa.array([group.rejected for group in groups], pa.list_(pa.int32())),
    }
    batch = pa.record_batch(columns, schema=MICROBATCH_SCHEMA)
    with pa.ipc.new_stream(sink, MICROBATCH_SCHEMA) as writer:
        writer.write_batch(batch)


def _data_path(folder: str, window: int) -> str:
    return f"{folder}/window-{window:05d}.arrows"


def _index_path(folder: str, window: int) -> str:
    return f"{folder}/window-{window:05d}.index.parquet"
