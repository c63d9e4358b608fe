"""Which pairs share their prompt's tokens: those of one prompt, their identical replies laid out once. Used by the trainer and the scorer alike.

Sources with several replies to a prompt (UltraFeedback's four, six pairs of them) repeat the prompt in every pair and every reply in several
pairs. Merged, each text is computed once, and the loss or the margin of every pair is read from the shared rewards. Our choice throughout.

Shape legend: P pairs, G groups, S sequences (the different replies of a group).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from synpref_ray.reward.packing import Group, RowLayout, Tokens, batch_tokens, make_group
from synpref_ray.schema import pair_id

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairGroup:
    """Pairs of one prompt over a group of its different replies.

    Pair number `pairs[n]` (the caller's index) has its chosen reply in `group.sequences[chosen[n]]` and its rejected one in
    `group.sequences[rejected[n]]`.
    """

    group: Group
    pairs: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def prompt_keys(prompts: pa.ChunkedArray) -> list[str]:
    """Return for every prompt (list of role and content) a key that equal prompts share, and no others."""
    return [pair_id(prompt, "", "") for prompt in prompts.to_pylist()]


def group_pairs(pairs: Mapping[int, tuple[Tokens, Tokens]], keys: Sequence[str], layout: RowLayout) -> list[PairGroup]:
    """Merge pairs of one prompt where that makes fewer tokens to compute.

    Args:
        pairs: index to the token ids of (chosen, rejected), whole conversations.
        keys: for every index of `pairs` the key of its prompt; the key only proposes: what is shared is decided by the tokens.

    Returns:
        Groups in the order of their first pair; every index is in exactly one.
    """
    by_prompt: dict[str, list[int]] = {}
    for index in pairs:
        by_prompt.setdefault(keys[index], []).append(index)
    groups = [group for members in by_prompt.values() for group in _merge([(index, *pairs[index]) for index in members], layout)]
    return sorted(groups, key=lambda group: group.pairs[0])


def pair_places(groups: Sequence[PairGroup]) -> tuple[Indices, Indices]:
    """Return where in the rewards (S,) of a micro-batch of these groups the chosen and the rejected reply of every pair are, (P,) each."""
    chosen: list[int] = []
    rejected: list[int] = []
    start = 0
    for group in groups:
        chosen += [start + place for place in group.chosen]
        rejected += [start + place for place in group.rejected]
        start += len(group.group.sequences)
    return np.asarray(chosen, dtype=np.int64), np.asarray(rejected, dtype=np.int64)


def num_pairs(groups: Sequence[PairGroup]) -> int:
    """Count the pairs of groups."""
    return sum(len(group.pairs) for group in groups)


class _Growing:
    """The different replies met so far, with the pairs over them."""

    def __init__(self, layout: RowLayout):
        self._layout = layout
        self._places: dict[bytes, int] = {}
        self.sequences: list[Tokens] = []
        self.members: list[tuple[int, int, int]] = []

    def add(self, index: int, chosen: Tokens, rejected: Tokens) -> None:
        self.members.append((index, self._place(chosen), self._place(rejected)))

    def _place(self, sequence: Tokens) -> int:
        place = self._places.setdefault(sequence.tobytes(), len(self.sequences))
        if place == len(self.sequences):
            self.sequences.append(sequence)
        return place

    def with_pair(self, index: int, chosen: Tokens, rejected: Tokens) -> "_Growing":
        other = _Growing(self._layout)
        other._places, other.sequences, other.members = dict(self._places), list(self.sequences), list(self.members)
        other.add(index, chosen, rejected)
        return other

    def finish(self) -> PairGroup:
        pairs, chosen, rejected = zip(*self.members, strict=True)
        return PairGroup(self.laid_out(), pairs, chosen, rejected)

    def laid_out(self) -> Group:
        return make_group(self.sequences, may_share=self._layout.may_share)


def _merge(members: Sequence[tuple[int, Tokens, Tokens]], layout: RowLayout) -> Iterator[PairGroup]:
    """Grow a group pair by pair while that is cheaper than a new one; greedy, in the order given."""
    current: _Growing | None = None
    for member in members:
        alone = _Growing(layout)
        alone.add(*member)
        if current is None:
            current = alone
            continue
        merged = current.with_pair(*member)
        tokens = batch_tokens([merged.laid_out()])
        pays = tokens < batch_tokens([current.laid_out()]) + batch_tokens([alone.laid_out()])
        if (pays and tokens <= layout.max_group_tokens) or len(merged.sequences) == len(current.sequences):
            current = merged
        else:
            yield current.finish()
            current = alone
    if current is not None:
        yield current.finish()
