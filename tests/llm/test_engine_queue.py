"""What waits for an engine: equal prompts share their ids, and the engine gets no more than it can soon begin."""

import queue
from collections import Counter

import pytest

from synpref_ray.llm.engine import Request
from synpref_ray.llm.engine_queue import Backlog, Job, make_jobs
from synpref_ray.llm.tokens import PlainEncoder
from tests.llm.test_tokens import make_tokenizer


class CountingEncoder(PlainEncoder):
    """Counts what it is asked to tokenise."""

    def __init__(self) -> None:
        super().__init__(make_tokenizer())
        self.asked: Counter[str] = Counter()

    def encode_request(self, request: Request) -> list[int]:
        """Count and tokenise."""
        self.asked[request.prompt] += 1
        return super().encode_request(request)


def ask(prompt: str, **settings: object) -> Request:
    return Request.of(prompt, **{"prompt_version": "v", "max_new_tokens": 4, **settings})


def jobs_of(*requests: Request, encoder: PlainEncoder | None = None) -> list[Job]:
    return make_jobs(requests, encoder or CountingEncoder(), queue.SimpleQueue())


def test_the_samples_of_a_prompt_are_tokenised_once_and_share_their_ids() -> None:
    encoder = CountingEncoder()
    requests = [ask(prompt, choices=("1", "22"), temperature=0.7, sample=sample, chat=True) for prompt in ("a<s>", "b") for sample in range(3)]
    jobs = jobs_of(*requests, encoder=encoder)
    assert encoder.asked == {"a<s>": 1, "b": 1}
    assert [job.request for job in jobs] == requests
    assert [job.tokens.tolist() for job in jobs] == [PlainEncoder(make_tokenizer()).encode_request(request) for request in requests]
    assert len({id(job.tokens) for job in jobs}) == 2
    assert {(job.max_tokens, job.num_tokens - len(job.tokens)) for job in jobs} == {(2, 2)}  # the longest choice, not the request's four


@pytest.mark.parametrize("other", [{"chat": True}, {"reply_start": "So"}])
def test_another_frame_around_a_prompt_makes_other_ids(other: dict) -> None:
    first, second = jobs_of(ask("a"), ask("a", **other))
    assert first.tokens != second.tokens
    assert (first.max_tokens, first.watched) == (4, None)


def test_the_engine_holds_enough_and_no_more_in_the_order_of_arrival() -> None:
    backlog, jobs = Backlog(num_requests=2, num_tokens=10), jobs_of(*(ask(letter * 5) for letter in "abcdef"))
    assert backlog.next() is None
    for job in jobs:
        backlog.add(job)
    assert [backlog.next(), backlog.next(), backlog.next()] == [*jobs[:2], None]
    backlog.finished(jobs[1])
    assert [backlog.next(), backlog.next()] == [jobs[2], None]
    assert len(backlog) == 3
    assert backlog.clear() == jobs[3:]
    assert len(backlog) == 0


def test_short_prompts_may_be_more() -> None:
    backlog, jobs = Backlog(num_requests=1, num_tokens=10), jobs_of(*(ask(letter * 3) for letter in "abcdef"))
    for job in jobs:
        backlog.add(job)
    assert [backlog.next() for _ in range(5)] == [*jobs[:4], None]
