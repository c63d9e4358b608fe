"""Replies to the demo's prompts: sampled from SmolLM2-135M-Instruct with vLLM, and kept, so that pairs can be assembled without the model.

The file is JSON lines, gzip-compressed, one line per prompt: {"prompt", "replies"}. A prompt that is already in it is not sampled again.
"""

import gzip
import io
import json
import logging
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import InputError

_ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no child processes, and a start of 11 instead of 40 s
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve each other where the cores are shared: 45 against 168 tokens/s
}

_COARSE = re.compile(r"shit|fuck|bitch|slut|whore|nigg|porn|cunt|\brap(?:e|ed|ing|ist)\b|\bsex|\bnazi|naked|suicid", re.IGNORECASE)

logger = logging.getLogger(__name__)


class SamplingConfig(Settings):
    """How replies are sampled. Our choice throughout: the paper samples none."""

    num_replies: int = Field(default=6, ge=2)
    max_new_tokens: int = Field(default=64, ge=1)  # the demo's pairs must stay short: everything runs on two cores
    temperature: float = 1.0
    top_k: int = 30  # without a cut the tail of a 135M model's distribution turns replies into word salad
    seed: int = 0  # of the engine: a seed per request kills vLLM on CPU
    max_model_len: int = 256
    prompts_per_part: int = Field(default=120, ge=1)  # a killed run loses at most this many


def read_samples(path: Path) -> dict[str, list[str]]:
    """Return prompt -> replies; an absent file is empty.

    Raises:
        InputError: the file is not gzip-compressed JSON lines of prompt and replies.
    """
    if not path.exists():
        return {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        return {str(record["prompt"]): [str(reply) for reply in record["replies"]] for record in records}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        found = type(error).__name__
        raise InputError(f"expected gzip-compressed JSON lines of prompt and replies in {path}, found {found}; name another file") from None


def write_samples(path: Path, samples: dict[str, list[str]]) -> None:
    """Write all samples, sorted by prompt, in one step (temporary file, then rename); equal samples give equal bytes."""
    text = "".join(json.dumps({"prompt": prompt, "replies": samples[prompt]}, ensure_ascii=False) + "\n" for prompt in sorted(samples))
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as compressed:
        compressed.write(text.encode("utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def usable(reply: str) -> bool:
    """Tell whether a reply may be shipped: not empty, no control or replacement characters, every letter Latin, no coarse word."""
    if not reply.strip() or "\ufffd" in reply or _COARSE.search(reply):
        return False
    return all(_plain(character) for character in reply)


def _plain(character: str) -> bool:
    if character.isascii():
        return character.isprintable() or character == "\n"
    return not unicodedata.category(character).startswith("C") and not (character.isalpha() and "LATIN" not in unicodedata.name(character, ""))


def sample_replies(prompts: Sequence[str], model: str, config: SamplingConfig) -> Iterator[dict[str, list[str]]]:
    """Sample `config.num_replies` replies to each prompt, in parts that a caller can store as they come.

    Outer white space is removed and unusable replies are left out.
    """
    for name, value in _ENGINE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams  # heavy, and needed only here

    engine = LLM(model=model, dtype="bfloat16", enforce_eager=True, max_model_len=config.max_model_len, seed=config.seed)
    parameters = SamplingParams(n=config.num_replies, temperature=config.temperature, top_k=config.top_k, max_tokens=config.max_new_tokens)
    for start in range(0, len(prompts), config.prompts_per_part):
        part = prompts[start : start + config.prompts_per_part]
        started = time.monotonic()
        conversations: list[Any] = [[{"role": "user", "content": prompt}] for prompt in part]
        outputs = engine.chat(conversations, parameters, use_tqdm=False)
        seconds = time.monotonic() - started
        num_tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
        done = start + len(part)
        logger.info("sampled %d of %d prompts x %d, %.0f tokens/s", done, len(prompts), config.num_replies, num_tokens / seconds)
        replies = ([choice.text.strip() for choice in output.outputs] for output in outputs)
        yield {prompt: [text for text in texts if usable(text)] for prompt, texts in zip(part, replies, strict=True)}
