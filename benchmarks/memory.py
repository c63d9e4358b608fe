"""Host memory of scoring at two sizes of pool: it must not grow with the number of pairs.

    python -m benchmarks.memory --out memory.json

For each size a fresh process makes a workspace with a pool of synthetic conversations, as long as those of hh_rlhf, and a random two-layer reward
model with SmolLM2's tokenizer, starts a local Ray and runs the pipeline's own scoring step over the pool with one worker. Measured is the greatest
resident memory of the worker's process and of the driver's, as the kernel records it. Of this, "shared" is what is mapped from Ray's object store,
which has a fixed size and is counted once in each process that has touched it; the gates are on the whole.

The model is tiny because its weights are not the question; the figures say nothing about speed.
"""

import json
import multiprocessing
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import psutil
import pyarrow as pa
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks._common import Gate, finish, machine, mib, parser, status_bytes, table
from synpref_ray.bundled import resolve_model
from synpref_ray.pipeline.cluster import RayConfig, ray_session
from synpref_ray.pipeline.scoring import ScoreConfig, score_pools
from synpref_ray.reporting.run import Run
from synpref_ray.reward.model import load_tokenizer, save_reward_model
from synpref_ray.reward.render import choose_pad_token
from synpref_ray.schema import POOL_SCHEMA, comparison_id, pair_id, prompt_group
from synpref_ray.tables.pools import Shard, commit_pool, open_pool, write_pool_shard
from synpref_ray.tables.storage import Storage

POOL = "synthetic"
TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
POLL_SECONDS = 0.25
# Mean and deviation of the logarithm. A random word is 2.9 tokens, so that prompts and replies are as long as those of hh_rlhf on average.
WORDS_OF_PROMPT, WORDS_OF_REPLY = (3.2, 0.9), (2.3, 0.85)
FIGURES = ("VmHWM", "RssAnon", "RssFile", "RssShmem")


