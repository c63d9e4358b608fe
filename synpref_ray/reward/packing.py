"""Prefix-shared rows and token-budget micro-batches: the core of the speed, one module for trainer and scorer.

The replies of one prompt follow the same tokens: compute those once. A shared row is `[prefix | rest of reply 1 | rest of reply 2 | ...]`,
where the prefix is the longest common *token* prefix of the whole renderings (templates differ in the last turn, and BPE merges across the
border). Positions restart after the prefix in every branch, and branches do not see each other, so that every reward equals that of its
sequence alone, up to float error. Our choice throughout; the paper says nothing about batching.

Shape legend: G groups (one prompt each), S sequences (replies, group after group), B rows of a micro-batch, T tokens of its longest row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

Tokens = npt.NDArray[np.int32]

PADDING = -1
PREFIX = 0
BATCH_OVERHEAD_TOKENS = 48  # ours: about what one more forward pass costs, in tokens of work; decides only where rows are cut


@dataclass(frozen=True)
class Group:
    """The replies of one prompt, tokenised whole, and how they are laid out: one shared row, or a row for each reply."""

    sequences: tuple[Tokens, ...]
    prefix_tokens: int
    shared: bool

    @property
    def num_rows(self) -> int:
        return 1 if self.shared else len(self.sequences)

    @property
    def row_tokens(self) -> int:
        """Length of the longest row."""
        if not self.shared:
            return max(len(sequence) for sequence in self.sequences)
        return self.prefix_tokens + sum(len(sequence) - self.prefix_tokens for sequence in self.sequences)

    @property
    def unique_tokens(self) -> int:
        """Tokens that have to be computed when the prefix is computed once, shared or not."""
        return self.prefix_tokens + sum(len(sequence) - self.prefix_tokens for sequence in self.sequences)

    @property
    def computed_tokens(self) -> int:
        """Tokens of all rows, padding aside."""
        return self.row_tokens if self.shared else sum(len(sequence) for sequence in self.sequences)


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch as tensors.

    `branches` says for each token which branch of its row it belongs to: PREFIX, 1, 2, ..., or PADDING. `last_rows` and `last_columns` find
    the last token of every sequence, in the order of the groups and of the replies inside them. `shares` is false when every row is one
    sequence.
    """

    input_ids: torch.Tensor  # (B, T) int64
    positions: torch.Tensor  # (B, T) int64
    branches: torch.Tensor  # (B, T) int16
    last_rows: torch.Tensor  # (S,) int64
    last_columns: torch.Tensor  # (S,) int64
    shares: bool

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on `device`."""
        return PackedBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            branches=self.branches.to(device, non_blocking=True),
            last_rows=self.last_rows.to(device, non_blocking=True),
            last_columns=self.last_columns.to(device, non_blocking=True),
            shares=self.shares,
        )


@dataclass(frozen=True)
class PackingStats:
    """What packing saved and wasted, summed over micro-batches."""

    sequence_tokens: int  # tokens of all sequences, each counted whole
    unique_tokens: int  # the same with every common prefix counted once
    computed_tokens: int  # tokens of all rows, padding aside
    padded_tokens: int  # tokens of all rows, padding included: what the model processes

    @property
    def padding_fraction(self) -> float:
        return 1.0 - self.computed_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def shared_fraction(self) -> float:
        """Share of the sequences' tokens that sharing did not have to compute."""
        return 1.0 - self.computed_tokens / self.sequence_tokens if self.sequence_tokens else 0.0


def common_prefix_tokens(sequences: Sequence[Tokens]) -> int:
    """Return the length of the longest common token prefix."""
    first, *others = sequences
    length = len(first)
    for other in others:
        length = min(length, len(other))
        differing = np.flatnonzero(first[:length] != other[:length])
        length = int(differing[0]) if len(differing) else length
    return length


def make_group(sequences: Sequence[Tokens], *, may_share: bool = True, quadratic_tokens: float = float("inf")) -> Group:
    """Lay out the replies of one prompt, sharing their prefix where that is cheaper.

    `quadratic_tokens` is the row length at which attention costs as much as everything else: a row of L tokens costs
    L + L^2 / quadratic_tokens. A shared row is longer than separate ones, so a short prefix before long replies is not shared.
    """
    if not sequences or any(len(sequence) == 0 for sequence in sequences):
        raise ValueError("a group needs at least one sequence, and no sequence may be empty")
    prefix = common_prefix_tokens(sequences)
    shared = Group(tuple(sequences), prefix, shared=True)
    separate_cost = sum(row_cost(len(sequence), quadratic_tokens) for sequence in sequences)
    pays = len(sequences) > 1 and row_cost(shared.row_tokens, quadratic_tokens) < separate_cost
    return shared if may_share and pays else Group(tuple(sequences), prefix, shared=False)


