"""One attempt at an OpenAI-compatible endpoint, through the `openai` client, and what its outcome means. Serves `endpoint.py`.

Our choice: the client's own retries are off, because they know neither our limits of money and time nor which failures are for good.
"""

import asyncio
import email.utils
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx2
import openai

from synpref_ray.errors import ConfigError, EndpointError, SynprefError
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.llm.wire import read_usage

logging.getLogger("httpx2").setLevel(logging.WARNING)  # it writes a line per request

_CONNECT_SECONDS = 10.0
_TRANSIENT = frozenset({408, 409, 425, 429})  # and every 5xx
_MAYBE_BILLED = frozenset({408, 502, 504, 520, 524})  # ours: somebody lost patience or the answer, so there may have been one
_MAYBE_THE_TEXT = frozenset({400, 406, 422, 451})  # and 403: of this text, or of all that we send
_NO_MONEY = frozenset({"insufficient_quota", "billing_not_active", "billing_hard_limit_reached", "insufficient_funds", "insufficient_balance"})
_REFUSAL_CODES = frozenset(
    {"content_filter", "content_policy_violation", "moderation_blocked", "responsibleaipolicyviolation", "data_inspection_failed", "1301"}
)  # 1301: GLM
_REFUSAL_WORDS = re.compile(
    r"content[ _-]?(filter|policy|management|moderation|exists risk)|flagged|moderation|safety (system|policy|reasons)|usage polic"
    r"|considered high risk|inappropriate content|(prohibited|sensitive)[ _]?content|\u654f\u611f|\u4e0d\u5b89\u5168|\u8fdd\u89c4\u5185\u5bb9",
    re.I,
)
"""What providers say when they refuse a text: DeepSeek "Content Exists Risk", Moonshot "considered high risk"; in Chinese (GLM and others) the words
for sensitive, unsafe, and content against the rules."""
_TOO_LONG_CODES = frozenset({"context_length_exceeded", "exceed_context_size_error"})
_TOO_LONG_WORDS = re.compile(
    r"context[ _](length|size|window)|maximum (context|model) length|max_model_len|too many input tokens|(prompt|input) is too long", re.I
)


@dataclass(frozen=True)
class Answered:
    """A body that parsed as JSON, whatever is in it."""

    body: Any


@dataclass(frozen=True)
class Refused:
    """The provider refused the request for its content, in its own words."""

    said: str


@dataclass(frozen=True)
class Declined:
    """A status of a kind that we do not know: of this request's content, or of all our requests (`error` says the latter).

    `may_be_the_key`: of all from now on, perhaps, though others were answered before.
    """

    said: str
    error: SynprefError
    may_be_the_key: bool = False


@dataclass(frozen=True)
class TooLong:
    """The request does not fit the model's context, in the server's words."""

    said: str


@dataclass(frozen=True)
class Failed:
    """A failure that may pass. `may_be_billed`: nobody can tell whether the server made a reply. `may_be_the_text`: others may have none."""

    reason: str
    may_be_billed: bool
    retry_after_seconds: float = 0.0
    for_all: bool = False  # every request must wait, not this one alone
    malformed: bool = False
    may_be_the_text: bool = False


@dataclass(frozen=True)
class Fatal:
    """A failure that will not pass."""

    error: SynprefError


Outcome = Answered | Refused | Declined | TooLong | Failed | Fatal


