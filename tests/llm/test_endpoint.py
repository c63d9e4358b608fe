"""An endpoint as an engine, against a real HTTP server on loopback: what is retried, what ends the job, what is never sent twice or overspent."""

import asyncio
import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from synpref_ray.errors import ConfigError, EndpointError, SpendingLimitError, SynprefError
from synpref_ray.llm.endpoint import MAX_MALFORMED, MAX_PROBES, REFUSED_PROMPTS_TO_WARN, EndpointEngine, open_engine
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.llm.engine import REFUSED, TOO_LONG, EngineDied, Reply, Request
from synpref_ray.llm.journal import Journal, generate_once
from synpref_ray.llm.spending import LocalBudget, SpendingRecord
from tests.llm.fakes import MemoryStorage
from tests.llm.http_server import FAULTS, SLOW_FAULTS, Answer, LocalServer, Seen, chat, completion, error
from tests.llm.test_tokens import TOKENIZER

QUICK = {"backoff_seconds": 0.001, "max_backoff_seconds": 0.01, "timeout_seconds": 30.0, "give_up_seconds": 60.0, "guidance": "none"}
PRICES = {"price_per_million_prompt_tokens": 100.0, "price_per_million_output_tokens": 1000.0}


def config(server: LocalServer, **settings: Any) -> EndpointConfig:
    return EndpointConfig(**{"base_url": server.url, "model": "m", **QUICK, **settings})


@contextlib.contextmanager
def serve(script: Callable[[Seen, int], Answer], **settings: Any) -> Iterator[tuple[LocalServer, EndpointEngine]]:
    with LocalServer(script) as server, EndpointEngine(config(server, **settings)) as engine:
        yield server, engine


def request(prompt: str, **settings: Any) -> Request:
    return Request.of(prompt, **{"prompt_version": "v", "max_new_tokens": 4, "chat": True, **settings})


def echo(seen: Seen, number: int = 0) -> Answer:
    return Answer(chat(prompt_of(seen).upper()))


