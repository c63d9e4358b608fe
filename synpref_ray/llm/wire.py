"""Requests as an OpenAI-compatible server wants them, and its answers as replies. Serves `endpoint.py`; nothing here sends anything.

Completions get token ids made here, so no text of a pair becomes a control token, and the start of the reply is simply there. Chat servers
tokenise themselves, and not all of them let a client begin the reply or guide decoding: what cannot be forced is asked for in words.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from synpref_ray.errors import ConfigError
from synpref_ray.llm.choices import Watched, log_sum, normalise_logprobs, watched_tokens
from synpref_ray.llm.control_text import NO_TOKENS, ControlTokens, break_control_text
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.llm.engine import REFUSED, Reply, Request
from synpref_ray.llm.tokens import PlainEncoder

_TEMPLATE_TOKENS = 256  # ours: more than any chat template adds to one message
_CHOICE_JSON_TOKENS = 16  # of {"choice": ""}, with spaces
_TOP_CHAT, _TOP_COMPLETIONS = 20, 5  # the most that the two interfaces give
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # else vLLM takes the checkpoint's own sampling defaults
_STRICT_LACKS = frozenset({"minLength", "maxLength"})  # keywords that strict schemas of hosted providers refuse
_MOST_SAID = 160  # ours: characters of a server's own words
_MOST_TOKENS = 10**12  # ours: no request has so many


@dataclass(frozen=True)
class WireRequest:
    """A request as it is sent: `body` to `path`.

    Prompt and reply hold at most `worst_prompt_tokens` and `max_tokens`, as far as the server counts tokens the usual way; `known_tokens` is
    the exact number of prompt tokens, or the best estimate. `watched` is where the choices differ, and the token of each there, if known.
    What does not fit is not to be sent.
    """

    request: Request
    path: str
    body: Mapping[str, Any]
    known_tokens: int
    worst_prompt_tokens: int
    max_tokens: int
    watched: Watched | None
    fits: bool  # in the configured context, as far as we can tell


@dataclass(frozen=True)
class Usage:
    """Tokens that a server reports; None: it does not say."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


