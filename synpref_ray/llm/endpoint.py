"""A model behind an OpenAI-compatible HTTP endpoint as an engine: for tagging and judging (Sec. 3.1 and 3.2).

One thread of its own runs all requests of all callers; a caller waits for its replies and sees each in its own thread. A request is tried until
it is answered, refused, or has failed for `give_up_seconds`; only failures that may pass are tried again. What cannot pass (a wrong key, an
unknown model, no money) ends the engine: nothing more is sent, what is under way is still received, and every caller gets the one error.

Our choice: where the server answers others, if need be one of our own with a harmless text, what it does not answer is that one text's fault, be it a
status that we cannot read or a request that keeps failing. It is taken for a refusal in the server's words; more than `max_declined_fraction` of
such refusals end the engine. Without this, one pair that a firewall blocks, or whose refusal is worded anew, would end the job at every start.
"""

import asyncio
import logging
import queue
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn

from synpref_ray.bundled import resolve_model
from synpref_ray.errors import ConfigError, EndpointError
from synpref_ray.llm.control_text import ControlTokens
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.llm.engine import REFUSED, TOO_LONG, UNANSWERED, EngineConfig, EngineCounts, EngineDied, ModelIdentity, Reply, Request, take
from synpref_ray.llm.spending import Budget
from synpref_ray.llm.tokens import PlainEncoder
from synpref_ray.llm.turns import Call, EngineEnd, Turns
from synpref_ray.llm.vllm_engine import VllmEngine
from synpref_ray.llm.wire import Wire, WireRequest, read_usage
from synpref_ray.tables.storage import STORAGE_ERRORS

if TYPE_CHECKING:
    from synpref_ray.llm.transport import Declined, Failed, Outcome, Refused, TooLong

logger = logging.getLogger(__name__)

MAX_MALFORMED = 5
"""Bodies that are no answer, for one request, before it is given up: each may have been paid for."""
REFUSED_PROMPTS_TO_WARN = 50
"""If so many different prompts are refused and none is answered, the log says so. No job ends for it: a run that goes on after another may have
nothing left to send but what is refused, and a table with too many refused rows fails its step in the end (`max_failed_fraction`).
"""
MAX_PROBES = 3
"""Attempts with a harmless text, each failing, before a server that failed us is taken to be down."""
FEWEST_JUDGED = 400
"""Requests that `max_declined_fraction` is taken of, until there are more."""
_HARMLESS = "How many days does a week have?"
_CLOSED = "the engine was closed"


@dataclass
class _Trial:
    """What one request has been through."""

    sent: WireRequest
    attempts: int = 0
    malformed: int = 0
    failing_since: float | None = None
    cost: float = 0.0
    body: Any = None  # of the last attempt
    started: int = 0  # the place of the last attempt among all of the engine's


