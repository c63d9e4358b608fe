"""One cache of rewards for all benchmarks: (model, template, settings, prompt, reply) to reward, kept beside the workspace's tables or in a folder
given.

What is missing becomes a scratch pool of prompts with one reply each, scored by the workers that score pairs; every shard that they finish is a
file of the cache from that moment, whether the run ends or not. So an interrupted evaluation goes on where it stopped, even with other benchmarks,
a second one calls the model for nothing, and no file is ever written twice. What a conversation itself does not allow (it is too long, the template
refuses it) is kept as well; a reply that has no reward for another reason than `FINAL_REASONS` is asked for again by the next run.

Layout: `<cache>/pools/replies-<content>/shard-….parquet` (texts) and `<cache>/pools/replies-<content>/rewards.<model key>/<fp8>/shard-….parquet`.
Our choice throughout; the paper says nothing about it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from synpref_ray.pipeline.scoring import RESULT_SETTINGS, ScoreConfig
from synpref_ray.pipeline.steps import Output, ShardKey, Step, StepInput, run_step
from synpref_ray.reporting.run import Run
from synpref_ray.reward.model import load_tokenizer
from synpref_ray.reward.render import RENDER_VERSION, template_digest
from synpref_ray.reward.reply_scorer import add_reply_rewards
from synpref_ray.reward.scorer import PairScorer
from synpref_ray.schema import REPLY_SCHEMA, SCORES_SCHEMA, DropReason, Message, reply_id
from synpref_ray.tables.models import model_digest, model_folder, pinned_model
from synpref_ray.tables.pools import Pool, commit_pool, content_digest, open_pool, pool_exists, shard_number_of_path, write_pool_shard
from synpref_ray.tables.storage import Storage
from synpref_ray.versions import versions_of

CACHE_VERSION = 1
CACHE_SETTINGS = RESULT_SETTINGS | {"device", "attention", "compile_layers"}
"""Settings that name a way of scoring. Kernels differ in the last digits, so what a CPU computed is not given for a GPU's."""
FINAL_REASONS = frozenset({DropReason.TOO_LONG.value, DropReason.SPECIAL_TOKEN_TEXT.value, DropReason.BAD_ROLE_ORDER.value})
"""Why a conversation has no reward on any machine, today or later."""
REPLIES_PER_SHARD = 1024  # ours: what a kill can lose, a minute or two on a small machine; prompts are not split, so a shard may hold somewhat more


class CachedScore(NamedTuple):
    """The reward of a reply, or the reason why it has none."""

    reward: float | None
    drop_reason: str | None


Conversation = tuple[Sequence[Message], str]
"""A prompt and a reply to it."""


