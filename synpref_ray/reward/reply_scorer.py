"""Rewards for single replies, any number to a prompt: what benchmarks and best-of-N need. Serves evaluation.

Replies to one prompt share its tokens, as in `pair_groups`: 3 + 3 of RM-Bench, 1 + 9 of RewardMATH, 32 of PPE Correctness. A group ends where it
would not fit a micro-batch, so that many long replies do not need more memory than the token budget says. Every reward depends on its own
conversation alone, so a stored one is good for every benchmark. Our choice throughout.
"""

import numpy as np
import pyarrow as pa

from synpref_ray.errors import SchemaError
from synpref_ray.reward.packing import Group, RowLayout, Tokens, batch_tokens, make_group
from synpref_ray.reward.pair_groups import prompt_keys
from synpref_ray.reward.render import render_each
from synpref_ray.reward.scorer import PairScorer, score_groups
from synpref_ray.schema import REPLY_SCHEMA, SCORES_SCHEMA, DropReason


def add_reply_rewards(shard: pa.Table, scorer: PairScorer) -> pa.Table:
    """Score a table of prompts with one reply each (REPLY_SCHEMA): rows and order unchanged, null with a drop_reason where there is no reward.

    Raises:
        SchemaError: a column is missing.
    """
    if missing := [name for name in REPLY_SCHEMA.names if name not in shard.column_names]:
        raise SchemaError(f"reward: expected the columns {', '.join(REPLY_SCHEMA.names)}; missing: {', '.join(missing)}")
    conversations = list(zip(shard["prompt"].to_pylist(), shard["reply"].to_pylist(), strict=True))
    config = scorer.config
    sequences, reasons = render_each(scorer.tokenizer, conversations, config.max_length_tokens, config.over_long)
    usable = {i: np.asarray(ids, dtype=np.int32) for i, ids in enumerate(sequences) if reasons[i] is None}
    groups = group_replies(usable, prompt_keys(shard["prompt"]), scorer.module.row_layout(config.max_tokens_per_batch))
    rewards = np.full(shard.num_rows, np.nan, dtype=np.float32)
    scored = score_groups(scorer.module, [group for _, group in groups], config.max_tokens_per_batch, None, scorer.memory)
    for (members, _), values in zip(groups, scored, strict=True):
        rewards[members] = values
    finite = np.isfinite(rewards)
    filled = [reason or (None if ok else DropReason.NON_FINITE_REWARD.value) for reason, ok in zip(reasons, finite.tolist(), strict=True)]
    columns = [shard["pair_id"].combine_chunks(), pa.array(rewards, pa.float32(), mask=~finite), pa.array(filled, pa.string())]
    return pa.table(columns, schema=SCORES_SCHEMA)


def group_replies(sequences: dict[int, Tokens], keys: list[str], layout: RowLayout) -> list[tuple[list[int], Group]]:
    """Merge replies of one prompt where that makes fewer tokens to compute, up to the layout's budget; greedy, in the order given.

    Args:
        sequences: index to the token ids of a whole conversation.
        keys: for every index of `sequences` the key of its prompt.

    Returns:
        (indices, group) with the group's sequences in the order of the indices; every index is in exactly one.
    """
    by_prompt: dict[str, list[int]] = {}
    for index in sequences:
        by_prompt.setdefault(keys[index], []).append(index)
    groups = []
    for members in by_prompt.values():
        current: list[int] = []
        grown: Group | None = None
        for index in members:
            alone = make_group([sequences[index]], may_share=layout.may_share)
            if grown is None:
                current, grown = [index], alone
                continue
            merged = make_group([*grown.sequences, sequences[index]], may_share=layout.may_share)
            tokens = batch_tokens([merged])
            if tokens < batch_tokens([grown]) + batch_tokens([alone]) and tokens <= layout.max_group_tokens:
                current, grown = [*current, index], merged
            else:
                groups.append((current, grown))
                current, grown = [index], alone
        if grown is not None:
            groups.append((current, grown))
    return groups
