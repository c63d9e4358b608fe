"""Pairs as token ids: tokenised once per template, read by every training over them (Our choice; the paper says nothing about it)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from synpref_ray.reward.pair_groups import prompt_keys
from synpref_ray.reward.render import OverLong, RenderedPairs, render_pairs
from synpref_ray.reward.training_plan import TOKENS_SCHEMA, usable

ROWS_AT_ONCE = 8192  # ours: a tokenizer's lists of Python integers take ten times the memory of the table that they become


def tokenise_pairs(tokenizer: Any, pairs: pa.Table, max_length_tokens: int, over_long: OverLong) -> pa.Table:
    """Return the token ids of pairs as a table TOKENS_SCHEMA: rows and order unchanged, nulls and a drop_reason for those left out."""
    tables = [TOKENS_SCHEMA.empty_table()]
    for start in range(0, pairs.num_rows, ROWS_AT_ONCE):
        part = pairs.slice(start, ROWS_AT_ONCE)
        tables.append(token_table(render_pairs(tokenizer, part, max_length_tokens, over_long), prompt_keys(part["prompt"])))
    return pa.concat_tables(tables)


def token_table(rendered: RenderedPairs, keys: Sequence[str]) -> pa.Table:
    """Return rendered pairs as a table TOKENS_SCHEMA; `keys` are those of their prompts."""
    both = pa.LargeListArray.from_arrays(pa.array(rendered.offsets), pa.array(rendered.tokens, pa.int32()))
    dropped = np.asarray([reason is not None for reason in rendered.drop_reasons], dtype=bool)
    columns = {"pair_id": pa.array(rendered.pair_ids, pa.string()), "prompt_key": pa.array(keys, pa.string())}
    for side, name in enumerate(("chosen", "rejected")):
        places = np.arange(side, 2 * len(rendered), 2, dtype=np.int64)
        columns[name] = both.take(pa.array(places, pa.int64(), mask=dropped)).cast(pa.list_(pa.int32()))
    for name, marked in (("shortened", rendered.shortened), ("spelled", rendered.spelled)):
        flags = np.zeros(len(rendered), dtype=bool)
        flags[list(marked)] = True
        columns[name] = pa.array(flags)
    columns["drop_reason"] = pa.array(rendered.drop_reasons, pa.string())
    return pa.table(columns, schema=TOKENS_SCHEMA)


@dataclass(frozen=True)
class TokensInMemory:
    """A token table as the one shard of a run (see `training_plan.TokenShards`)."""

    tokens: pa.Table

    @property
    def names(self) -> Sequence[str]:
        return ("pairs",)

    @property
    def counts(self) -> Sequence[int]:
        return (usable(self.tokens).num_rows,)

    def read(self, shard: int) -> pa.Table:
        return usable(self.tokens)
