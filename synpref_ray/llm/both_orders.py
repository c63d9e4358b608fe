"""One question of two statements or candidates, asked in both orders (Sec. 3.2, Step 3): what judges of pairs and of leaks share.

Our choice: both orders are asked, always, where the paper draws one at random: a judge that goes by the position contradicts itself, and abstains.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from synpref_ray.errors import ReplyParseError
from synpref_ray.llm.engine import REFUSED, UNANSWERED, Reply, Request
from synpref_ray.llm.journal import RetryConfig
from synpref_ray.llm.parsing import parse_choice
from synpref_ray.llm.prompts import JUDGE_CHOICES
from synpref_ray.schema import DropReason

Asked = dict[tuple[int, int], Request]
"""Requests by (order, sample)."""

VOTE = pa.struct(
    [
        pa.field("judge", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("revision", pa.string(), nullable=False),
        pa.field("prompt_version", pa.string(), nullable=False),
        pa.field("order", pa.int8(), nullable=False),  # 0: the first of the two comes first; 1: it comes second
        pa.field("sample", pa.int8(), nullable=False),
        pa.field("raw", pa.string(), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),  # which of the two, whatever the order; abstain: the reply named neither
        pa.field("logprob", pa.float32()),  # of the one named, normalised over both; null if the engine cannot tell
    ]
)
"""One reply of a judge, read."""


class SamplingConfig(RetryConfig):
    """How often and how a question is asked; all of it changes results."""

    num_samples: int = Field(default=1, gt=0, le=127)  # ours: per order; the paper's number is not published
    temperature: float = Field(default=0.0, ge=0)  # ours: greedy; above 0 with several samples
    max_input_tokens: int = Field(default=1536, gt=0)  # ours
    use_chat_template: bool = True  # ours: judging is a task for instruct models

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if (self.num_samples > 1) != (self.temperature > 0):
            raise ValueError("several samples need a temperature above 0, and one sample needs temperature 0")
        return self


def ask_in_both_orders(prompts: Sequence[str], prompt_version: str, reply_start: str, config: SamplingConfig) -> Asked:
    """Return the requests for the two prompts of a question, `num_samples` of each."""
    return {
        (order, sample): Request.of(
            prompt,
            prompt_version=prompt_version,
            max_new_tokens=4,
            choices=JUDGE_CHOICES,
            temperature=config.temperature,
            chat=config.use_chat_template,
            reply_start=reply_start,
            sample=sample,
        )
        for order, prompt in enumerate(prompts)
        for sample in range(config.num_samples)
    }


def is_choice(text: str) -> bool:
    """Whether a reply names one of the two."""
    try:
        parse_choice(text)
    except ReplyParseError:
        return False
    return True


def read_votes(asked: Asked, replies: Mapping[str, Reply], verdicts: tuple[str, str, str], origin: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return what the replies say, a VOTE each.

    Args:
        verdicts: the word for the statement that comes first in order 0, for the other one, and for neither.
        origin: judge, model, revision and prompt_version.
    """
    return [_vote(key, replies[request.key], verdicts, origin) for key, request in asked.items()]


def _vote(key: tuple[int, int], reply: Reply, verdicts: tuple[str, str, str], origin: Mapping[str, str]) -> dict[str, Any]:
    first, second, neither = verdicts
    order, sample = key
    vote: dict[str, Any] = {**origin, "order": order, "sample": sample, "raw": reply.text, "verdict": neither, "logprob": None}
    if reply.finish_reason in UNANSWERED or not is_choice(reply.text):
        return vote  # an unanswered one also where its text reads as a choice: the filter cut in
    choice = parse_choice(reply.text)
    vote["verdict"] = first if (choice == 1) == (order == 0) else second
    if reply.choice_logprobs is not None:
        vote["logprob"] = reply.choice_logprobs[choice - 1]
    return vote


def reason_unread(asked: Asked, replies: Mapping[str, Reply]) -> DropReason:
    """Return why a question whose votes all abstain has no answer: the model refused every time, or its replies cannot be read."""
    refused = all(replies[request.key].finish_reason == REFUSED for request in asked.values())
    return DropReason.REFUSED_BY_MODEL if refused else DropReason.UNPARSABLE_REPLY
