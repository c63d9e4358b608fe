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
from dataclasses import replace
from typing import Any

from synpref_ray.bundled import digest_model, plain_name, resolve_model
from synpref_ray.errors import ConfigError
from synpref_ray.llm.choices import Watched, normalise_logprobs
from synpref_ray.llm.engine import TOO_LONG, EngineConfig, EngineCounts, EngineDied, ModelIdentity, Reply, Request, engine_environment, take
from synpref_ray.llm.engine_queue import Backlog, Job, Outbox, make_jobs
from synpref_ray.llm.orphans import end_orphans, mark_children
from synpref_ray.llm.tokens import PlainEncoder

logger = logging.getLogger(__name__)


_HELD_TOKENS = 1 << 22  # ours: 150 MB of Python ints, and minutes of work for any engine


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
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._backlog = Backlog(num_requests=2 * config.max_num_seqs, num_tokens=_HELD_TOKENS)  # of the engine's thread
        self._waiting: dict[str, Job] = {}  # what vLLM holds
        self._told_too_long = False
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
        """See `Engine.generate`; may be called by several threads at once. A prompt that does not fit `max_model_len_tokens` with its reply gets a
        reply with the finish reason `TOO_LONG`.

        Raises:
            EngineDied: the engine ended, now or earlier.
        """
        if len({request.key for request in requests}) != len(requests):
            raise ValueError("two requests of one call have the same key")
        outbox: Outbox = queue.SimpleQueue()
        jobs = make_jobs(requests, self._encoder, outbox)
        self._submit([job for job in jobs if job.num_tokens <= self._config.max_model_len_tokens])
        for job in jobs:
            if job.num_tokens > self._config.max_model_len_tokens:
                self._leave_out(job)
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

    def _leave_out(self, job: Job) -> None:
        """Answer a prompt that does not fit."""
        if not self._told_too_long:
            self._told_too_long = True
            logger.warning(
                "%s: a prompt of %s tokens and a reply of %s do not fit max_model_len_tokens=%s; it is left out, like others to come: lower the "
                "step's max_input_tokens or raise max_model_len_tokens",
                *(self._config.model, len(job.tokens), job.max_tokens, self._config.max_model_len_tokens),
            )
        job.outbox.put(Reply(key=job.request.key, text="", finish_reason=TOO_LONG, prompt_tokens=0, output_tokens=0))

    def _submit(self, jobs: list[Job]) -> None:
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
            idle = not self._backlog and not engine.has_unfinished_requests()
            while idle or not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    return
                self._backlog.add(job)
                idle = False
            while (next_job := self._backlog.next()) is not None:
                self._admit(engine, next_job)
            for output in engine.step():  # of finished requests only: see `_sampling`
                self._deliver(output)

    def _admit(self, engine: Any, job: Job) -> None:
        from vllm.inputs.engine import tokens_input

        with self._lock:
            self._next_id += 1
            name = f"{self._next_id}"
            self._waiting[name] = job
        engine.add_request(name, tokens_input(job.tokens.tolist()), _sampling(job, self._config))

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
        self._backlog.finished(job)
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
            waiting = [*self._waiting.values(), *self._backlog.clear()]
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
        distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else "uni",  # a single device needs no process beside the engine's
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


def _sampling(job: Job, config: EngineConfig) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

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
        output_kind=RequestOutputKind.FINAL_ONLY,  # else an object of all tokens so far is made for every request at every step, and thrown away
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