class Wire:
    """Writes and reads for one endpoint; several threads may use it.

    Args:
        encoder: of the model's tokenizer; None if the endpoint has none configured (chat only).
        control: the added tokens of that tokenizer.
    """

    def __init__(self, config: EndpointConfig, encoder: PlainEncoder | None, control: ControlTokens = NO_TOKENS) -> None:
        self._config = config
        self._encoder = encoder
        self._control = control

    def count_tokens(self, text: str) -> int:
        """Return the tokens of `text`; without a tokenizer an estimate, one per `bytes_per_token` bytes of UTF-8."""
        if self._encoder is not None:
            return len(self._encoder.encode_text(text))
        return math.ceil(len(text.encode()) / self._config.bytes_per_token)

    def write(self, request: Request) -> WireRequest:
        """Return the request as it is sent.

        Raises:
            ConfigError: it asks a chat server to continue plain text.
        """
        return self._completion(request) if self._config.api == "completions" else self._chat(request)

    def read(self, sent: WireRequest, answer: Any) -> Reply | str:
        """Return the reply in a parsed body (tokens as the server or our estimate has them, no cost), or what is wrong with the body."""
        choice = _first_choice(answer)
        if isinstance(choice, str):
            return choice
        found = _text_of(choice, chat=self._config.api == "chat")
        if found is None:
            return "its choice has no text"
        text, refused = found
        usage = read_usage(answer)
        text = text if refused or self._config.api == "completions" else self._mend(sent.request, text)
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is JSON, but no table takes it
        return Reply(
            key=sent.request.key,
            text=text,
            finish_reason=REFUSED if refused else str(choice.get("finish_reason") or "unknown"),
            prompt_tokens=usage.prompt_tokens if usage is not None else sent.known_tokens,
            output_tokens=usage.output_tokens if usage is not None else self.count_tokens(text),
            choice_logprobs=None if refused else self._logprobs(sent, choice.get("logprobs")),
        )

    def _completion(self, request: Request) -> WireRequest:
        assert self._encoder is not None  # the config's own check
        tokens = self._encoder.encode_request(request)
        max_tokens, watched = request.max_new_tokens, None
        body: dict[str, Any] = {"prompt": tokens}
        if request.choices is not None:
            choices = [self._encoder.encode_text(choice) for choice in request.choices]
            max_tokens = min(max_tokens, max(map(len, choices)))  # as VllmEngine: no pass for an end-of-text token
            watched = watched_tokens(choices)
            if self._config.logprobs and (watched is not None or self._config.guidance != "vllm"):
                body["logprobs"] = _TOP_COMPLETIONS
        if self._config.guidance == "vllm":
            body |= _NEUTRAL | _vllm_guidance(request)
            if "logprobs" in body and watched is not None:
                body |= {"logprob_token_ids": list(watched[1]), "return_tokens_as_token_ids": True}
        else:
            watched = None  # tokens come back as text
        return self._finish(request, "/completions", body, max_tokens, len(tokens), watched)

    def _chat(self, request: Request) -> WireRequest:
        if not request.chat:
            raise ConfigError("a chat endpoint always wraps prompts in its chat template: set use_chat_template=true, or api=completions")
        guidance, prompt = self._config.guidance, break_control_text(request.prompt, self._control)
        max_tokens, body = request.max_new_tokens, dict[str, Any]()
        start, space = _split_start(request.reply_start)
        if guidance == "vllm":
            body |= _NEUTRAL | _vllm_guidance(request, space)
            max_tokens += len(space) if request.choices is not None else 0
            if start:
                body |= {"add_generation_prompt": False, "continue_final_message": True}
        elif guidance == "openai" and request.choices is not None:
            schema = {
                "type": "object",
                "properties": {"choice": {"type": "string", "enum": list(request.choices)}},
                "required": ["choice"],
                "additionalProperties": False,
            }
            body["response_format"] = _strict_format("choice", schema)
            max_tokens += _CHOICE_JSON_TOKENS
        elif guidance == "openai" and request.json_schema is not None:
            body["response_format"] = _strict_format("reply", _without_lengths(request.json_schema))
        words = "" if guidance == "vllm" else _words(request, guided=guidance == "openai")
        messages = [{"role": "user", "content": f"{prompt}\n{words}" if words else prompt}]
        if guidance == "vllm" and start:
            messages.append({"role": "assistant", "content": start})
        body["messages"] = messages
        if request.choices is not None and self._config.logprobs:
            body |= {"logprobs": True, "top_logprobs": _TOP_CHAT}
        text = "".join(message["content"] for message in messages)
        return self._finish(request, "/chat/completions", body, max_tokens, self.count_tokens(text), None)

    def _finish(self, request: Request, path: str, body: dict[str, Any], max_tokens: int, known_tokens: int, watched: Watched | None) -> WireRequest:
        config = self._config
        max_tokens += config.extra_output_tokens
        body |= {"model": config.model, "temperature": request.temperature, config.max_tokens_field: max_tokens}
        if config.seed_requests:
            body["seed"] = int(request.key[:8], 16)
        body |= config.extra_body
        body = {name: value for name, value in body.items() if value is not None}
        # A tokenizer makes at most a token of each byte; schemas and messages are in the body too.
        worst = known_tokens if path == "/completions" else len(json.dumps(body, ensure_ascii=False).encode()) + _TEMPLATE_TOKENS
        fits = not config.max_context_tokens or known_tokens + max_tokens <= config.max_context_tokens
        return WireRequest(request, path, body, known_tokens, worst, max_tokens, watched, fits)

    def _mend(self, request: Request, text: str) -> str:
        """Take away what a chat model puts around its answer: the space after the forced start, or whatever one does that was only asked in words."""
        if self._config.guidance == "vllm":
            return text.removeprefix(_split_start(request.reply_start)[1])
        text = text.strip()
        if self._config.guidance == "openai" and request.choices is not None:
            return _unwrap_choice(text)
        text = text.removeprefix(request.reply_start.strip()).strip() if request.reply_start.strip() else text
        fenced = re.fullmatch(r"```[a-z]*\n(.*?)\n?```", text, re.DOTALL) if request.json_schema is not None else None
        return fenced.group(1) if fenced else text

    def _logprobs(self, sent: WireRequest, logprobs: Any) -> tuple[float, ...] | None:
        if sent.request.choices is None or not isinstance(logprobs, Mapping):
            return None
        try:
            if self._config.api == "chat":
                entries = logprobs.get("content") or []
                steps = [(entry["token"], {top["token"]: float(top["logprob"]) for top in entry["top_logprobs"]}) for entry in entries]
            else:
                steps = list(zip(logprobs["tokens"], [dict(table or {}) for table in logprobs["top_logprobs"]], strict=True))
            return _of_tokens(sent.watched, steps) if sent.watched is not None else _of_texts(sent.request.choices, steps)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # a shape of their own


def read_usage(answer: Any) -> Usage | None:
    """Return the tokens that a body reports, also one that is otherwise malformed; None if it does not, or reports what cannot be.

    All that is in `total_tokens` beside the prompt was written: some providers leave thinking out of `completion_tokens` (xAI).
    """
    usage = answer.get("usage") if isinstance(answer, Mapping) else None
    if not isinstance(usage, Mapping):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    reported = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens") if usage.get(name) is not None}
    counts = {name: _count(value) for name, value in reported.items()}
    prompt, written, total = (counts.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens"))
    if None in counts.values() or prompt is None or (written is None and total is None):
        return None
    output = max(written or 0, (total or prompt) - prompt)
    return Usage(prompt, output, min(_count(cached) or 0, prompt))


def _count(value: Any) -> int | None:
    """Return a number of tokens as a server reports it; None if it is no such number."""
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):  # 1e999 is JSON, and infinite
        return None
    return count if 0 <= count <= _MOST_TOKENS else None


