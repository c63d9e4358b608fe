"""Writes the five attributes of a pair with an LLM. Paper: arXiv:2507.01352, Sec. 3.1; (1)-(3) steer diversity and priority, (4)-(5) the
verdicts.

Our choice: one reply a pair and model, schema-guided; several models are merged afterwards (`rules/tags.py`). A reply that does not parse,
also when asked for again, makes a null row with the reason and the raw reply, never a half row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from synpref_ray.errors import ReplyParseError, SchemaError
from synpref_ray.llm.engine import REFUSED, TOO_LONG, Engine, Reply, Request
from synpref_ray.llm.journal import Journal, RetryConfig, generate_readable
from synpref_ray.llm.parsing import Tag, parse_tag
from synpref_ray.llm.prompts import TAG_INSTRUCTIONS, TAG_PROMPT_VERSION, TAG_REPLY_START, tag_prompt, tag_schema
from synpref_ray.schema import TAGS_SCHEMA, DropReason, stable_hash

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"  # it becomes part of a folder's name
REQUIRES = ("pair_id", "prompt", "chosen", "rejected")
ADDS = ("task_category", "objectivity", "controversiality", "desired_attributes", "annotation_guideline")


class TaggerConfig(RetryConfig):
    """How pairs are tagged; all of it changes results."""

    name: str = Field(default="tagger", pattern=NAME_PATTERN)  # of this tagger's table: attributes.<name>
    instructions: Literal["full", "short"] = "full"  # ours: see prompts.py; short is for very small models
    show_replies: bool = False  # ours: attributes are of the request; two replies triple the prompt on a CPU
    max_input_tokens: int = Field(default=1024, gt=0)  # ours
    max_new_tokens: int = Field(default=224, gt=0)  # ours: the five fields at full length, a token a character
    max_attributes_chars: int = Field(default=64, gt=0)  # ours: a phrase
    max_guideline_chars: int = Field(default=96, gt=0)  # ours: a sentence
    use_chat_template: bool = True  # ours: tagging is a task for instruct models
    seed: int = 0
    """Seed of the order in which the two replies are shown."""


def tag_pairs(shard: pa.Table, engine: Engine, config: TaggerConfig, journal: Journal | None = None) -> pa.Table:
    """Return the attributes of every pair of the shard, same rows and order (TAGS_SCHEMA); failed rows are null with a reason.

    Raises:
        SchemaError: a column is missing.
        EngineDied: the engine ended; what it finished is in the journal.
    """
    missing = [name for name in REQUIRES if name not in shard.column_names]
    if missing:
        raise SchemaError(f"tag: the shard lacks {', '.join(missing)}; found {', '.join(shard.column_names)}")
    pairs = shard.select(list(REQUIRES)).to_pylist()
    requests = tag_requests(pairs, config)
    fits = [engine.count_tokens(request.prompt) <= config.max_input_tokens for request in requests]
    sent = [request for request, fit in zip(requests, fits, strict=True) if fit]
    replies = generate_readable(sent, engine, journal, lambda text: _read(text, config) is not None, config)
    rows = [_row(pair["pair_id"], replies.get(request.key), config) for pair, request in zip(pairs, requests, strict=True)]
    return pa.Table.from_pylist(rows, schema=TAGS_SCHEMA)


def tag_requests(pairs: Sequence[Mapping[str, Any]], config: TaggerConfig) -> list[Request]:
    """Return the request of each pair; pairs of one prompt may share one (its key says so)."""
    return [_request(pair, config) for pair in pairs]


def _request(pair: Mapping[str, Any], config: TaggerConfig) -> Request:
    # The tag must not carry the label, so which reply comes first has nothing to do with it.
    replies = sorted((pair["chosen"], pair["rejected"]), key=lambda reply: stable_hash(config.seed, reply, "tag-order"))
    return Request.of(
        tag_prompt(TAG_INSTRUCTIONS[config.instructions], pair["prompt"], replies if config.show_replies else ()),
        prompt_version=TAG_PROMPT_VERSION,
        max_new_tokens=config.max_new_tokens,
        json_schema=tag_schema(config.max_attributes_chars, config.max_guideline_chars),
        chat=config.use_chat_template,
        reply_start=TAG_REPLY_START,
    )


def _read(text: str, config: TaggerConfig) -> Tag | None:
    try:
        return parse_tag(text, max_attributes_chars=config.max_attributes_chars, max_guideline_chars=config.max_guideline_chars)
    except ReplyParseError:
        return None


def _row(pair_id: str, reply: Reply | None, config: TaggerConfig) -> dict[str, Any]:
    if reply is None or reply.finish_reason == TOO_LONG:
        return {"pair_id": pair_id, "drop_reason": DropReason.TOO_LONG.value}
    if reply.finish_reason == REFUSED:
        return {"pair_id": pair_id, "drop_reason": DropReason.REFUSED_BY_MODEL.value, "raw": reply.text}
    tag = _read(reply.text, config)
    if tag is None:
        return {"pair_id": pair_id, "drop_reason": DropReason.UNPARSABLE_REPLY.value, "raw": reply.text}
    return {"pair_id": pair_id, **{name: str(getattr(tag, name)) for name in ADDS}}
