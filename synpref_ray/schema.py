"""Columns, Arrow schemas, enums and the names of a pair: the vocabulary every other room shares. Imports nothing of the package.

A preference pair is (prompt, chosen, rejected): the conversation so far as role/content messages, the preferred last reply, the other reply.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum

import pyarrow as pa

Message = Mapping[str, str]

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
PROMPT = pa.list_(MESSAGE)

PAIR_FIELDS = (
    pa.field("pair_id", pa.string(), nullable=False),
    pa.field("comparison_id", pa.string(), nullable=False),
    pa.field("prompt_group", pa.string(), nullable=False),
    pa.field("prompt", PROMPT, nullable=False),
    pa.field("chosen", pa.string(), nullable=False),
    pa.field("rejected", pa.string(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
    pa.field("source_id", pa.string()),
    pa.field("contradicted", pa.bool_(), nullable=False),
)
POOL_SCHEMA = pa.schema(PAIR_FIELDS)

GATHERED_FIELDS = (
    pa.field("source_pool", pa.string(), nullable=False),
    pa.field("source_shard", pa.int32(), nullable=False),
    pa.field("source_row", pa.int32(), nullable=False),
)
GATHERED_SCHEMA = pa.schema([*PAIR_FIELDS, *GATHERED_FIELDS])


class Role(StrEnum):
    """Who speaks in a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


class DropReason(StrEnum):
    """Why a row was refused by a step; every reject carries exactly one."""

    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_REPLY = "empty_reply"
    BAD_ROLE_ORDER = "bad_role_order"
    DIVERGING_TURNS = "diverging_turns"
    IDENTICAL_REPLIES = "identical_replies"
    UNSUPPORTED_CONTENT = "unsupported_content"
    MISSING_SCORE = "missing_score"
    UNKNOWN_LABEL = "unknown_label"
    TIED = "tied"
    NO_COMPARISON = "no_comparison"
    REVERSED_SCORE = "reversed_score"
    BEYOND_MAX_PAIRS = "beyond_max_pairs"
    NOT_IN_SPLIT = "not_in_split"
    CONTAMINATED = "contaminated"
    DUPLICATE = "duplicate"
    TOO_LONG = "too_long"
    SPECIAL_TOKEN_TEXT = "special_token_text"
    UNPARSABLE_REPLY = "unparsable_reply"
    REFUSED_BY_MODEL = "refused_by_model"
    NOT_SELECTED = "not_selected"
    NON_FINITE_REWARD = "non_finite_reward"
    UNDECIDABLE = "undecidable"
    ENGINE_CRASH = "engine_crash"
    NO_ATTRIBUTES = "no_attributes"
    ABSTAINED = "abstained"
    GOLD_PROMPT = "gold_prompt"


REJECT_REASONS = frozenset(
    {
        DropReason.TOO_LONG.value,
        DropReason.SPECIAL_TOKEN_TEXT.value,
        DropReason.UNPARSABLE_REPLY.value,
        DropReason.REFUSED_BY_MODEL.value,
        DropReason.NON_FINITE_REWARD.value,
        DropReason.UNDECIDABLE.value,
        DropReason.ENGINE_CRASH.value,
    }
)
"""Reasons of rows that a step was asked to process and refused; other reasons say that a row was not the step's to process."""


class TaskCategory(StrEnum):
    """Task category of a prompt. Paper: Tables 8-10 (Magpie's twelve categories)."""

    INFORMATION_SEEKING = "information_seeking"
    CODING = "coding_and_debugging"
    ADVICE = "advice_seeking"
    MATH = "math"
    CREATIVE_WRITING = "creative_writing"
    REASONING = "reasoning"
    PLANNING = "planning"
    DATA_ANALYSIS = "data_analysis"
    EDITING = "editing"
    ROLE_PLAYING = "role_playing"
    BRAINSTORMING = "brainstorming"
    OTHER = "other"


class Objectivity(StrEnum):
    """Whether the preference can be decided by facts. Paper: Sec. 3.1, attribute 2."""

    OBJECTIVE = "objective"
    SUBJECTIVE = "subjective"


class Controversiality(StrEnum):
    """How far reasonable people would disagree. Paper: Sec. 3.1, attribute 3."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Verdict(StrEnum):
    """Which reply of a pair *as ingested* a person, a judge or a rule prefers."""

    CHOSEN = "chosen"
    REJECTED = "rejected"
    ABSTAIN = "abstain"


class LabelSource(StrEnum):
    """Who stands behind a pair's label."""

    GOLD = "gold"
    SILVER = "silver"
    UNVERIFIED = "unverified"
    DISCARDED = "discarded"


