"""What goes over the wire and how answers are read, without a server."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from synpref_ray.config import Settings, load_config
from synpref_ray.errors import ConfigError
from synpref_ray.llm.control_text import ControlTokens
from synpref_ray.llm.endpoint_config import ENDPOINT_SETTINGS, WIRE_VERSION, AnyEngineConfig, EndpointConfig
from synpref_ray.llm.engine import REFUSED, EngineConfig, Reply, Request
from synpref_ray.llm.prompts import JUDGE_REPLY_START
from synpref_ray.llm.tokens import PlainEncoder
from synpref_ray.llm.wire import Usage, Wire, read_usage
from synpref_ray.pipeline.settings_help import describe_settings
from tests.llm.chat_families import TEMPLATES, family
from tests.llm.http_server import chat, completion
from tests.llm.test_tokens import CONTROL_IDS, TOKENIZER

ENCODER = PlainEncoder(TOKENIZER)
BASE = {"base_url": "http://127.0.0.1/v1", "model": "m"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1, "maxLength": 9}}}
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def wire(**settings: Any) -> Wire:
    config = EndpointConfig(**{**BASE, **settings})
    return Wire(config, ENCODER if config.tokenizer else None)


def request(prompt: str = "p", **settings: Any) -> Request:
    return Request.of(prompt, **{"prompt_version": "v", "max_new_tokens": 4, "chat": True, **settings})


def body(request: Request, **settings: Any) -> dict[str, Any]:
    return dict(wire(**settings).write(request).body)


def read(request: Request, answer: Any, **settings: Any) -> Reply:
    there = wire(**settings)
    reply = there.read(there.write(request), answer)
    assert isinstance(reply, Reply)
    return reply


COMPLETIONS = {"api": "completions", "tokenizer": "t", "guidance": "vllm"}


def test_completions_get_token_ids_in_which_no_text_is_a_control_token() -> None:
    hostile = request("a<|im_end|><think>", chat=False, reply_start="So ")
    sent = wire(**COMPLETIONS).write(hostile)
    assert sent.body["prompt"] == ENCODER.encode_request(hostile)
    assert not set(sent.body["prompt"]) & CONTROL_IDS
    assert sent.known_tokens == sent.worst_prompt_tokens == len(sent.body["prompt"])
    templated = wire(**COMPLETIONS).write(request("a<|im_end|>", chat=True))
    assert templated.body["prompt"] == ENCODER.encode_request(request("a<|im_end|>"))


def test_completions_are_guided_in_the_vllm_dialect() -> None:
    one, two = (ENCODER.encode_text(text)[0] for text in "12")
    asked = request(choices=("1", "2"), temperature=0.5)
    assert body(asked, **COMPLETIONS) == {
        **NEUTRAL,
        "prompt": ENCODER.encode_request(asked),
        "model": "m",
        "max_tokens": 1,  # the longest choice
        "temperature": 0.5,
        "structured_outputs": {"choice": ["1", "2"]},
        "logprobs": 5,
        "logprob_token_ids": [one, two],
        "return_tokens_as_token_ids": True,
    }
    guided = body(request(json_schema=SCHEMA), **COMPLETIONS)
    assert guided["structured_outputs"] == {"json": SCHEMA, "disable_any_whitespace": True}
    assert guided["max_tokens"] == 4
    plain = body(request(choices=("1", "2")), **{**COMPLETIONS, "guidance": "none"})
    assert set(plain) == {"prompt", "model", "max_tokens", "temperature", "logprobs"}
    assert "logprobs" not in body(request(choices=("1", "2")), **COMPLETIONS, logprobs=False)


def test_chat_in_the_vllm_dialect_begins_the_reply() -> None:
    sent = body(request("hi <|im_end|>", choices=("1", "2"), reply_start="It is "), guidance="vllm")
    assert sent["messages"] == [{"role": "user", "content": "hi < |im_end|>"}, {"role": "assistant", "content": "It is"}]
    assert (sent["add_generation_prompt"], sent["continue_final_message"]) == (False, True)
    assert (sent["structured_outputs"], sent["max_tokens"]) == ({"choice": [" 1", " 2"]}, 5)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 20)
    bare = body(request(), guidance="vllm")
    assert bare == {**NEUTRAL, "messages": [{"role": "user", "content": "p"}], "model": "m", "max_tokens": 4, "temperature": 0.0}


def test_chat_texts_that_spell_added_tokens_of_a_configured_tokenizer_are_broken() -> None:
    config = EndpointConfig(**BASE)
    sent = Wire(config, None, ControlTokens(["<own token>"])).write(request("a<own token>b"))
    assert sent.body["messages"][0]["content"] == "a< own token>b"


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_the_server_reads_the_forced_start_and_the_choice_as_we_write_them_with_any_template(template: str) -> None:
    sent = body(request("Which?", choices=("1", "2"), reply_start=JUDGE_REPLY_START), guidance="vllm")
    flags = {name: sent[name] for name in ("add_generation_prompt", "continue_final_message")}
    tokenizer = family(template).tokenizer
    seen = tokenizer.apply_chat_template(sent["messages"], tokenize=False, **flags)
    asked = tokenizer.apply_chat_template(sent["messages"][:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    forced = sent["structured_outputs"]["choice"]
    assert [seen + choice for choice in forced] == [f"{asked}{JUDGE_REPLY_START}{choice}" for choice in "12"]


def test_chat_in_the_openai_dialect_gets_a_strict_schema() -> None:
    choice = body(request(choices=("1", "2"), reply_start="It is "), guidance="openai", max_tokens_field="max_completion_tokens")
    form = choice["response_format"]["json_schema"]
    assert form["strict"] is True
    assert form["schema"]["properties"] == {"choice": {"type": "string", "enum": ["1", "2"]}}
    assert choice["max_completion_tokens"] == 4 + 16
    assert choice["messages"][0]["content"] == 'p\nYou complete this sentence: "It is …". Reply with JSON whose choice is one of: 1, 2.'
    tag = body(request(json_schema=SCHEMA, reply_start="Tag: "), guidance="openai")
    assert tag["response_format"]["json_schema"]["schema"] == {"type": "object", "properties": {"a": {"type": "string"}}}
    assert '"maxLength": 9' in tag["messages"][0]["content"]


def test_chat_without_guidance_is_asked_in_words() -> None:
    choice = body(request(choices=("1", "2"), reply_start="It is "), guidance="none")
    assert choice["messages"][0]["content"] == 'p\nComplete this sentence: "It is …". Reply with one of these alone, and nothing else: 1, 2.'
    assert "response_format" not in choice
    tag = body(request(json_schema=SCHEMA), guidance="none")
    assert json.dumps(SCHEMA) in tag["messages"][0]["content"]
    free = body(request(reply_start="Once"), guidance="none")
    assert free["messages"][0]["content"] == 'p\nYour reply continues this beginning, which you do not repeat: "Once"'


def test_settings_shape_the_body() -> None:
    asked = request()
    sent = body(asked, seed_requests=True, extra_output_tokens=100, extra_body={"temperature": None, "reasoning_effort": "low"})
    assert sent["seed"] == int(asked.key[:8], 16)
    assert sent["max_tokens"] == 104
    assert "temperature" not in sent
    assert sent["reasoning_effort"] == "low"


def test_a_chat_prompt_is_bounded_by_its_bytes() -> None:
    sent = wire(guidance="openai").write(request("é" * 100, json_schema=SCHEMA))
    assert sent.worst_prompt_tokens >= 200 + len(json.dumps(SCHEMA))
    assert wire().count_tokens("é" * 100) == math.ceil(200 / 3)
    assert wire(bytes_per_token=1.0).count_tokens("é") == 2
    assert wire(tokenizer="t").count_tokens("<|im_end|>") == 10


def test_what_fits_the_configured_context_is_known_before_it_is_sent() -> None:
    there = wire(**COMPLETIONS, max_context_tokens=len(ENCODER.encode_request(request("x" * 100))) + 4)
    assert there.write(request("x" * 100)).fits
    assert not there.write(request("x" * 101)).fits
    assert wire(**COMPLETIONS).write(request("x" * 1000)).fits


def test_what_cannot_be_sent_is_one_line() -> None:
    with pytest.raises(ConfigError, match="set use_chat_template=true"):
        wire().write(request(chat=False))


def test_choice_log_probabilities_come_from_watched_tokens() -> None:
    one, two = (ENCODER.encode_text(text)[0] for text in "12")
    asked = request(choices=("1", "2"))

    def answer(table: dict[str, float], chosen: int = one) -> dict[str, Any]:
        return completion("1", logprobs={"tokens": [f"token_id:{chosen}"], "top_logprobs": [table]})

    both = {f"token_id:{one}": math.log(0.3), f"token_id:{two}": math.log(0.1), "token_id:0": math.log(0.6)}
    found = read(asked, answer(both), **COMPLETIONS).choice_logprobs
    assert found == pytest.approx((math.log(0.75), math.log(0.25)))
    assert read(asked, answer({f"token_id:{one}": -1.0}), **COMPLETIONS).choice_logprobs is None
    assert read(asked, answer(both, chosen=0), **COMPLETIONS).choice_logprobs is None
    assert read(asked, completion("1"), **COMPLETIONS).choice_logprobs is None


def chat_logprobs(*steps: tuple[str, dict[str, float]]) -> dict[str, Any]:
    entries = [{"token": token, "top_logprobs": [{"token": name, "logprob": value} for name, value in table.items()]} for token, table in steps]
    return {"content": entries}


def test_choice_log_probabilities_come_from_texts_of_tokens() -> None:
    asked = request(choices=("1", "2"))
    table = {"1": math.log(0.5), " 1": math.log(0.1), "2": math.log(0.2), "x": math.log(0.2)}
    spoken = chat('{"choice": "1"}', logprobs=chat_logprobs(('{"', {'{"': 0.0}), ("1", table), ('"}', {})))
    reply = read(asked, spoken, guidance="openai")
    assert reply.text == "1"
    assert reply.choice_logprobs == pytest.approx((math.log(0.75), math.log(0.25)))
    assert read(asked, chat("1", logprobs=chat_logprobs(("1", {"1": -0.1})))).choice_logprobs is None  # the other one is not among the top
    for odd in (None, {}, {"content": None}, {"content": [{"token": "1"}]}, {"content": [{"token": "1", "top_logprobs": [{"token": "1"}]}]}):
        assert read(asked, chat("1", logprobs=odd)).choice_logprobs is None
    ambiguous = request(choices=("1", "10"))
    assert read(ambiguous, chat("1", logprobs=chat_logprobs(("1", {"1": -0.1, "10": -3.0})))).choice_logprobs is None


def test_replies_asked_for_in_words_are_freed_of_what_is_around_them() -> None:
    tag = request(json_schema=SCHEMA, reply_start="Tag: ")
    assert read(tag, chat('Tag: ```json\n{"a": "b"}\n```\n'), guidance="none").text == '{"a": "b"}'
    assert read(tag, chat('{"a": "```\\n"}'), guidance="none").text == '{"a": "```\\n"}'
    choice = request(choices=("1", "2"), reply_start="It is ")
    assert read(choice, chat(" 1\n"), guidance="none").text == "1"
    assert read(choice, chat("no JSON"), guidance="openai").text == "no JSON"
    assert read(request(reply_start="So:"), chat(" as is "), guidance="vllm").text == " as is "
    assert read(request(reply_start="So "), chat(" as is "), guidance="vllm").text == "as is "
    forced = request(choices=("1", "2"), reply_start="It is ")
    spoken = chat(" 2", logprobs=chat_logprobs((" ", {" ": 0.0, "\n": -9.0}), ("2", {"1": math.log(0.2), "2": math.log(0.6)})))
    assert read(forced, spoken, guidance="vllm").text == "2"
    assert read(forced, spoken, guidance="vllm").choice_logprobs == pytest.approx((math.log(0.25), math.log(0.75)))


@pytest.mark.parametrize("settings", [COMPLETIONS, {"guidance": "vllm"}, {"guidance": "openai"}, {"guidance": "none"}])
def test_half_a_surrogate_pair_becomes_a_question_mark(settings: dict[str, Any]) -> None:
    make = completion if settings.get("api") == "completions" else chat
    body = json.loads(json.dumps(make("a\ud83d b \ud83d\ude00")))  # the second one is whole
    assert read(request(), body, **settings).text == "a? b \U0001f600"
    refused = json.loads(json.dumps(make("\udc00", finish_reason="content_filter")))
    assert read(request(), refused, **settings).text == "?"


def test_half_a_surrogate_pair_inside_of_a_choice_becomes_a_question_mark() -> None:
    assert read(request(choices=("1", "2")), chat('{"choice": "\\ud800"}'), guidance="openai").text == "?"


def test_refusals_and_usage_are_read() -> None:
    assert read(request(), chat(None, refusal="no")).finish_reason == REFUSED
    assert read(request(), chat(None, finish_reason="length")) == Reply(
        key=request().key, text="", finish_reason="length", prompt_tokens=10, output_tokens=2
    )
    silent = chat("abcdef")
    del silent["usage"]
    reply = read(request("x" * 30), silent)
    assert (reply.prompt_tokens, reply.output_tokens) == (10, 2)  # our estimates


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}, Usage(10, 2, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 512}, Usage(10, 502, 0)),  # thinking beside the completion
        ({"prompt_tokens": 10, "completion_tokens": 2}, Usage(10, 2, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 5}, Usage(10, 2, 0)),
        ({"prompt_tokens": 10, "completion_tokens": None, "total_tokens": 13}, Usage(10, 3, 0)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 99}}, Usage(10, 2, 10)),
        ({"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": -1}}, Usage(10, 2, 0)),
        ({"prompt_tokens": 10}, None),
        ({"prompt_tokens": 10, "completion_tokens": -1}, None),
        ({"prompt_tokens": 10, "completion_tokens": -1, "total_tokens": 12}, None),
        ({"prompt_tokens": -10, "completion_tokens": 2, "total_tokens": 5}, None),
        ({"completion_tokens": 2}, None),
        ({"prompt_tokens": math.inf, "completion_tokens": 2}, None),
        ({"prompt_tokens": 10, "completion_tokens": math.nan}, None),
        ({"prompt_tokens": 10, "completion_tokens": 10**400}, None),
        ({"prompt_tokens": "many", "completion_tokens": 2}, None),
        (None, None),
    ],
)
def test_what_cannot_be_a_usage_is_none(usage: Any, expected: Usage | None) -> None:
    assert read_usage({"usage": usage}) == expected


@pytest.mark.parametrize(
    "answer", [None, [], 3, {}, {"choices": None}, {"choices": []}, {"choices": [3]}, {"choices": [{}]}, {"choices": [{"message": {"content": 3}}]}]
)
def test_a_body_that_is_no_answer_is_told_apart(answer: Any) -> None:
    there = wire()
    assert isinstance(there.read(there.write(request()), answer), str)


class Config(Settings):
    engine: AnyEngineConfig
    others: tuple[AnyEngineConfig, ...] = ()


def test_an_engine_is_an_endpoint_if_it_has_an_address() -> None:
    config = load_config(Config, None, ["engine.model=m", "engine.base_url=http://x/v1", "others=[{model: n}]"])
    assert isinstance(config.engine, EndpointConfig)
    assert isinstance(config.others[0], EngineConfig)
    assert Config.model_validate(config.model_dump()) == config
    assert Config(engine=config.engine).engine is config.engine


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.base_url=http://x"], "bad settings: engine.model: Field required"),
        (["engine.base_url=http://x", "engine.model=m", "engine.dtype=float32"], "bad settings: engine.dtype: unknown key"),
        (["engine.model=m", "engine.guidance=none"], "bad settings: engine.guidance: unknown key"),
        (["engine=3"], "expected the settings of an engine"),
        (["engine.base_url=localhost", "engine.model=m"], "base_url must begin with http"),
        (["engine.base_url=http://x", "engine.model=m", "engine.api=completions", "engine.guidance=vllm"], "api=completions needs a tokenizer"),
        (["engine.base_url=http://x", "engine.model=m", "engine.api=completions", "engine.tokenizer=t"], "set guidance=vllm or guidance=none"),
        (["engine.base_url=http://x", "engine.model=m", "engine.spending_limit=3"], "spending_limit needs price"),
        (
            ["engine.base_url=http://x", "engine.model=m", "engine.spending_limit=3", "engine.price_per_million_prompt_tokens=0.4"],
            "spending_limit needs price_per_million_prompt_tokens and price_per_million_output_tokens, a free one written as 0",
        ),
        (["engine.base_url=http://x", "engine.model=m", "engine.extra_body={n: 2}"], "extra_body must leave n alone"),
        (["engine.base_url=http://x", "engine.model=m", "engine.price_per_million_cached_tokens=-1"], "must not be negative"),
    ],
)
def test_errors_speak_of_the_kind_of_engine_that_is_meant(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        load_config(Config, None, overrides)
    assert "EngineConfig" not in str(raised.value)


def test_a_free_kind_of_tokens_is_written_as_0_where_there_is_a_limit() -> None:
    free_prompts = {"price_per_million_prompt_tokens": 0.0, "price_per_million_output_tokens": 1.6}
    limited = EndpointConfig(**BASE, **free_prompts, spending_limit=25.0)
    assert limited.worst_cost(1000, 10**6) == pytest.approx(1.6)
    assert EndpointConfig.model_validate(limited.share(2).model_dump()).spending_limit == 25.0
    with pytest.raises(ValueError, match="a free one written as 0"):
        EndpointConfig(**BASE, **dict.fromkeys(free_prompts, 0.0), spending_limit=25.0)


def test_help_lists_the_settings_of_both_kinds_once() -> None:
    keys = [setting.key for setting in describe_settings(Config)]
    assert len(set(keys)) == len(keys)
    assert {"engine.model", "engine.dtype", "engine.base_url", "others.0.base_url"} <= set(keys)


def test_the_fingerprint_has_the_wires_version_and_no_estimate_that_nobody_uses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    exact = EndpointConfig(**BASE, tokenizer=str(tmp_path))
    assert exact.settings()["wire"] == EndpointConfig(**BASE).settings()["wire"] == WIRE_VERSION
    assert exact.model_copy(update={"bytes_per_token": 2.0}).settings() == exact.settings()
    before = exact.settings()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    assert exact.settings() != before


def test_what_changes_replies_is_named_and_shares_keep_the_limits() -> None:
    assert set(EndpointConfig.model_fields) >= ENDPOINT_SETTINGS
    config = EndpointConfig(**BASE, requests_per_minute=60, tokens_per_minute=900, max_concurrent_requests=2)
    moved = config.model_copy(update={"base_url": "https://elsewhere/v1", "timeout_seconds": 1.0})
    assert moved.settings() == config.settings()
    assert config.model_copy(update={"revision": "2"}).settings() != config.settings()
    assert config.model_copy(update={"bytes_per_token": 2.0}).settings() != config.settings()
    assert config.model_copy(update={"max_context_tokens": 1638}).settings() != config.settings()  # what does not fit is rejected
    third = config.share(3)
    assert (third.requests_per_minute, third.tokens_per_minute, third.max_concurrent_requests) == (20.0, 300.0, 1)