class Transport:
    """The connection pool to one endpoint. One event loop uses it."""

    def __init__(self, config: EndpointConfig) -> None:
        self._config = config
        self._where = f"{config.model} at {config.base_url}"
        timeout = httpx2.Timeout(config.timeout_seconds, connect=min(_CONNECT_SECONDS, config.timeout_seconds))
        self._client = openai.AsyncOpenAI(api_key=config.api_key(), base_url=config.base_url, max_retries=0, timeout=timeout)

    async def send(self, path: str, body: Mapping[str, Any]) -> Outcome:
        """Make one attempt."""
        try:
            async with asyncio.timeout(self._config.timeout_seconds):  # the client's own timeouts are between bytes
                response = await self._client.post(path, body=dict(body), cast_to=httpx2.Response)
        except TimeoutError:
            return Failed(f"no whole answer within {self._config.timeout_seconds:g} s", may_be_billed=True, may_be_the_text=True)
        except openai.APIConnectionError as error:
            never_sent = isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
            reason = f"{error.message.rstrip('.')} ({type(error.__cause__).__name__})"
            return Failed(reason, may_be_billed=not never_sent, may_be_the_text=not never_sent)
        except openai.APIStatusError as error:
            return self._status(error)
        try:
            body = json.loads(response.content)
        except ValueError:
            return malformed(f"its body is not JSON: {_line(response.text)}")
        return _error_in(body, response.headers) or Answered(body)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _status(self, error: openai.APIStatusError) -> Outcome:
        status, said = error.status_code, _said(error)
        words = {str(error.code or "").lower(), str(error.type or "").lower()}
        if status == 402 or (status in {400, 403, 429} and words & _NO_MONEY):
            return Fatal(EndpointError(f"{self._where}: the account has no credit or quota left ({said}); finished replies are kept"))
        if _may_pass(status):
            return _failed(status, f"HTTP {status}: {said}", error.response.headers)
        if status == 401 or (status == 403 and not _is_refusal(words, error)):
            variable = f"the variable {self._config.api_key_env} (api_key_env)" if self._config.api_key_env else "no key, as api_key_env is empty"
            wrong_key = ConfigError(f"{self._where}: HTTP {status}, the key was not accepted ({said}); it comes from {variable}")
            return Declined(said, wrong_key, may_be_the_key=True) if status == 403 else Fatal(wrong_key)  # firewalls say 403 to texts with code
        if status == 404:
            return Fatal(ConfigError(f"{self._where}: HTTP 404 ({said}): check model and base_url, which ends in /v1 with most servers"))
        if status == 413 or words & _TOO_LONG_CODES or (status in {400, 422} and _TOO_LONG_WORDS.search(error.message)):
            return TooLong(said)
        if _is_refusal(words, error):
            return Refused(said)
        unlike = ConfigError(f"{self._where}: HTTP {status}, the server does not accept our requests ({said}); see guidance, logprobs, extra_body")
        return Declined(said, unlike) if status in _MAYBE_THE_TEXT else Fatal(unlike)


def malformed(reason: str) -> Failed:
    """Return the failure of a body that is no answer: it may have been paid for, and some servers answer a text that they block so."""
    return Failed(reason, may_be_billed=True, malformed=True, may_be_the_text=True)


def no_answer(body: Any, reason: str) -> Failed:
    """Return the failure that a body of HTTP 200 with choices or usage, and without an answer, is: of the status that its error names, or malformed.

    It may have been paid for.
    """
    status = _status_in(body)
    if _may_pass(status):
        return replace(_failed(status, f"HTTP 200 with error {status}: {reason}", {}), may_be_billed=True)
    return malformed(reason)


def _error_in(body: Any, headers: Mapping[str, str]) -> Failed | None:
    """Return the failure that a body of HTTP 200 says and nothing else, as that status: so some gateways pass on what their providers say."""
    status = _status_in(body)
    if not _may_pass(status) or body.get("choices") or read_usage(body) is not None:
        return None
    said = _line(str(body["error"].get("message") or body["error"]))
    return _failed(status, f"HTTP 200 with error {status}: {said}", headers)


def _status_in(body: Any) -> int:
    """Return the HTTP status that a body's error names, 0 if it names none."""
    error = body.get("error") if isinstance(body, Mapping) else None
    code = str(error.get("code") if isinstance(error, Mapping) else "")
    return int(code) if code.isascii() and code.isdecimal() and len(code) == 3 else 0


def _may_pass(status: int) -> bool:
    return status in _TRANSIENT or status >= 500


def _failed(status: int, reason: str, headers: Mapping[str, str]) -> Failed:
    asked = _retry_after(headers)
    return Failed(
        reason,
        may_be_billed=status in _MAYBE_BILLED,
        retry_after_seconds=asked,
        for_all=status == 429 and asked > 0,
        may_be_the_text=status == 408 or status >= 500,
    )


def _is_refusal(words: set[str], error: openai.APIStatusError) -> bool:
    return bool(words & _REFUSAL_CODES) or _REFUSAL_WORDS.search(error.message) is not None


def _said(error: openai.APIStatusError) -> str:
    """Return the server's own message, in one short line; of a page that is no JSON its beginning, which the client leaves out."""
    if isinstance(error.body, Mapping):
        message = error.body.get("message")
        return _line(str(message if message is not None else error.message))
    return _line(error.response.text or error.message)


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else f"{text[:157]}..."


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that the server asks to wait, 0 if it does not say."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        return max(0.0, float(headers.get("retry-after", "0")))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (ValueError, TypeError, KeyError):
        return 0.0