def prompt_of(seen: Seen) -> str:
    return str(seen.body["messages"][0]["content"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    return str(folder)


def test_replies_come_in_the_order_of_requests_and_are_counted() -> None:
    with serve(echo, max_concurrent_requests=7, revision="2026-01") as (server, engine):
        requests = [request(f"p{number}") for number in range(40)]
        replies = engine.generate(requests)
        assert [(reply.key, reply.text) for reply in replies] == [(r.key, f"P{number}") for number, r in enumerate(requests)]
        assert replies[0] == Reply(key=requests[0].key, text="P0", finish_reason="stop", prompt_tokens=10, output_tokens=2)
        counts = engine.counts()
        assert (counts.requests_sent, counts.replies, counts.retries) == (40, 40, 0)
        assert (counts.prompt_tokens, counts.output_tokens, counts.cost) == (400, 80, 0.0)
        assert engine.generate([]) == []
        assert (engine.identity().model, engine.identity().revision) == ("m", "2026-01")
        assert 1 <= server.max_open <= 7


def test_as_many_requests_are_in_flight_as_allowed_and_no_more() -> None:
    gate = threading.Barrier(3, timeout=60)  # breaks unless three are open at once

    def script(seen: Seen, number: int) -> Answer:
        gate.wait()
        return echo(seen)

    with serve(script, max_concurrent_requests=3) as (server, engine):
        engine.generate([request(f"p{number}") for number in range(9)])
        assert server.max_open == 3


def test_on_finished_runs_in_the_callers_thread_and_callers_get_their_own() -> None:
    with serve(echo) as (_, engine):
        seen: dict[str, list[tuple[str, int]]] = {"a": [], "b": []}

        def call(name: str) -> None:
            requests = [request(f"{name}{number}") for number in range(10)]
            engine.generate(requests, lambda reply: seen[name].append((reply.text, threading.get_ident())))
            seen[name].append(("end", threading.get_ident()))

        threads = [threading.Thread(target=call, args=(name,)) for name in seen]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, entries in seen.items():
            assert sorted(text for text, _ in entries[:-1]) == sorted(f"{name.upper()}{number}" for number in range(10))
            assert len({thread for _, thread in entries}) == 1


def test_a_finished_reply_is_durable_while_another_is_waited_for() -> None:
    storage, durable = MemoryStorage(), threading.Event()

    class Storage(MemoryStorage):
        def write_bytes(self, path: str, data: bytes) -> None:
            storage.write_bytes(path, data)
            durable.set()

    def script(seen: Seen, number: int) -> Answer:
        if prompt_of(seen) == "slow":
            assert durable.wait(60)  # it comes when the other one has been written
        return echo(seen)

    with serve(script) as (_, engine):
        looks = itertools.count()  # the clock stands still when the journal opens and when the quick reply comes
        journal = Journal(Storage(), "journal/00000", flush_seconds=5.0, flush_replies=99, clock=lambda: 0.0 if next(looks) < 2 else 10.0)
        replies = generate_once([request("quick"), request("slow")], engine, journal)
        assert [reply.text for reply in replies] == ["QUICK", "SLOW"]
    assert len(storage.objects) == 2


def test_idle_callers_are_told_in_their_own_thread() -> None:
    told: list[int] = []
    enough = threading.Event()

    def idle() -> None:
        told.append(threading.get_ident())
        enough.set()

    def script(seen: Seen, number: int) -> Answer:
        assert enough.wait(60)
        return echo(seen)

    with serve(script) as (_, engine):
        engine.generate([request("p")], on_idle=idle)
        assert set(told) == {threading.get_ident()}


def test_a_caller_that_leaves_stops_its_own_requests_only() -> None:
    left = threading.Event()

    def script(seen: Seen, number: int) -> Answer:
        if number == 5:
            left.wait(60)
        return echo(seen)

    with serve(script, max_concurrent_requests=1) as (server, engine):

        def leave(reply: Reply) -> None:
            raise RuntimeError("the disk is full")

        with pytest.raises(RuntimeError, match="disk is full"):
            engine.generate([request(f"p{number}") for number in range(200)], leave)
        left.set()
        assert engine.generate([request("last")])[0].text == "LAST"
        assert server.num_seen() <= 7


@pytest.mark.parametrize("fault", [*FAULTS, "503"])
def test_a_failure_that_passes_is_tried_again(fault: Any) -> None:
    def script(seen: Seen, number: int) -> Answer:
        if number >= 2:
            return echo(seen)
        return error(503, "overloaded") if fault == "503" else Answer(echo(seen).body, fault=fault)

    with serve(script, timeout_seconds=0.4 if fault in SLOW_FAULTS else 30.0) as (server, engine):
        [reply] = engine.generate([request("p")])
        assert reply.text == "P"
        counts = engine.counts()
        assert (counts.requests_sent, counts.replies) == (1, 1)
        if fault in SLOW_FAULTS:  # with so short a timeout, a machine under load makes good answers late, too, or never sends an attempt
            assert counts.retries >= 2
        else:
            assert (counts.retries, server.num_seen()) == (2, 3)


def test_every_third_answer_is_a_fault_and_all_replies_are_right() -> None:
    def script(seen: Seen, number: int) -> Answer:
        faults = [fault for fault in FAULTS if fault not in SLOW_FAULTS]
        return Answer(echo(seen).body, fault=faults[number // 3 % len(faults)] if number % 3 == 0 else None)

    with serve(script, max_concurrent_requests=5) as (_, engine):
        replies = engine.generate([request(f"p{number}") for number in range(60)])
        assert [reply.text for reply in replies] == [f"P{number}" for number in range(60)]


def test_the_server_says_when_to_come_back_and_nobody_comes_sooner() -> None:
    now, waits = [0.0], []

    async def pause(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    def script(seen: Seen, number: int) -> Answer:
        return error(429, "slow down", **{"Retry-After": "37"}) if number == 0 else echo(seen)

    with LocalServer(script) as server, EndpointEngine(config(server), clock=lambda: now[0], pause=pause) as engine:
        assert engine.generate([request("p")])[0].text == "P"
    assert sum(waits) == pytest.approx(37.0)


def test_rates_are_kept() -> None:
    now = [1000.0]
    sent_at: list[float] = []

    async def pause(seconds: float) -> None:
        now[0] += seconds

    def script(seen: Seen, number: int) -> Answer:
        sent_at.append(now[0])
        return echo(seen)

    settings = {"requests_per_minute": 30.0, "max_concurrent_requests": 1}
    with LocalServer(script) as server, EndpointEngine(config(server, **settings), clock=lambda: now[0], pause=pause) as engine:
        engine.generate([request(f"p{number}") for number in range(6)])
    assert [at - 1000.0 for at in sent_at] == pytest.approx([0, 1, 3, 5, 7, 9])  # a second's worth at once, then one every 2 s


def test_after_a_pause_that_the_server_asked_for_the_rates_still_hold() -> None:
    now, long_waits = [1000.0], [0]

    async def pause(seconds: float) -> None:
        """Wait in virtual time: who keeps the pace until the server has asked for its pause; that one until two wait for it."""
        until, is_long = now[0] + seconds, seconds > 50.0
        long_waits[0] += is_long
        while long_waits[0] < 1 + is_long:
            await asyncio.sleep(0.001)
        now[0] = max(now[0], until)

    def script(seen: Seen, number: int) -> Answer:
        return error(429, "slow down", **{"Retry-After": "100"}) if number == 0 else echo(seen)

    settings = {"requests_per_minute": 60.0, "max_concurrent_requests": 6, "give_up_seconds": 1e6}
    with LocalServer(script) as server, EndpointEngine(config(server, **settings), clock=lambda: now[0], pause=pause) as engine:
        replies = engine.generate([request(f"p{number}") for number in range(6)])
        assert [reply.text for reply in replies] == [f"P{number}" for number in range(6)]
    # Two are sent at once. The other four, and the one that is tried again, begin after the pause: two at once, then one a second.
    assert now[0] == pytest.approx(1103.0)


def test_an_endpoint_that_stays_away_ends_the_engine_with_one_line() -> None:
    with serve(lambda seen, number: error(503, "down"), give_up_seconds=0.2) as (server, engine):
        with pytest.raises(
            EndpointError, match=r"m at http://127.0.0.1:\d+/v1 gave no reply within give_up_seconds=0.2; the last failure: HTTP 503: down"
        ):
            engine.generate([request(f"p{number}") for number in range(5)])
        before = server.num_seen()
        with pytest.raises(EndpointError, match="gave no reply"):
            engine.generate([request("again")])
        assert server.num_seen() == before


@pytest.mark.parametrize("header", [("Retry-After", "86400"), ("retry-after-ms", "86400000"), ("Retry-After", "Fri, 01 Jan 2100 00:00:00 GMT")])
def test_waiting_longer_than_we_would_is_giving_up(header: tuple[str, str]) -> None:
    with serve(lambda seen, number: error(429, "come back later", **dict([header]))) as (server, engine):
        with pytest.raises(EndpointError, match=r"asks to wait (86400|\d{9,}) s"):
            engine.generate([request("p")])
        assert server.num_seen() == 1


def test_nobody_listens() -> None:
    with LocalServer(echo) as server:
        url = server.url
    settings = EndpointConfig(base_url=url, model="m", **{**QUICK, "give_up_seconds": 0.1})
    with EndpointEngine(settings) as engine, pytest.raises(EndpointError, match=r"Connection error \(ConnectError\)"):
        engine.generate([request("p")])


def test_bodies_that_are_no_answers_are_paid_for_so_few_are_tried() -> None:
    with serve(lambda seen, number: Answer({"error": {"message": "upstream"}})) as (server, engine):
        with pytest.raises(EndpointError, match="its body has no choices, but an error: upstream"):
            engine.generate([request("p")])
        assert server.num_seen() == MAX_MALFORMED + MAX_PROBES


POISON = {
    "no choices": (
        Answer({"error": {"message": "Provider\nsaid \ud83d no"}}),
        "its body has no choices, but an error: Provider said ? no",
        MAX_MALFORMED,
    ),
    "no JSON": (Answer(b"<html>blocked</html>"), "its body is not JSON: <html>blocked</html>", MAX_MALFORMED),
    "500": (error(500, "tokenizer crashed"), "HTTP 500: tokenizer crashed", 0),
    "reset": (Answer(fault="reset"), "Connection error (", 0),
    "403": (Answer(b"<html>Request blocked by firewall</html>", 403), "Request blocked by firewall", 1),
    "406": (error(406, "Not Acceptable"), "Not Acceptable", 1),
    "451": (error(451, "Unavailable For Legal Reasons"), "Unavailable For Legal Reasons", 1),
}


@pytest.mark.parametrize("kind", POISON)
@pytest.mark.parametrize("prompts", [["good", "bad", "more"], ["bad"]])
def test_a_text_that_is_never_answered_is_left_out_while_others_are(kind: str, prompts: list[str]) -> None:
    answer, words, attempts = POISON[kind]
    script = lambda seen, number: answer if prompt_of(seen) == "bad" else echo(seen)  # noqa: E731
    with serve(script, max_concurrent_requests=1, give_up_seconds=60.0 if attempts else 0.05) as (server, engine):
        replies = dict(zip(prompts, engine.generate([request(prompt) for prompt in prompts]), strict=True))
        assert replies.pop("bad").finish_reason == REFUSED
        assert {reply.finish_reason for reply in replies.values()} <= {"stop"}
        asked = [prompt_of(seen) for seen in server.seen]
        assert asked.count("bad") == attempts or not attempts
        assert len(asked) - asked.count("bad") - len(replies) == (kind not in {"406", "451"} or prompts == ["bad"])  # a harmless text
        [again] = engine.generate([request("bad", sample=1)])
        assert (again.finish_reason, words in again.text) == (REFUSED, True)


def test_a_key_that_is_not_accepted_any_more_ends_the_engine() -> None:
    with serve(lambda seen, number: echo(seen) if number < 3 else error(403, "revoked"), max_concurrent_requests=1) as (server, engine):
        with pytest.raises(ConfigError, match=r"HTTP 403, the key was not accepted \(revoked\)"):
            engine.generate([request(f"p{number}") for number in range(9)])
        assert server.num_seen() == 3 + 2


def test_answers_to_what_was_sent_before_a_key_died_leave_no_text_out() -> None:
    """Four slow answers come in while four refused attempts wait for theirs."""

    def script(seen: Seen, number: int) -> Answer:
        time.sleep(0.1 if number < 4 else 0.3)
        return echo(seen) if number < 4 else error(403, "revoked")

    with serve(script, max_concurrent_requests=8) as (_, engine):
        replies: list[Reply] = []
        with pytest.raises(ConfigError, match=r"HTTP 403, the key was not accepted \(revoked\)"):
            engine.generate([request(f"p{number}") for number in range(8)], replies.append)
        assert [reply.finish_reason for reply in replies] == ["stop"] * 4


def test_an_error_with_its_status_in_a_body_is_waited_out_like_that_status() -> None:
    """Some gateways pass their providers' rate limits on so; six of them are no reason to leave the text out, and cost nothing."""
    limited = Answer({"error": {"code": 429, "message": "Provider returned error"}})
    prices = {"price_per_million_prompt_tokens": 1e6, "price_per_million_output_tokens": 1e6}
    with serve(lambda seen, number: limited if number < MAX_MALFORMED + 1 else echo(seen), **prices) as (server, engine):
        [reply] = engine.generate([request("p")])
        assert (reply.finish_reason, server.num_seen()) == ("stop", MAX_MALFORMED + 2)
        assert engine.counts().cost == reply.prompt_tokens + reply.output_tokens > 0
    billed = Answer({"error": {"code": 429, "message": "late"}, "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}})
    with serve(lambda seen, number: billed if not number else echo(seen), **prices) as (_, engine):
        [reply] = engine.generate([request("p")])
        assert engine.counts().cost == reply.prompt_tokens + reply.output_tokens + 7
    down = Answer({"error": {"code": "502", "message": "Bad gateway"}})
    with serve(lambda seen, number: down, give_up_seconds=0.05) as (_, engine), pytest.raises(EndpointError, match="HTTP 200 with error 502"):
        engine.generate([request("p")])


def test_texts_that_are_never_answered_are_left_out_within_the_bound() -> None:
    def script(seen: Seen, number: int) -> Answer:
        return Answer({"error": "no"}) if prompt_of(seen).startswith("bad") else echo(seen)

    with serve(script, max_concurrent_requests=1, max_declined_fraction=0.005) as (_, engine):
        assert [reply.finish_reason for reply in engine.generate([request(f"bad{number}") for number in range(2)])] == [REFUSED] * 2
        with pytest.raises(ConfigError, match=r"declined 3 of 3 requests .* \(the last: its body has no choices, but an error: no\)"):
            engine.generate([request("bad2")])


FATAL = {
    "key": (error(401, "Incorrect API key", code="invalid_api_key"), ConfigError, "the key was not accepted"),
    "forbidden": (error(403, "Not allowed"), ConfigError, "the key was not accepted"),
    "model": (error(404, "The model `m` does not exist.", code="model_not_found"), ConfigError, "check model and base_url"),
    "quota": (
        error(429, "You exceeded your current quota", code="insufficient_quota", kind="insufficient_quota"),
        EndpointError,
        "no credit or quota",
    ),
    "credit": (error(402, "Insufficient credits"), EndpointError, "no credit or quota"),
    "field": (error(400, "Unrecognized request argument: structured_outputs"), ConfigError, "does not accept our requests"),
}


@pytest.mark.parametrize("case", FATAL)
def test_what_will_not_pass_ends_the_engine_at_once(case: str) -> None:
    answer, kind, words = FATAL[case]
    with serve(lambda seen, number: answer, max_concurrent_requests=2) as (server, engine):
        with pytest.raises(kind, match=words) as raised:
            engine.generate([request(f"p{number}") for number in range(50)])
        assert "\n" not in str(raised.value)
        sent = server.num_seen()
        assert sent <= 2 + (
            case in {"field", "forbidden"}
        )  # what was in flight already, and a harmless text in the form that the server does not take
        with pytest.raises(SynprefError, match=words):
            engine.generate([request("again")])
        assert server.num_seen() == sent


def test_what_is_in_flight_when_the_end_comes_is_still_received() -> None:
    both = threading.Barrier(2, timeout=60)
    failed = threading.Event()

    def script(seen: Seen, number: int) -> Answer:
        both.wait()
        if prompt_of(seen) == "bad":
            failed.set()
            return error(401, "Incorrect API key")
        failed.wait(60)
        return echo(seen)

    with serve(script, max_concurrent_requests=2) as (_, engine):
        finished: list[str] = []
        with pytest.raises(ConfigError, match="key was not accepted"):
            engine.generate([request("bad"), request("good"), request("late")], lambda reply: finished.append(reply.text))
        assert finished == ["GOOD"]


RISK = error(400, "Content Exists Risk")  # DeepSeek
REFUSALS = {
    "deepseek": RISK,
    "moonshot": error(400, "The request was rejected because it was considered high risk"),
    "glm": error(
        400, "\u7cfb\u7edf\u68c0\u6d4b\u5230\u8f93\u5165\u6216\u751f\u6210\u5185\u5bb9\u53ef\u80fd\u5305\u542b\u654f\u611f\u5185\u5bb9", code="1301"
    ),
    "400": error(400, "The response was filtered due to the content management policy.", code="content_filter"),
    "403": error(403, "Your prompt was flagged by moderation."),
    "finish": Answer(chat("half a", finish_reason="content_filter")),
    "message": Answer(chat(None, refusal="I cannot help with that.")),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_a_reply_and_is_asked_again_by_the_next_run(kind: str) -> None:
    storage = MemoryStorage()
    requests = [request("bad"), request("good")]
    with serve(lambda seen, number: REFUSALS[kind] if prompt_of(seen) == "bad" else echo(seen)) as (server, engine):
        replies = generate_once(requests, engine, Journal(storage, "journal/00000"))
        assert [reply.finish_reason for reply in replies] == [REFUSED, "stop"]
        assert server.num_seen() == 2
        said = REFUSALS[kind].body.get("error", {}).get("message")
        assert said is None or replies[0].text == said
    with serve(echo) as (server, engine):
        replies = generate_once(requests, engine, Journal(storage, "journal/00000"))
        assert [reply.text for reply in replies] == ["BAD", "GOOD"]
        assert server.num_seen() == 1


UNKNOWN = error(400, "Computer says no.")


def no_to_bad(seen: Seen, number: int) -> Answer:
    return UNKNOWN if prompt_of(seen).startswith("bad") else echo(seen)


@pytest.mark.parametrize("order", [["bad", "good"], ["good", "bad"], ["bad"]])
def test_a_refusal_in_unknown_words_is_one_of_that_text_whenever_it_comes(order: list[str], caplog: pytest.LogCaptureFixture) -> None:
    requests = [request(prompt) for prompt in order]
    for _ in range(2):  # a rerun asks again, and does not end either
        with serve(no_to_bad, max_concurrent_requests=1, **PRICES) as (server, engine):
            replies = {reply.key: reply for reply in generate_once(requests, engine, Journal(MemoryStorage(), "journal/00000"))}
            refused = replies[request("bad").key]
            assert (refused.finish_reason, refused.text, refused.cost) == (REFUSED, "Computer says no.", 0.0)
            assert sum(reply.finish_reason == "stop" for reply in replies.values()) == len(order) - 1
            asked_harmless = order[0] == "bad"  # nothing was answered before
            assert server.num_seen() == len(order) + asked_harmless
    assert "a request was declined, and is left out like a refused one, like others to come: Computer says no." in caplog.text


def test_a_burst_of_unknown_refusals_asks_one_harmless_text_even_if_that_fails_first() -> None:
    together = threading.Barrier(8, timeout=60)

    def script(seen: Seen, number: int) -> Answer:
        if prompt_of(seen).startswith("bad"):
            together.wait()
            return UNKNOWN
        return error(503, "down") if number == 8 else echo(seen)

    with serve(script, max_concurrent_requests=8) as (server, engine):
        replies = engine.generate([request(f"bad{number}") for number in range(8)])
        assert {reply.finish_reason for reply in replies} == {REFUSED}
        assert server.num_seen() == 8 + 2


@pytest.mark.parametrize(("fraction", "allowed"), [(0.0, 0), (0.01, 4)])
def test_too_many_unknown_refusals_end_the_engine_and_say_why(fraction: float, allowed: int) -> None:
    prompts = ["good", *(f"bad{number}" for number in range(10))]
    finished: list[Reply] = []
    with serve(no_to_bad, max_concurrent_requests=1, max_declined_fraction=fraction) as (server, engine):
        many = rf"declined {allowed + 1} of {allowed + 2} requests .*"
        words = rf"{many}\(the last: Computer says no\.\), more than max_declined_fraction={fraction:g} allows"
        with pytest.raises(ConfigError, match=words):
            engine.generate([request(prompt) for prompt in prompts], finished.append)
        assert [reply.finish_reason for reply in finished] == ["stop", *[REFUSED] * allowed]
        assert server.num_seen() == allowed + 2


TOO_LONG_ANSWERS = {
    "vllm": error(400, "This model's maximum context length is 512 tokens. However, you requested 4 output tokens and your prompt contains 600"),
    "code": error(400, "Your input exceeds the limit.", code="context_length_exceeded"),
    "llama.cpp": error(400, "the request exceeds the available context size", kind="exceed_context_size_error"),
    "size": error(413, "prompt is too long: 210000 tokens > 200000 maximum"),
    "nginx": Answer(b"<html>413 Request Entity Too Large</html>", 413),
}


@pytest.mark.parametrize("kind", TOO_LONG_ANSWERS)
def test_a_prompt_beyond_the_servers_context_is_a_reply_that_only_the_next_run_asks_for_again(kind: str) -> None:
    storage, requests = MemoryStorage(), [request("long"), request("good")]
    with serve(lambda seen, number: TOO_LONG_ANSWERS[kind] if prompt_of(seen) == "long" else echo(seen), **PRICES) as (server, engine):
        replies = generate_once(requests, engine, Journal(storage, "journal/00000"))
        assert [(reply.text, reply.finish_reason) for reply in replies] == [("", TOO_LONG), ("GOOD", "stop")]
        assert (replies[0].cost, server.num_seen()) == (0.0, 2)
    with serve(echo) as (server, engine):  # started again with a longer context
        replies = generate_once(requests, engine, Journal(storage, "journal/00000"))
        assert [reply.text for reply in replies] == ["LONG", "GOOD"]
        assert server.num_seen() == 1


def test_what_cannot_fit_the_configured_context_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    with serve(echo, max_context_tokens=40) as (server, engine):
        replies = engine.generate([request("x" * 200), request("p"), request("y" * 200)])
        assert [reply.finish_reason for reply in replies] == [TOO_LONG, "stop", TOO_LONG]
        assert (server.num_seen(), engine.counts().requests_sent) == (1, 1)
        assert caplog.text.count("do not fit max_context_tokens=40") == 1


def test_nothing_but_refusals_is_said_once_and_ends_no_job(caplog: pytest.LogCaptureFixture) -> None:
    with serve(lambda seen, number: REFUSALS["400"]) as (_, engine):
        few = [request("one pair", sample=number) for number in range(60)] + [request(f"p{number}") for number in range(REFUSED_PROMPTS_TO_WARN - 2)]
        assert {reply.finish_reason for reply in engine.generate(few)} == {REFUSED}
        assert "refused the first" not in caplog.text  # samples of one prompt are one prompt
        more = [request(f"q{number}") for number in range(60)]
        assert {reply.finish_reason for reply in engine.generate(more)} == {REFUSED}
        assert caplog.text.count(f"refused the first {REFUSED_PROMPTS_TO_WARN} prompts") == 1


def test_refusals_after_an_answer_are_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    with serve(lambda seen, number: echo(seen) if number == 0 else REFUSALS["400"], max_concurrent_requests=1) as (_, engine):
        replies = engine.generate([request(f"p{number}") for number in range(60)])
        assert Counter(reply.finish_reason for reply in replies) == {"stop": 1, REFUSED: 59}
        assert "refused the first" not in caplog.text


def test_finished_requests_are_never_sent_again_after_a_crash() -> None:
    storage = MemoryStorage()
    requests = [request(f"p{number}") for number in range(30)]

    def dying(seen: Seen, number: int) -> Answer:
        return echo(seen) if number < 11 else error(503, "down")

    with serve(dying, give_up_seconds=0.1, max_concurrent_requests=4) as (_, engine), pytest.raises(EndpointError):
        generate_once(requests, engine, Journal(storage, "journal/00000"))
    with serve(echo) as (server, engine):
        replies = generate_once(requests, engine, Journal(storage, "journal/00000"))
        assert [reply.text for reply in replies] == [f"P{number}" for number in range(30)]
        assert server.num_seen() == 30 - 11
    with serve(echo) as (server, engine):
        assert generate_once(requests, engine, Journal(storage, "journal/00000")) == replies
        assert server.num_seen() == 0


class FullStorage(MemoryStorage):
    """Is full until told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.is_full, self.has_failed = True, threading.Event()

    def write_bytes(self, path: str, data: bytes) -> None:
        """Keep one object."""
        if self.is_full:
            self.has_failed.set()
            raise OSError("no space left")
        super().write_bytes(path, data)


@pytest.mark.parametrize("found_when", ["a reply comes", "nothing comes"])
def test_replies_under_way_are_kept_where_the_journal_cannot_be_written_for_a_while(found_when: str) -> None:
    storage, together, looks = FullStorage(), threading.Barrier(5, timeout=60), itertools.count()

    def script(seen: Seen, number: int) -> Answer:
        if number < 5:
            together.wait()
        if number > 0:  # all others are under way when the storage fails
            assert storage.has_failed.wait(60)
            storage.is_full = False
        return echo(seen)

    flush_replies = 1 if found_when == "a reply comes" else 99
    requests = [request(f"p{number}") for number in range(30)]
    with serve(script, max_concurrent_requests=5) as (server, engine):
        journal = Journal(storage, "journal/00000", flush_replies=flush_replies, flush_seconds=50.0, clock=lambda: 0.0 if next(looks) < 2 else 100.0)
        with pytest.raises(OSError, match="no space left"):
            generate_once(requests, engine, journal)
        assert server.num_seen() in {5, 6}  # whether the first one's place was taken before the caller knew; no other
    resumed = Journal(storage, "journal/00000")
    assert sum(resumed.find(one.key) is not None for one in requests) == server.num_seen()


def test_costs_are_counted_from_what_the_server_reports() -> None:
    def script(seen: Seen, number: int) -> Answer:
        body = chat("ok", prompt_tokens=1000, output_tokens=3)
        body["usage"]["prompt_tokens_details"] = {"cached_tokens": 600}
        return Answer(body)

    with serve(script, **PRICES, price_per_million_cached_tokens=10.0) as (_, engine):
        [reply] = engine.generate([request("p")])
        assert reply.cost == pytest.approx((400 * 100 + 600 * 10 + 3 * 1000) / 1e6)
        assert engine.counts().cost == reply.cost
        assert engine.counts().cached_prompt_tokens == 600


@pytest.mark.parametrize(("status", "attempts_paid"), [(408, 2), (429, 1), (500, 1), (502, 2), (503, 1), (504, 2), (520, 2), (521, 1), (524, 2)])
def test_which_errors_may_have_been_billed(status: int, attempts_paid: int, tokenizer: str) -> None:
    def script(seen: Seen, number: int) -> Answer:
        return error(status, "no") if number == 0 else Answer(completion("ok", prompt_tokens=5, output_tokens=4))

    with serve(script, **PRICES, api="completions", tokenizer=tokenizer) as (_, engine):
        [reply] = engine.generate([request("12345", chat=False)])
        assert reply.cost == pytest.approx(attempts_paid * (5 * 100 + 4 * 1000) / 1e6)


@pytest.mark.parametrize("usage", [b'{"prompt_tokens": 1e999, "completion_tokens": 1}', b'{"prompt_tokens": 5, "completion_tokens": -1}', b"null"])
def test_a_reply_whose_usage_cannot_be_read_costs_its_worst(usage: bytes, tokenizer: str) -> None:
    body = b'{"choices": [{"index": 0, "text": "ok", "finish_reason": "stop"}], "usage": %b}' % usage
    with serve(lambda seen, number: Answer(body), **PRICES, api="completions", tokenizer=tokenizer) as (_, engine):
        [reply] = engine.generate([request("12345", chat=False)])
        assert (reply.text, reply.cost) == ("ok", pytest.approx((5 * 100 + 4 * 1000) / 1e6))


def test_an_attempt_that_may_have_been_billed_costs_its_worst_and_one_that_was_not_costs_nothing(tokenizer: str) -> None:
    def script(seen: Seen, number: int) -> Answer:
        return Answer(completion("ok", prompt_tokens=5, output_tokens=1), fault=("reset", "429", "500", None)[number])

    with serve(script, **PRICES, api="completions", tokenizer=tokenizer) as (_, engine):
        [reply] = engine.generate([request("12345", chat=False)])
        lost = (5 * 100 + 4 * 1000) / 1e6  # the reset: five prompt tokens known, at most four new ones
        assert reply.cost == pytest.approx(lost + (5 * 100 + 1 * 1000) / 1e6)


def test_the_limit_holds_with_many_in_flight_and_finished_replies_are_kept() -> None:
    true_cost = (10 * 100 + 2 * 1000) / 1e6  # far below the worst, so late requests must wait for earlier ones to settle
    storage = MemoryStorage()
    record = SpendingRecord(storage, "spending")
    requests = [request(f"p{number}") for number in range(200)]

    def run(limit: float) -> tuple[int, LocalBudget, bool]:
        budget = LocalBudget(limit, record)
        with (
            LocalServer(echo) as server,
            EndpointEngine(config(server, **PRICES, spending_limit=limit, max_concurrent_requests=16), budget) as engine,
        ):
            told = ""
            try:
                generate_once(requests, engine, Journal(storage, "journal/00000"))
            except SpendingLimitError as error:
                told = str(error)
            assert not told or f"the spending limit of {limit:g} is reached" in told
            budget.save()
            assert engine.counts().cost <= limit
            return server.num_seen(), budget, bool(told)

    sent, budget, stopped = run(0.3)
    assert stopped
    worst = EndpointConfig(base_url="http://x", model="m", **PRICES).worst_cost(600, 4)  # a body has fewer than 344 bytes, plus 256 tokens
    assert 0.3 - worst <= budget.spent <= 0.3
    assert sent == round(budget.spent / true_cost)
    again, budget, stopped = run(0.3)  # the rerun does not get the limit anew
    assert (again, stopped) == (0, True)
    rest, budget, stopped = run(2.0)
    assert not stopped
    assert sent + rest == 200  # no finished request was sent again
    assert budget.spent == pytest.approx(200 * true_cost)


def test_what_a_closed_engine_had_under_way_counts_as_spent() -> None:
    arrived, hold = threading.Event(), threading.Event()

    def script(seen: Seen, number: int) -> Answer:
        arrived.set()
        hold.wait(60)
        return echo(seen)

    with LocalServer(script) as server:
        budget = LocalBudget(100.0)
        engine = EndpointEngine(config(server, **PRICES, spending_limit=100.0), budget)
        told: list[BaseException] = []

        def call() -> None:
            try:
                engine.generate([request("p")])
            except EngineDied as died:
                told.append(died)

        thread = threading.Thread(target=call)
        thread.start()
        assert arrived.wait(60)
        engine.close()
        engine.close()
        thread.join(60)
        hold.set()
        assert [str(died) for died in told] == ["the engine was closed"]
        assert budget.spent == pytest.approx(engine.counts().cost, abs=2e-9)
        assert engine.counts().cost > 0
        with pytest.raises(EngineDied):
            engine.generate([request("q")])


def test_the_key_comes_from_the_environment_and_only_its_name_from_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("A_KEY_OF_OURS", raising=False)
    with LocalServer(echo) as server:
        with pytest.raises(ConfigError, match=r"A_KEY_OF_OURS \(api_key_env\) is not set"):
            EndpointEngine(config(server, api_key_env="A_KEY_OF_OURS"))
        monkeypatch.setenv("A_KEY_OF_OURS", " secret\n")
        with open_engine(config(server, api_key_env="A_KEY_OF_OURS")) as engine:
            engine.generate([request("p")])
        assert server.seen[0].headers["authorization"] == "Bearer secret"


def test_two_equal_requests_in_one_call_are_a_bug_of_the_caller() -> None:
    with serve(echo) as (server, engine):
        with pytest.raises(ValueError, match="same key"):
            engine.generate([request("p"), request("p")])
        assert server.num_seen() == 0
