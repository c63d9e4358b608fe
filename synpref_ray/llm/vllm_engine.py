"""vLLM as an engine that several threads share, so that it never drains between shards: for tagging and judging (Sec. 3.1 and 3.2).

One thread owns vLLM's `LLMEngine` and steps it; callers queue requests at any time and wait for their own replies.
Our choice: by default the model runs in this very process. vLLM's usual child processes each import vllm again: 26 to 44 s until the engine
is up, against 11 s, and 306 to 512 output tokens/s against 425 to 636 (SmolLM2-135M, 2-core VM, 2026-11-21); and a killed worker leaves
nothing behind. `in_process=false` puts the engine into children (needed for tensor parallelism; lets scheduling overlap with a GPU); they
outlive a parent that is killed with SIGKILL, so the next engine on the host ends them first (`orphans.py`).
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from synpref_ray.bundled import digest_model, plain_name, resolve_model
from synpref_ray.errors import ConfigError
from synpref_ray.llm.choices import Watched, normalise_logprobs, watched_tokens
from synpref_ray.llm.engine import EngineConfig, EngineCounts, EngineDied, ModelIdentity, Reply, Request, engine_environment, take
from synpref_ray.llm.orphans import end_orphans, mark_children
from synpref_ray.llm.tokens import PlainEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    request: Request
    tokens: list[int]
    outbox: "queue.SimpleQueue[Reply | str]"  # the reply, or why there will be none
    max_tokens: int
    watched: Watched | None  # where the choices first differ


class VllmEngine:
    """A running vLLM engine. Start one per process; `close` it when done (it is a context manager too).

    Raises:
        InputError: the model cannot be found.
        ConfigError: a GPU is asked of a CPU build of vLLM, or the other way round.
    """

    def __init__(self, config: EngineConfig) -> None:
        started = time.monotonic()
        self._config = config
        self._model_dir = str(resolve_model(config.model))
        _set_environment(config)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: dict[str, _Job] = {}
        self._next_id = 0
        self._end: str | None = None  # why the engine ended
        self._lock = threading.Lock()  # guards _waiting, _next_id, _end, _counts
        self._counts = EngineCounts(requests_sent=0, replies=0, prompt_tokens=0, cached_prompt_tokens=0, output_tokens=0, start_seconds=0.0)
        self._encoder: PlainEncoder
        self._start_error: BaseException | None = None
        self._up = threading.Event()
        # A daemon: a process that exits without close() must not wait for an idle engine.
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()
        self._up.wait()
        if self._start_error is not None:
            self._thread.join()
            raise self._start_error
        seconds = time.monotonic() - started
        self._counts = replace(self._counts, start_seconds=seconds)
        logger.info("vLLM engine up: %s on %s, %s, in_process=%s, %.1f s", config.model, config.device, config.dtype, config.in_process, seconds)

    def __enter__(self) -> "VllmEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[Reply], None] | None = None, on_idle: Callable[[], None] | None = None
    ) -> list[Reply]:
        """See `Engine.generate`; may be called by several threads at once.

        Raises:
            ConfigError: a prompt and its reply do not fit `max_model_len_tokens`; nothing is sent then.
            EngineDied: the engine ended, now or earlier.
        """
        outbox: queue.SimpleQueue[Reply | str] = queue.SimpleQueue()
        jobs = [self._job(request, outbox) for request in requests]
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests of one call have the same key")
        self._submit(jobs)
        replies: dict[str, Reply] = {}
        for _ in jobs:
            reply = take(outbox, on_idle)
            if isinstance(reply, str):
                raise EngineDied(reply)
            replies[reply.key] = reply
            if on_finished is not None:
                on_finished(reply)
        return [replies[request.key] for request in requests]

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of `text`, as plain data, with this model's tokenizer."""
        return len(self._encoder.encode_text(text))

    def counts(self) -> EngineCounts:
        """Return the totals since the start, from all threads."""
        with self._lock:
            return self._counts

    def identity(self) -> ModelIdentity:
        """Return the configured model and the digest of its folder."""
        return ModelIdentity(model=plain_name(self._config.model), revision=digest_model(self._config.model))

    def close(self) -> None:
        """End the engine and its child processes, if any; whoever still waits gets `EngineDied`. May be called twice."""
        self._jobs.put(None)
        self._thread.join()

    def _job(self, request: Request, outbox: "queue.SimpleQueue[Reply | str]") -> _Job:
        tokens = self._encoder.encode_request(request)
        if len(tokens) + request.max_new_tokens > self._config.max_model_len_tokens:
            raise ConfigError(
                f"a prompt of {len(tokens)} tokens and a reply of {request.max_new_tokens} do not fit the engine's max_model_len_tokens="
                f"{self._config.max_model_len_tokens}: lower the step's max_input_tokens or raise max_model_len_tokens"
            )
        if request.choices is None:
            return _Job(request, tokens, outbox, request.max_new_tokens, None)
        choices = [self._encoder.encode_text(choice) for choice in request.choices]
        # The last token of the longest choice ends the reply; waiting for an end-of-text token would cost every vote one more forward pass.
        return _Job(request, tokens, outbox, min(request.max_new_tokens, max(map(len, choices))), watched_tokens(choices))

    def _submit(self, jobs: list[_Job]) -> None:
        with self._lock:
            if self._end is not None:
                raise EngineDied(self._end)
            for job in jobs:
                self._jobs.put(job)
            self._counts = replace(self._counts, requests_sent=self._counts.requests_sent + len(jobs))

    def _run(self) -> None:
        """Start vLLM, serve until closed, and tell every waiting caller when the end comes, whatever it was."""
        reason = "the engine was closed"
        try:
            engine, self._encoder = _start(self._config, self._model_dir)
            self._up.set()
            self._serve(engine)
            _stop(engine)
        except BaseException as error:
            reason = f"the vLLM engine died of {type(error).__name__}; its log has the cause. Replace this worker process"
            if not self._up.is_set():
                self._start_error = error
                return
            raise
        finally:
            self._announce_end(reason)
            self._up.set()

    def _serve(self, engine: Any) -> None:
        while True:
            idle = not engine.has_unfinished_requests()
            while idle or not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    return
                self._admit(engine, job)
                idle = False
            for output in engine.step():
                if output.finished:
                    self._deliver(output)

    def _admit(self, engine: Any, job: _Job) -> None:
        from vllm.inputs.engine import tokens_input

        with self._lock:
            self._next_id += 1
            name = f"{self._next_id}"
            self._waiting[name] = job
        engine.add_request(name, tokens_input(job.tokens), _sampling(job, self._config))

    def _deliver(self, output: Any) -> None:
        completion = output.outputs[0]
        with self._lock:
            job = self._waiting.pop(output.request_id)
            self._counts = replace(
                self._counts,
                replies=self._counts.replies + 1,
                prompt_tokens=self._counts.prompt_tokens + len(job.tokens),
                cached_prompt_tokens=self._counts.cached_prompt_tokens + (output.num_cached_tokens or 0),
                output_tokens=self._counts.output_tokens + len(completion.token_ids),
            )
        reply = Reply(
            key=job.request.key,
            text=completion.text,
            finish_reason=completion.finish_reason or "unknown",
            prompt_tokens=len(job.tokens),
            output_tokens=len(completion.token_ids),
            choice_logprobs=_choice_logprobs(job.watched, completion),
        )
        job.outbox.put(reply)

    def _announce_end(self, reason: str) -> None:
        with self._lock:
            self._end = reason
            waiting = list(self._waiting.values())
            self._waiting.clear()
            while not self._jobs.empty():
                job = self._jobs.get()
                if job is not None:
                    waiting.append(job)
            for job in waiting:
                job.outbox.put(reason)