class Decision(StrEnum):
    """What Stage 2 does with a pair: a column, never a deletion."""

    KEEP = "keep"
    FLIP = "flip"
    DROP = "drop"


ATTRIBUTES_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("task_category", pa.string()),
        pa.field("objectivity", pa.string()),
        pa.field("controversiality", pa.string()),
        pa.field("desired_attributes", pa.string()),
        pa.field("annotation_guideline", pa.string()),
        pa.field("drop_reason", pa.string()),
    ]
)
TAGS_SCHEMA = ATTRIBUTES_SCHEMA.append(pa.field("raw", pa.string()))
"""One tagger's attributes; `raw` is the reply of a row that was rejected for it, else null."""
REWARDS_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("reward_chosen", pa.float32()),
        pa.field("reward_rejected", pa.float32()),
        pa.field("margin", pa.float32()),
        pa.field("p_chosen", pa.float32()),
        pa.field("drop_reason", pa.string()),
    ]
)
REPLY_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("prompt", PROMPT, nullable=False),
        pa.field("reply", pa.string(), nullable=False),
    ]
)
"""A prompt with one reply; `pair_id` holds its `reply_id`, so that a step can run over such a table as over pairs."""
SCORES_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("reward", pa.float32()),
        pa.field("drop_reason", pa.string()),
    ]
)
"""The reward of each row of a table of REPLY_SCHEMA."""
HYGIENE_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("language_probability", pa.float32()),
        pa.field("prompt_characters", pa.int32(), nullable=False),
        pa.field("chosen_characters", pa.int32(), nullable=False),
        pa.field("rejected_characters", pa.int32(), nullable=False),
        pa.field("in_cycle", pa.bool_(), nullable=False),
        pa.field("near_duplicate_group", pa.string(), nullable=False),
    ]
)
"""Pairs of one prompt group have one `near_duplicate_group`: the head (16 hex digits) of the smallest prompt group of their cluster."""
HUMAN_SCHEMA = pa.schema(
    [
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("human_verdict", pa.string()),
        pa.field("annotator", pa.string()),
        pa.field("simulated", pa.bool_()),
        pa.field("gold_split", pa.string()),
        pa.field("drop_reason", pa.string()),
    ]
)


def canonical_json(value: object) -> str:
    """Return the one JSON text of `value`: compact, keys sorted, non-ASCII kept."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _hash128(value: object) -> str:
    return hashlib.blake2b(canonical_json(value).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _plain(prompt: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def pair_id(prompt: Sequence[Message], chosen: str, rejected: str) -> str:
    """Name a pair as ingested: 32 hex digits, BLAKE2b-128 over the canonical JSON of `[prompt, chosen, rejected]`; it never changes."""
    return _hash128([_plain(prompt), chosen, rejected])


def comparison_id(prompt: Sequence[Message], chosen: str, rejected: str) -> str:
    """Name the comparison behind a pair, whichever reply was preferred: BLAKE2b-128 over `[prompt, [smaller reply, larger reply]]`.

    The replies sit in a list of their own, so a comparison never has the name of a pair.
    """
    return _hash128([_plain(prompt), sorted((chosen, rejected))])


def reply_id(prompt: Sequence[Message], reply: str) -> str:
    """Name a prompt with one reply: 32 hex digits, BLAKE2b-128 over the canonical JSON of `[prompt, reply]`; it never equals the name of a pair."""
    return _hash128([_plain(prompt), reply])


_NOT_WORD = re.compile(r"[\W_]+")


def prompt_group(prompt: Sequence[Message]) -> str:
    """Name the group of prompts that equal this one up to case, punctuation and white space (32 hex digits).

    Gold is split, and silver is kept from gold, by this group. A prompt that has no word character groups by its exact text.
    """
    words = [[message["role"], _NOT_WORD.sub(" ", message["content"].casefold()).strip()] for message in prompt]
    return _hash128(words if any(text for _, text in words) else _plain(prompt))


def stable_hash(seed: int, pair_id: str, use: str) -> int:
    """Return 64 bits that depend on the three arguments alone: the source of all chance, whatever the workers, order or restarts."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x1f{pair_id}\x1f{use}".encode(), digest_size=8).digest(), "big")


def stable_uniform(seed: int, pair_id: str, use: str) -> float:
    """Return a float in [0, 1) from `stable_hash`."""
    return (stable_hash(seed, pair_id, use) >> 11) / float(1 << 53)