def row_cost(num_tokens: int, quadratic_tokens: float) -> float:
    """Return what a row costs, in tokens of work; `quadratic_tokens` as in `make_group`."""
    return num_tokens + num_tokens * num_tokens / quadratic_tokens


def plan_batches(groups: Sequence[Group], max_tokens: int, *, overhead_tokens: int = BATCH_OVERHEAD_TOKENS) -> list[list[int]]:
    """Cut groups into micro-batches of at most `max_tokens` tokens, padding included, so that padding plus overhead is least.

    Groups are sorted by row length first (ties by index, so the plan depends on the lengths alone), longest first: if a batch does not fit
    in memory, the first one says so. A group is never split; one that exceeds the budget alone is a batch of its own.

    Returns:
        Indices into `groups`, each exactly once.
    """
    order = sorted(range(len(groups)), key=lambda i: (-groups[i].row_tokens, i))
    rows = [groups[i].num_rows for i in order]
    lengths = [groups[i].row_tokens for i in order]
    # best[j]: least cost of the first j groups in order; the batch that ends before j starts at cut[j].
    best = [0.0] + [float("inf")] * len(order)
    cut = [0] * (len(order) + 1)
    for start in range(len(order)):
        num_rows = 0
        for end in range(start + 1, len(order) + 1):
            num_rows += rows[end - 1]
            tokens = num_rows * lengths[start]
            if tokens > max_tokens and end > start + 1:
                break
            cost = best[start] + tokens + overhead_tokens
            if cost < best[end]:
                best[end], cut[end] = cost, start
    borders = [len(order)]
    while borders[-1] > 0:
        borders.append(cut[borders[-1]])
    return [order[start:end] for start, end in pairwise(reversed(borders))]


def pack(groups: Sequence[Group], pad_id: int = 0) -> PackedBatch:
    """Lay groups out as one micro-batch of tensors, padded on the right. The pad id fills; nothing ever looks for it."""
    num_rows = sum(group.num_rows for group in groups)
    shape = (num_rows, max(group.row_tokens for group in groups))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    branches = np.full(shape, PADDING, dtype=np.int16)
    last: list[tuple[int, int]] = []
    row = 0
    for group in groups:
        prefix = group.prefix_tokens if group.shared else 0
        column = prefix
        if prefix:
            input_ids[row, :prefix] = group.sequences[0][:prefix]
            positions[row, :prefix] = np.arange(prefix)
            branches[row, :prefix] = PREFIX
        for number, sequence in enumerate(group.sequences, start=1):
            start = column if group.shared else 0
            end = start + len(sequence) - prefix
            input_ids[row, start:end] = sequence[prefix:]
            positions[row, start:end] = np.arange(prefix, len(sequence))
            branches[row, start:end] = number if group.shared else PREFIX
            last.append((row, end - 1 if end > start else prefix - 1))
            column = end
            row += 0 if group.shared else 1
        row += 1 if group.shared else 0
    last_rows, last_columns = zip(*last, strict=True)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        branches=torch.from_numpy(branches),
        last_rows=torch.tensor(last_rows, dtype=torch.int64),
        last_columns=torch.tensor(last_columns, dtype=torch.int64),
        shares=any(group.shared for group in groups),
    )


def attention_mask(batch: PackedBatch, *, window: int | None = None) -> torch.Tensor:
    """Return which token may look at which, shape (B, 1, T, T), bool: [b, 0, query, key].

    A token sees the prefix and its own branch up to its own *position*; with `window`, only the last `window` positions. Every token sees
    itself, padding too, because a row of the softmax must not be empty.
    """
    branches, positions = batch.branches, batch.positions
    query, key = branches[:, :, None], branches[:, None, :]
    distance = positions[:, :, None] - positions[:, None, :]
    allowed = ((key == query) | (key == PREFIX)) & (distance >= 0) & (key != PADDING)
    if window is not None:
        allowed &= distance < window
    allowed |= torch.eye(branches.shape[1], dtype=torch.bool, device=branches.device)
    return allowed[:, None]


def packing_stats(groups: Sequence[Group], batches: Sequence[Sequence[int]]) -> PackingStats:
    """Count the tokens of a plan."""
    padded = sum(sum(groups[i].num_rows for i in batch) * max(groups[i].row_tokens for i in batch) for batch in batches)
    planned = [groups[i] for batch in batches for i in batch]
    return PackingStats(
        sequence_tokens=sum(len(sequence) for group in planned for sequence in group.sequences),
        unique_tokens=sum(group.unique_tokens for group in planned),
        computed_tokens=sum(group.computed_tokens for group in planned),
        padded_tokens=padded,
    )