def _set_environment(config: EngineConfig) -> None:
    wanted = engine_environment(config)
    if "torch" in sys.modules and os.environ.get("OMP_WAIT_POLICY") != wanted.get("OMP_WAIT_POLICY"):
        logger.warning("torch was imported before the engine's environment was set: start the process with engine_environment() for full speed")
    os.environ.update(wanted)
    if not config.in_process:
        end_orphans()
        mark_children()


def _start(config: EngineConfig, model_dir: str) -> tuple[Any, PlainEncoder]:
    import torch
    from transformers import AutoTokenizer
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    if current_platform.is_cpu() != (config.device == "cpu"):
        found = current_platform.device_type
        raise ConfigError(f"engine device={config.device}, but the installed vLLM runs on {found}: install the other build or change the setting")
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads)
        memory: dict[str, Any] = {"kv_cache_memory_bytes": config.kv_cache_bytes}
    else:
        memory = {"gpu_memory_utilization": config.gpu_memory_share}
    arguments = EngineArgs(
        model=model_dir,
        dtype=config.dtype,
        max_model_len=config.max_model_len_tokens,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_batched_tokens,
        enforce_eager=config.enforce_eager,
        tensor_parallel_size=config.tensor_parallel_size,
        distributed_executor_backend="uni" if config.in_process else "mp",
        enable_prefix_caching=config.prefix_caching,
        generation_config="vllm",  # the checkpoint's own sampling defaults must not creep in
        structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        seed=config.seed,
        disable_log_stats=True,
        **memory,
    )
    engine = LLMEngine.from_engine_args(arguments)
    if not config.in_process:
        threading.Thread(target=_wake_on_death, args=(engine.engine_core,), name="vllm-watch", daemon=True).start()
    return engine, PlainEncoder(AutoTokenizer.from_pretrained(model_dir))  # not the engine's own: it detokenises in another thread


def _wake_on_death(core: Any) -> None:
    """End the engine thread's wait when its child process was killed: vLLM 0.32 notes the death, but its blocking client waits on."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while not core.resources.engine_dead:  # set by a close, too
        time.sleep(1.0)
    core.outputs_queue.put_nowait(EngineDeadError())


def _stop(engine: Any) -> None:
    engine.renderer.shutdown()
    engine.engine_core.shutdown()


def _sampling(job: _Job, config: EngineConfig) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    request = job.request
    guided = None
    if request.choices is not None:
        guided = StructuredOutputsParams(choice=list(request.choices))
    elif request.json_schema is not None:
        guided = StructuredOutputsParams(json=dict(request.json_schema))
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=job.max_tokens,
        structured_outputs=guided,
        logprob_token_ids=list(job.watched[1]) if job.watched is not None else None,
        seed=int(request.key[:8], 16) if config.seed_requests else None,
    )


def _choice_logprobs(watched: Watched | None, completion: Any) -> tuple[float, ...] | None:
    """Normalise the log-probabilities of the tokens that tell the choices apart; None when the reply went another way."""
    if watched is None or not completion.logprobs or len(completion.logprobs) <= watched[0]:
        return None
    position, tokens = watched
    table = completion.logprobs[position]
    if completion.token_ids[position] not in tokens or any(token not in table for token in tokens):
        return None
    return normalise_logprobs([table[token].logprob for token in tokens])