class Watcher(threading.Thread):
    """Keeps the greatest memory figures of the driver and of each of Ray's workers (all are descendants of this process)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, dict[str, int]] = {}
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._look("driver", psutil.Process().pid)
            for process in psutil.Process().children(recursive=True):
                try:
                    title = (process.cmdline() or [""])[0]
                except (psutil.NoSuchProcess, psutil.ZombieProcess):
                    continue
                if title.startswith("ray::") and "IDLE" not in title:
                    self._look(f"{title.split('.')[0]} {process.pid}", process.pid)

    def stop(self) -> None:
        """Stop looking and wait for the last look."""
        self._done.set()
        self.join()

    def _look(self, name: str, pid: int) -> None:
        peaks = self.peaks.setdefault(name, dict.fromkeys(FIGURES, 0))
        for figure in FIGURES:
            peaks[figure] = max(peaks[figure], status_bytes(pid, figure) or 0)


def make_inputs(storage: Storage, model: str, num_pairs: int, pairs_per_shard: int) -> None:
    """Write the model and a pool of synthetic pairs, shard by shard."""
    make_model(model)
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 7))) for _ in range(2000)]
    words = [chance.choice(vocabulary) for _ in range(200_000)]

    def text(mean: float, deviation: float) -> str:
        count = min(2000, max(1, round(chance.lognormvariate(mean, deviation))))
        start = chance.randrange(len(words) - count)
        return " ".join(words[start : start + count])

    shards: list[Shard] = []
    for number, first in enumerate(range(0, num_pairs, pairs_per_shard)):
        rows = []
        for index in range(first, min(num_pairs, first + pairs_per_shard)):
            prompt = [{"role": "user", "content": text(*WORDS_OF_PROMPT)}]
            chosen, rejected = text(*WORDS_OF_REPLY), text(*WORDS_OF_REPLY)
            ids = {"pair_id": pair_id(prompt, chosen, rejected), "comparison_id": comparison_id(prompt, chosen, rejected)}
            rest = {"prompt_group": prompt_group(prompt), "source": "synthetic", "source_id": str(index), "contradicted": False}
            rows.append({**ids, **rest, "prompt": prompt, "chosen": chosen, "rejected": rejected})
        shards.append(write_pool_shard(storage, POOL, number, pa.Table.from_pylist(rows, schema=POOL_SCHEMA)))
    commit_pool(storage, POOL, "synthetic", shards, {})


def make_model(folder: str) -> None:
    """Write a random two-layer reward model with a real tokenizer and chat template."""
    tokenizer = load_tokenizer(resolve_model(TOKENIZER))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        pad_token_id=choose_pad_token(tokenizer),
    )
    config.num_labels = 1
    save_reward_model(LlamaForSequenceClassification(config), tokenizer, folder, dtype="float32")  # type: ignore[no-untyped-call]


def score_once(num_pairs: int, pairs_per_shard: int, threads: int) -> dict[str, Any]:
    """Make the pool, score it over Ray in this process and its workers, and return the peaks; for a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        storage, model, config = Storage(f"{folder}/workspace"), f"{folder}/model", ScoreConfig(num_threads=threads)
        making = multiprocessing.get_context("spawn").Process(target=make_inputs, args=(storage, model, num_pairs, pairs_per_shard))
        making.start()  # elsewhere, so that this process, the driver, holds nothing of it
        making.join()
        pool = open_pool(storage, POOL)
        with ray_session(RayConfig(dashboard=False), storage):
            watcher = Watcher()
            watcher.start()
            result = score_pools(Run(storage, "score", config), "score", [pool], {"best": model}, config)
            watcher.stop()
        rewards = result.sidecars[0][0].read_all(["reward_chosen"])
        missing = num_pairs - len(rewards) + rewards["reward_chosen"].null_count
    workers = {name: peaks for name, peaks in watcher.peaks.items() if name.startswith("ray::MapWorker")}
    peaks = {"driver": watcher.peaks["driver"], "worker": max(workers.values(), key=lambda peaks: peaks["VmHWM"], default=dict.fromkeys(FIGURES, 0))}
    return {"num_pairs": num_pairs, "seconds": result.seconds, "pairs_without_reward": missing, "peaks": peaks, "all_processes": watcher.peaks}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's text."""
    made = parser(__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--pairs", default="10000,200000", help="sizes of the pool, by comma; the last is compared with the first")
    made.add_argument("--pairs-per-shard", type=int, default=2048, help="so that the smallest pool, too, has more shards than are in flight")
    made.add_argument("--threads", type=int, default=1, help="torch threads of the worker")
    made.add_argument("--one", type=int, help="measure this size in this process and print JSON; what the benchmark runs for each size")
    arguments = made.parse_args(argv)
    if arguments.one is not None:
        print(json.dumps(score_once(arguments.one, arguments.pairs_per_shard, arguments.threads)))
        return 0
    described = machine()
    results = []
    for size in arguments.pairs.split(","):
        options = ["--one", size, "--pairs-per-shard", str(arguments.pairs_per_shard), "--threads", str(arguments.threads)]
        done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *options], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            print(f"error: scoring {size} pairs ended with exit code {done.returncode}", file=sys.stderr)
            return 1
        results.append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for one in results:
        for process, peaks in one["peaks"].items():
            shared = peaks["RssShmem"]
            rows.append([str(one["num_pairs"]), process, mib(peaks["VmHWM"]), mib(shared), mib(peaks["RssAnon"]), f"{one['seconds']:.0f}"])
    print("\n" + table(["pairs", "process", "peak RSS MiB", "of which shared, at most", "private, at most", "seconds of the step"], rows))
    gates, wrong = [], [f"{one['pairs_without_reward']} of {one['num_pairs']} pairs have no reward" for one in results if one["pairs_without_reward"]]
    for process in ("worker", "driver"):
        first, last = results[0]["peaks"][process]["VmHWM"], results[-1]["peaks"][process]["VmHWM"]
        if not first or not last:
            wrong.append(f"the {process}'s process was not found among this process's descendants")
            continue
        gates.append(
            Gate(f"scorer's {process}: peak RSS at {results[-1]['num_pairs']} / at {results[0]['num_pairs']} pairs", last / first, 1.1, most=True)
        )
    return finish("memory", {"machine": described, "scorer": results}, gates, wrong, arguments)


if __name__ == "__main__":
    sys.exit(main())
