"""One life of a real vLLM engine, run by test_vllm_engine.py in a process of its own: vLLM changes the process that holds it (threads, …).

Prints one JSON line with what it saw. Argument: `in_process` or `children`.
"""

import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa

from synpref_ray.llm import vllm_engine
from synpref_ray.llm.engine import EngineConfig, EngineDied, Reply, Request
from synpref_ray.llm.journal import Journal
from synpref_ray.llm.judge import JudgeConfig, judge_pairs
from synpref_ray.llm.tagger import ADDS, TaggerConfig, tag_pairs
from synpref_ray.llm.vllm_engine import VllmEngine
from tests.builders import make_pairs
from tests.processes import children_of

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class FolderStorage:
    """Journal objects as files."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write one file."""
        (self._root / path).parent.mkdir(parents=True, exist_ok=True)
        (self._root / path).write_bytes(data)

    def read_bytes(self, path: str) -> bytes:
        """Read one file."""
        return (self._root / path).read_bytes()

    def list_files(self, prefix: str) -> list[str]:
        """Return the files of a folder."""
        return [f"{prefix}/{file.name}" for file in (self._root / prefix).glob("*")]


def engine_children() -> list[int]:
    """Return the processes below this one, but for Python's own resource tracker, which ends with us."""
    return [child.pid for child, command in children_of(psutil.Process()).items() if "resource_tracker" not in command]


def greet(engine: VllmEngine, prompt: str, **settings: object) -> Reply:
    """Send one short request."""
    [reply] = engine.generate([Request.of(prompt, prompt_version="test", **{"max_new_tokens": 8, **settings})])
    return reply


def work(engine: VllmEngine, storage: FolderStorage, seen: dict[str, object]) -> None:
    """Tag one shard and judge another at the same time, then both again."""

    def tag() -> None:
        seen["tags"] = tag_pairs(make_pairs(3), engine, TaggerConfig(), Journal(storage, "journal/00000")).to_pylist()

    def judge() -> None:
        shard = make_pairs(3, "coffee")
        for name in ADDS:
            shard = shard.append_column(name, pa.array(["a"] * 3))
        votes = judge_pairs(
            shard, make_pairs(0), engine, JudgeConfig(judge="smol", guideline="general", max_exemplars=0), Journal(storage, "journal/00001")
        )
        seen["votes"] = votes.to_pylist()

    for run in ("first", "second"):
        threads = [threading.Thread(target=tag), threading.Thread(target=judge)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen[f"sent_after_{run}"] = engine.counts().requests_sent


def die(engine: VllmEngine, in_process: bool) -> str:
    """Break the engine under a waiting caller and return what the caller was told."""

    def strike() -> None:
        time.sleep(1.0)
        if in_process:
            from vllm.v1.engine.llm_engine import LLMEngine

            LLMEngine.step = None
        else:
            for pid in engine_children():
                os.kill(pid, signal.SIGKILL)

    threading.Thread(target=strike).start()
    long = [Request.of(f"Count to {number}:", prompt_version="test", max_new_tokens=1500) for number in range(20)]
    try:
        engine.generate(long)
    except EngineDied as error:
        return str(error)
    return "nothing"


def fits_or_not(engine: VllmEngine) -> list[object]:
    """Ask with the longest prompt that fits with one token of a reply, and with one token more, in one call; return the finish reasons in order."""
    start = greet(engine, " tea", max_new_tokens=1).prompt_tokens - 1  # what the tokenizer puts before a prompt
    prompts = [" tea" * (2047 - start + more) for more in (1, 0)]
    before = engine.counts().requests_sent
    replies = engine.generate([Request.of(prompt, prompt_version="test", max_new_tokens=1) for prompt in prompts])
    return [[reply.finish_reason for reply in replies], [reply.prompt_tokens for reply in replies], engine.counts().requests_sent - before]


def main(mode: str) -> None:
    """Start, work, die, close."""
    in_process = mode == "in_process"
    seen: dict[str, object] = {}
    vllm_engine._HELD_TOKENS = 0  # so that requests wait, as they do behind millions of tokens
    engine = VllmEngine(EngineConfig(model=MODEL, in_process=in_process, kv_cache_bytes=1 << 28, max_num_seqs=8))
    seen["children_while_up"] = len(engine_children())
    if in_process:
        with tempfile.TemporaryDirectory() as folder:
            work(engine, FolderStorage(Path(folder)), seen)
    plain, hostile = (greet(engine, text, max_new_tokens=1).prompt_tokens for text in ("<|im_end|>", "<|im_end|><|im_end|>"))
    seen["hostile_tokens"] = [plain, hostile]
    choice = greet(engine, "Is water wet? 1: yes, 2: no. Answer: ", choices=("1", "2"))
    seen["choice"] = [choice.text, choice.output_tokens, choice.choice_logprobs]
    seen["too_long"] = fits_or_not(engine)
    many = [Request.of("Tea?", prompt_version="test", max_new_tokens=1, sample=sample) for sample in range(40)]
    seen["many"] = len({reply.text for reply in engine.generate(many)})
    seen["told"] = die(engine, in_process)
    try:
        greet(engine, "again")
    except EngineDied:
        seen["stays_dead"] = True
    engine.close()
    engine.close()
    seen["children_after"] = len(engine_children())
    seen["counts"] = engine.counts().__dict__
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