class EndpointEngine:
    """An engine behind HTTP. `close` it when done (it is a context manager too); several threads may share it.

    Args:
        budget: shared with other engines; without one, `spending_limit` holds for this engine alone.
        clock: seconds, for pacing and giving up.
        pause: waits so many seconds, for pacing and backing off.

    Raises:
        ConfigError: the key's variable is not set.
        InputError: the tokenizer cannot be found.
    """

    def __init__(
        self,
        config: EndpointConfig,
        budget: Budget | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] | None = None,
    ) -> None:
        from synpref_ray.llm.transport import Transport  # the client takes a second to import

        started = time.monotonic()
        self._config = config
        self._clock = clock
        self._wire = Wire(config, *_load_tokenizer(config.tokenizer)) if config.tokenizer else Wire(config, None)
        self._transport = Transport(config)
        self._random = random.Random()
        # From here on the loop's thread alone changes these; others read.
        self._end = EngineEnd(pause)
        self._turns = Turns(config, budget, self._end, clock)
        self._slots = asyncio.Semaphore(config.max_concurrent_requests)
        self._counts = EngineCounts(requests_sent=0, replies=0, prompt_tokens=0, cached_prompt_tokens=0, output_tokens=0, start_seconds=0.0)
        self._refused_prompts: set[str] | None = set()  # until one is answered, or there are many
        self._told_too_long = False
        self._num_started = 0
        self._newest_answered = 0  # of the attempts that were answered, the one that began last
        self._trying_harmless = asyncio.Lock()
        self._num_declined = 0
        self._lock = threading.Lock()  # guards _is_closed: no request may be given to a loop that has stopped
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self._counts = replace(self._counts, start_seconds=time.monotonic() - started)
        if config.api == "chat" and not config.tokenizer:
            logger.warning("%s: texts that spell its control tokens are broken by their look; set tokenizer to know them (docs/llm.md)", config.model)
        logger.info("endpoint %s at %s: %s, guidance %s", config.model, config.base_url, config.api, config.guidance)

    def __enter__(self) -> "EndpointEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[Reply], None] | None = None, on_idle: Callable[[], None] | None = None
    ) -> list[Reply]:
        """See `Engine.generate`; may be called by several threads at once. A request that is refused or does not fit has a reply too (`REFUSED`,
        `TOO_LONG`).

        Raises:
            ConfigError: a request asks a chat endpoint for plain text; nothing is sent then. Or the server does not accept the key, the
                model or the body.
            EndpointError: the endpoint gave no answer for `give_up_seconds`, or has no quota left.
            SpendingLimitError: the budget is spent.
            EngineDied: the engine was closed.
        """
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests of one call have the same key")
        written = [self._wire.write(request) for request in requests]
        call = Call()
        outbox: queue.SimpleQueue[Future[Reply]] = queue.SimpleQueue()
        try:
            for sent in written:
                self._submit(self._answer(sent, call)).add_done_callback(outbox.put)
            return self._collect(requests, call, outbox, on_finished, on_idle)
        finally:
            call.is_wanted = False

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of `text`, as plain data; an estimate where no tokenizer is configured."""
        return self._wire.count_tokens(text)

    def counts(self) -> EngineCounts:
        """Return the totals since the start, from all threads."""
        return self._counts

    def identity(self) -> ModelIdentity:
        """Return the model's name at the server and the configured revision."""
        return ModelIdentity(model=self._config.model, revision=self._config.revision)

    def close(self) -> None:
        """Drop what is under way (it counts as paid) and end; whoever still waits gets `EngineDied`. May be called twice."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._turns.close()

    def _submit(self, work: Coroutine[Any, Any, Reply]) -> "Future[Reply]":
        with self._lock:
            if self._is_closed:
                work.close()
                raise EngineDied(_CLOSED)
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _collect(
        self,
        requests: Sequence[Request],
        call: Call,
        outbox: "queue.SimpleQueue[Future[Reply]]",
        on_finished: Callable[[Reply], None] | None,
        on_idle: Callable[[], None] | None,
    ) -> list[Reply]:
        """Wait for all, also after a failure: what is under way is paid for.

        So also where the caller's storage fails: nothing more is sent for this call then, and the caller is still shown what comes in, to keep it for
        its next try.
        """
        replies: dict[str, Reply] = {}
        failure: BaseException | None = None
        for _ in requests:
            try:
                future = take(outbox, on_idle)
            except STORAGE_ERRORS as error:
                failure, on_idle, call.is_wanted = failure or error, None, False
                future = take(outbox, None)
            if future.cancelled() or (error_of_one := future.exception()) is not None:
                failure = failure or (EngineDied(_CLOSED) if future.cancelled() else error_of_one)
                continue
            reply = future.result()
            replies[reply.key] = reply
            try:
                if on_finished is not None:
                    on_finished(reply)
            except STORAGE_ERRORS as error:
                failure, on_idle, call.is_wanted = failure or error, None, False
        if failure is not None:
            raise failure
        return [replies[request.key] for request in requests]

    async def _answer(self, sent: WireRequest, call: Call) -> Reply:
        """Try one request until there is a reply."""
        from synpref_ray.llm.transport import Declined, Failed, TooLong

        trial = _Trial(sent)
        if not sent.fits:
            limit = self._config.max_context_tokens
            return self._too_long(trial, f"{sent.known_tokens} tokens and a reply of {sent.max_tokens} do not fit max_context_tokens={limit}")
        async with self._slots:
            while isinstance(outcome := await self._try(trial, call), Failed):
                if why := self._why_give_up(trial, outcome):
                    if not (outcome.may_be_the_text and await self._answers(sent.request, trial.started, call, is_patient=False)):
                        self._give_up(why)
                    return self._leave_out(trial, outcome.reason)
                await self._back_off(trial, outcome)
            if isinstance(outcome, Reply):
                return self._deliver(replace(outcome, cost=trial.cost), trial)
            if isinstance(outcome, TooLong):
                return self._deliver(self._too_long(trial, outcome.said), trial)
            if isinstance(outcome, Declined):
                since = self._num_started if outcome.may_be_the_key else 0  # answers to what went out before may be an older key's
                if not await self._answers(sent.request, since, call, is_patient=True):
                    self._end.finish_with(outcome.error)
                return self._leave_out(trial, outcome.said)
            return self._deliver(_no_answer(trial, REFUSED, outcome.said), trial)

    async def _try(self, trial: _Trial, call: Call) -> "Reply | Refused | Declined | TooLong | Failed":
        """Make one attempt, and read its answer; a failure that cannot pass ends the engine."""
        from synpref_ray.llm.transport import Answered, Fatal, no_answer

        outcome = await self._attempt(trial, call)
        if isinstance(outcome, Fatal):
            self._end.finish_with(outcome.error)
        if not isinstance(outcome, Answered):
            return outcome
        reply = self._wire.read(trial.sent, outcome.body)
        return reply if isinstance(reply, Reply) else no_answer(outcome.body, reply)

    def _leave_out(self, trial: _Trial, said: str) -> Reply:
        """Take a request that the server does not answer, while it answers others, for a refused one; end the engine if there are too many."""
        self._num_declined += 1
        if self._num_declined == 1:
            logger.warning("%s: a request was declined, and is left out like a refused one, like others to come: %s", self._config.model, said)
        num_judged = self._counts.replies + 1
        if self._num_declined > self._config.max_declined_fraction * max(num_judged, FEWEST_JUDGED):
            many = f"{self._num_declined} of {num_judged} requests in ways that we cannot read (the last: {said})"
            self._end.finish_with(
                ConfigError(
                    f"{self._config.model} at {self._config.base_url} declined {many}, more than "
                    f"max_declined_fraction={self._config.max_declined_fraction:g} allows; finished replies are kept: see guidance, logprobs, "
                    "extra_body, or raise max_declined_fraction if it refuses these texts"
                )
            )
        return self._deliver(_no_answer(trial, REFUSED, said), trial)

    async def _answers(self, request: Request, since: int, call: Call, *, is_patient: bool) -> bool:
        """Whether the server has answered an attempt that began after the attempt `since`, or answers a harmless text.

        Args:
            is_patient: wait for a server that is down, as for any request; else it has been waited for already.
        """
        from synpref_ray.llm.transport import Declined, Failed

        async with self._trying_harmless:
            if self._newest_answered > since:
                return True
            probe = _Trial(self._wire.write(replace(request, prompt=_HARMLESS)))
            while isinstance(outcome := await self._try(probe, call), Failed):
                why = self._why_give_up(probe, outcome)
                if why and is_patient:
                    self._give_up(why)
                if why or (probe.attempts >= MAX_PROBES and not is_patient):
                    return False
                await self._back_off(probe, outcome)
            works = not isinstance(outcome, Declined)
            self._newest_answered = max(self._newest_answered, probe.started) if works else self._newest_answered
            return works

    def _too_long(self, trial: _Trial, why: str) -> Reply:
        if not self._told_too_long:
            self._told_too_long = True
            logger.warning(
                "%s: a prompt does not fit, and is left out, like others to come: %s; see the step's max_input_tokens", self._config.model, why
            )
        return _no_answer(trial, TOO_LONG)

    async def _attempt(self, trial: _Trial, call: Call) -> "Outcome":
        """Wait for its turn, send, and settle."""
        taken = trial.sent.known_tokens + trial.sent.max_tokens
        worst = self._config.worst_cost(trial.sent.worst_prompt_tokens, trial.sent.max_tokens)
        reservation = await self._turns.take(taken, worst, call)
        actual, outcome = 0.0, None
        try:
            self._end.check_open(call)
            self._count(trial)
            actual = worst  # unless we learn better
            self._num_started += 1
            trial.started, trial.body = self._num_started, None
            outcome = await self._transport.send(trial.sent.path, trial.sent.body)
            actual = self._turns.cost_of(outcome, worst)
        finally:  # also when the engine is closed meanwhile
            trial.cost += actual
            self._counts = replace(self._counts, cost=self._counts.cost + actual)
            self._turns.settle(reservation, actual)
        trial.body = getattr(outcome, "body", None)
        usage = read_usage(trial.body)
        if usage is not None:
            self._turns.give_back(taken, usage)
        return outcome

    def _why_give_up(self, trial: _Trial, failed: "Failed") -> str:
        """Count a failure; return why it was the last one, "" if it was not."""
        trial.failing_since = self._clock() if trial.failing_since is None else trial.failing_since
        trial.malformed += failed.malformed
        left = self._seconds_left(trial)
        if trial.malformed >= MAX_MALFORMED:
            return f"gave {MAX_MALFORMED} bodies in place of one reply that are none; the last one: {failed.reason}"
        if left > 0 and failed.retry_after_seconds <= left:
            return ""
        wanted = f", which asks to wait {failed.retry_after_seconds:.0f} s" if failed.retry_after_seconds > left else ""
        return f"gave no reply within give_up_seconds={self._config.give_up_seconds:g}; the last failure: {failed.reason}{wanted}"

    async def _back_off(self, trial: _Trial, failed: "Failed") -> None:
        """Wait before the next attempt."""
        ceiling = min(self._config.max_backoff_seconds, self._config.backoff_seconds * 2.0 ** min(trial.attempts - 1, 30))
        seconds = max(failed.retry_after_seconds, min(self._seconds_left(trial), self._random.uniform(0.0, ceiling)))
        logger.info("%s: %s; again in %.1f s", self._config.model, failed.reason, seconds)
        if failed.for_all:
            self._turns.hold(seconds)
        await self._end.sleep(seconds)

    def _seconds_left(self, trial: _Trial) -> float:
        since = trial.failing_since
        return self._config.give_up_seconds - (0.0 if since is None else self._clock() - since)

    def _give_up(self, why: str) -> NoReturn:
        where = f"{self._config.model} at {self._config.base_url}"
        self._end.finish_with(EndpointError(f"{where} {why}. Finished replies are kept: start the job again when the endpoint works"))

    def _count(self, trial: _Trial) -> None:
        trial.attempts += 1
        first = trial.attempts == 1
        self._counts = replace(self._counts, requests_sent=self._counts.requests_sent + first, retries=self._counts.retries + (not first))

    def _deliver(self, reply: Reply, trial: _Trial) -> Reply:
        usage = read_usage(trial.body)
        self._counts = replace(
            self._counts,
            replies=self._counts.replies + 1,
            prompt_tokens=self._counts.prompt_tokens + reply.prompt_tokens,
            cached_prompt_tokens=self._counts.cached_prompt_tokens + (usage.cached_tokens if usage is not None else 0),
            output_tokens=self._counts.output_tokens + reply.output_tokens,
        )
        if reply.finish_reason not in UNANSWERED:
            self._refused_prompts = None
            self._newest_answered = max(self._newest_answered, trial.started)
        elif reply.finish_reason == REFUSED and self._refused_prompts is not None:
            self._refused_prompts.add(trial.sent.request.prompt)
            if len(self._refused_prompts) >= REFUSED_PROMPTS_TO_WARN:
                self._refused_prompts = None
                logger.warning(
                    "%s at %s refused the first %s prompts, all that it was sent, for their content; it goes on, but look at the prompts, the key "
                    "and the model: a table with too many refused rows fails in the end",
                    self._config.model,
                    self._config.base_url,
                    REFUSED_PROMPTS_TO_WARN,
                )
        return reply

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._transport.close()


def _no_answer(trial: _Trial, finish_reason: str, text: str = "") -> Reply:
    text = text.encode("utf-8", "replace").decode()  # as in `Wire.read`: no table takes half a surrogate pair
    return Reply(key=trial.sent.request.key, text=text, finish_reason=finish_reason, prompt_tokens=0, output_tokens=0, cost=trial.cost)


def open_engine(config: EngineConfig | EndpointConfig, budget: Budget | None = None) -> VllmEngine | EndpointEngine:
    """Start the engine that the settings describe.

    Raises:
        ConfigError, InputError: see the two engines.
    """
    if isinstance(config, EndpointConfig):
        return EndpointEngine(config, budget)
    if budget is not None:
        raise ConfigError("a vLLM engine costs no money: it takes no budget")
    return VllmEngine(config)


def _load_tokenizer(name: str) -> tuple[PlainEncoder, ControlTokens]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(name, weights=False))
    return PlainEncoder(tokenizer), ControlTokens(tokenizer.get_added_vocab())