def _first_choice(answer: Any) -> Mapping[str, Any] | str:
    if not isinstance(answer, Mapping):
        return "its body is not a JSON object"
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        return choices[0]
    error = answer.get("error")
    if not error:
        return "its body has no choices"
    said = " ".join(str(error.get("message") or error if isinstance(error, Mapping) else error).split())
    return f"its body has no choices, but an error: {said[:_MOST_SAID]}"


def _text_of(choice: Mapping[str, Any], *, chat: bool) -> tuple[str, bool] | None:
    """Return the text and whether it was refused."""
    refused = choice.get("finish_reason") == "content_filter"
    if not chat:
        return (choice["text"], refused) if isinstance(choice.get("text"), str) else None
    message = choice.get("message")
    if not isinstance(message, Mapping):
        return None
    refused = refused or bool(message.get("refusal"))
    content = message.get("content")  # null: refused, or all tokens went into thinking
    return ("" if content is None else content, refused) if content is None or isinstance(content, str) else None


def _split_start(reply_start: str) -> tuple[str, str]:
    """Return the start of a reply, and the white space that ends it apart.

    Templates that trim messages (Llama 3, Gemma, newer Qwen) would take that space away, and a choice forced straight after "Candidate" would be one
    between tokens that the model never writes there. So it is part of the choices, and of no message. A schema's "{" comes without it.
    """
    start = reply_start.rstrip()
    return start, reply_start[len(start) :]


def _vllm_guidance(request: Request, space: str = "") -> dict[str, Any]:
    if request.choices is not None:
        return {"structured_outputs": {"choice": [space + choice for choice in request.choices]}}
    if request.json_schema is not None:
        return {"structured_outputs": {"json": dict(request.json_schema), "disable_any_whitespace": True}}
    return {}


def _strict_format(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": dict(schema)}}


def _without_lengths(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        return {key: _without_lengths(value) for key, value in schema.items() if key not in _STRICT_LACKS}
    return [_without_lengths(value) for value in schema] if isinstance(schema, list) else schema


def _words(request: Request, *, guided: bool) -> str:
    """Ask for what the interface cannot force."""
    schema = json.dumps(request.json_schema, ensure_ascii=False) if request.json_schema is not None else ""
    if guided and request.choices is not None:
        start = f'You complete this sentence: "{request.reply_start.strip()} …". ' if request.reply_start.strip() else ""
        return f"{start}Reply with JSON whose choice is one of: {', '.join(request.choices)}."
    if guided and schema:
        return f"Reply with JSON of this schema, lengths in characters: {schema}"
    if schema:
        return f"Reply with one JSON object of this schema, lengths in characters, and nothing else: {schema}"
    if request.choices is not None:
        start = f'Complete this sentence: "{request.reply_start.strip()} …". ' if request.reply_start.strip() else ""
        return f"{start}Reply with one of these alone, and nothing else: {', '.join(request.choices)}."
    return f'Your reply continues this beginning, which you do not repeat: "{request.reply_start}"' if request.reply_start else ""


def _unwrap_choice(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value["choice"] if isinstance(value, dict) and isinstance(value.get("choice"), str) else text


def _of_tokens(watched: Watched, steps: Sequence[tuple[str, Mapping[str, float]]]) -> tuple[float, ...] | None:
    position, tokens = watched
    if len(steps) <= position:
        return None
    names = [f"token_id:{token}" for token in tokens]
    chosen, table = steps[position]
    if chosen not in names or any(name not in table for name in names):
        return None
    return normalise_logprobs([table[name] for name in names])


def _of_texts(choices: Sequence[str], steps: Sequence[tuple[str, Mapping[str, float]]]) -> tuple[float, ...] | None:
    """Read the first token that names one choice alone; other tokens that name a choice there (with a space, say) count towards it."""
    for chosen, table in steps:
        if _named(choices, chosen) is None:
            continue
        found: dict[str, list[float]] = {choice: [] for choice in choices}
        for token, value in table.items():
            name = _named(choices, token)
            if name is not None:
                found[name].append(value)
        return normalise_logprobs([log_sum(found[choice]) for choice in choices]) if all(found.values()) else None
    return None


def _named(choices: Sequence[str], token: str) -> str | None:
    text = token.strip(" \n\t\"'")
    fits = [choice for choice in choices if text and choice.startswith(text)]
    return fits[0] if len(fits) == 1 else None