class ScoreCache:
    """The rewards of one model under one way of scoring."""

    def __init__(self, storage: Storage, model: str, config: ScoreConfig):
        """Open the cache for a model, as a user names it.

        Raises:
            InputError: no such model, or it has no tokenizer with a chat template.
        """
        self.storage = storage
        self.model = pinned_model(model)
        self.config = config
        self._settings = {
            "version": CACHE_VERSION,
            "model": model_digest(model),
            "template": template_digest(load_tokenizer(model_folder(self.model, weights=False))),
            **config.model_dump(mode="json", include=CACHE_SETTINGS),
            "render_version": RENDER_VERSION,
            "versions": versions_of("torch", "transformers", "tokenizers"),
        }
        self.key = content_digest(self._settings)[:16]
        self._failures: Counter[str] = Counter()
        self._scores = self._read()

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, name: str) -> CachedScore:
        """Return the score of a reply by its `reply_id`; `fill` it first."""
        return self._scores[name]

    def fill(self, run: Run, conversations: Mapping[str, Conversation], *, replies_per_shard: int = REPLIES_PER_SHARD) -> int:
        """Score what is not there yet, and return how many replies the model was called for.

        Args:
            conversations: by `reply_id`.

        Raises:
            RunConflictError: another driver is scoring the same replies with this model now.
        """
        missing = [(name, *conversations[name]) for name in conversations if name not in self._scores]
        if not missing:
            return 0
        attempt = max(self._failures[name] for name, _, _ in missing)
        pool = _work_pool(self.storage, missing, replies_per_shard, attempt)
        result = run_step(self._step(), [StepInput(pool, ("prompt", "reply"))])
        sidecar = result.sidecars[0][0]
        for shard in pool.shards:
            self._scores.update(_scores_of(sidecar.read(shard.number)))
        run.step("score replies", rows=len(conversations), computed=result.rows_computed, rejected=result.rejected, seconds=result.seconds)
        return result.rows_computed

    def _step(self) -> Step:
        return Step(
            name="score replies",
            version=CACHE_VERSION,
            worker=ReplyScoreWorker,
            outputs=(Output(f"rewards.{self.key}", SCORES_SCHEMA),),
            settings=self._settings,
            worker_arguments=lambda _: {"model": self.model, "config": self.config},
            resources=self.config.resources,
            max_failed_fraction=1.0,  # a reply without a reward is an answer here: it is counted, and wrong
        )

    def _read(self) -> dict[str, CachedScore]:
        """Read every finished shard of this model, of whatever run, sealed or not; of two rewards of a reply the first path's counts.

        A reply that failed without a final reason is missing; how often it did is kept, so that its next attempt has a table of its own.
        """
        wanted = f"/rewards.{self.key}/"
        paths = [path for path in self.storage.list_files("pools") if wanted in path and shard_number_of_path(path) is not None]
        found: dict[str, CachedScore] = {}
        for path in reversed(paths):
            for name, score in _scores_of(self.storage.read_table(path)):
                if score.drop_reason is None or score.drop_reason in FINAL_REASONS:
                    found[name] = score
                else:
                    self._failures[name] += 1
        return found


class ReplyScoreWorker:
    """Loads the model once per actor."""

    def __init__(self, model: str, config: ScoreConfig):
        self._scorer = PairScorer.load(model_folder(model), config)

    def __call__(self, shard: pa.Table, key: ShardKey) -> tuple[pa.Table, Mapping[str, float]]:
        return add_reply_rewards(shard, self._scorer), {"scored_replies": float(shard.num_rows)}


def conversations_of(prompts_and_replies: Iterable[Conversation]) -> dict[str, Conversation]:
    """Return conversations by their `reply_id`, each once."""
    return {reply_id(prompt, reply): (prompt, reply) for prompt, reply in prompts_and_replies}


def _scores_of(table: pa.Table) -> Iterator[tuple[str, CachedScore]]:
    rows = zip(table["pair_id"].to_pylist(), table["reward"].to_pylist(), table["drop_reason"].to_pylist(), strict=True)
    return ((name, CachedScore(reward, reason)) for name, reward, reason in rows)


def _work_pool(storage: Storage, missing: Sequence[tuple[str, Sequence[Message], str]], replies_per_shard: int, attempt: int) -> Pool:
    """Return the pool of these replies, made once per content and attempt; the replies of a prompt stay together, so that they share its tokens."""
    again = [attempt] if attempt else []
    digest = content_digest([CACHE_VERSION, replies_per_shard, [name for name, _, _ in missing], *again])
    name = f"replies-{digest[:16]}"
    if pool_exists(storage, name):
        return open_pool(storage, name)
    by_prompt: dict[str, list[dict[str, object]]] = {}
    for pair_id, prompt, reply in missing:
        by_prompt.setdefault(reply_id(prompt, ""), []).append({"pair_id": pair_id, "prompt": prompt, "reply": reply})
    shards = [
        write_pool_shard(storage, name, number, pa.Table.from_pylist(rows, schema=REPLY_SCHEMA))
        for number, rows in enumerate(_cut(by_prompt.values(), replies_per_shard))
    ]
    return commit_pool(storage, name, digest, shards, {"step": "missing replies"})


def _cut(groups: Iterable[list[dict[str, object]]], size: int) -> Iterator[list[dict[str, object]]]:
    rows: list[dict[str, object]] = []
    for group in groups:
        if rows and len(rows) + len(group) > size:
            yield rows
            rows = []
        rows.extend(group)
    if rows:
        yield rows
