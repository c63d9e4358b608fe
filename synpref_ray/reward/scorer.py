"""Rewards for pairs: the scoring core, one process, no Ray. Serves Stage 1 (Sec. 3.2), Stage 2's two filters (Sec. 3.3) and evaluation.

Shape legend: P pairs, G groups (one prompt each), S sequences.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import PositiveInt

from synpref_ray.bundled import resolve_model
from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.reward.attention import AttentionWay
from synpref_ray.reward.memory import MemoryLimit
from synpref_ray.reward.model import RewardModule, load_backbone_with_head, load_tokenizer
from synpref_ray.reward.packing import Group, PackingStats, batch_tokens, pack, packing_stats, plan_batches, split_replies
from synpref_ray.reward.pair_groups import group_pairs, prompt_keys
from synpref_ray.reward.render import OverLong, RenderedPairs, render_pairs, render_replies, template_digest
from synpref_ray.schema import REWARDS_SCHEMA, DropReason, Message, Role, pair_id

logger = logging.getLogger(__name__)

RECORD_FILE = "training_record.json"
Rewards = npt.NDArray[np.float32]


class ScorerConfig(Settings):
    """How to run a reward model."""

    dtype: Literal["checkpoint", "float32", "bfloat16"] = "checkpoint"
    """What the backbone computes in; "checkpoint" is what the model's config says. The head is float32 always."""
    max_tokens_per_batch: PositiveInt = 2048
    """Tokens of a micro-batch, padding included. Ours: enough for 2 CPU cores; 16,384 and more on a GPU."""
    max_length_tokens: PositiveInt = 16_384  # App. E
    """A pair with a longer conversation gets no reward and the reason too_long, or is shortened by whole turns; no message is cut."""
    over_long: OverLong = "reject"
    """What becomes of those: `reject`, or `drop_oldest_turns` of both sides until the longer one fits. Ours: the paper does not say."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model runs."""
    num_threads: PositiveInt = 2
    """CPU threads of this process. Ours: the laptop of the demo."""
    attention: AttentionWay = "auto"
    """How to attend; auto: blocks on a CPU, the fastest one on a GPU, measured there (`attention`)."""
    compile_layers: bool = False
    """Run norms and MLPs through torch.compile, after the seconds that it takes; its gain is not measured yet. Ours."""


_DEFAULT = ScorerConfig()


class PairScorer:
    """A loaded reward model that scores shards."""

    def __init__(self, module: RewardModule, tokenizer: Any, config: ScorerConfig):
        self.module = module
        self.tokenizer = tokenizer
        self.config = config
        self.template_digest = template_digest(tokenizer)
        self.memory = MemoryLimit()
        self._counted: Counter[str] = Counter()

    @classmethod
    def load(cls, model: str, config: ScorerConfig = _DEFAULT) -> "PairScorer":
        """Load the model: a folder of a reward model, or its name on the hub.

        Raises:
            InputError: no such model, no reward head, no chat template, or another template than the one the model was trained with.
            ConfigError: a GPU is asked for and there is none.
        """
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, but this process sees no GPU; set device=cpu or run where there is one")
        start = time.perf_counter()
        if config.device == "cpu":
            torch.set_num_threads(config.num_threads)
        folder = resolve_model(model)
        tokenizer = load_tokenizer(folder)
        loaded = load_backbone_with_head(folder, config.dtype)
        module = RewardModule(loaded.to(config.device), attention=config.attention).eval()
        if config.compile_layers:
            module.compile_layers()
        scorer = cls(module, tokenizer, config)
        _check_template(folder, scorer.template_digest)
        logger.info("reward model %s on %s in %s, %.1f s", model, config.device, loaded.dtype, time.perf_counter() - start)
        return scorer

    def take_counters(self) -> dict[str, float]:
        """Return what was counted since the last call: shortened pairs, micro-batches that did not fit in memory (`halved_batches`, if any), and
        tokens as `PackingStats.counters` names them.
        """
        counted, self._counted = self._counted, Counter()
        if self.memory.num_halved:
            counted["halved_batches"], self.memory.num_halved = self.memory.num_halved, 0
        return dict(counted)

    def render(self, shard: pa.Table) -> RenderedPairs:
        """Tokenise a shard; over-long and refused pairs are marked, shortened ones counted."""
        rendered = render_pairs(self.tokenizer, shard, self.config.max_length_tokens, self.config.over_long)
        self._counted["shortened_pairs"] += len(rendered.shortened)
        return rendered

    def score_rendered(self, rendered: RenderedPairs, keys: Sequence[str]) -> Rewards:
        """Return the rewards of (chosen, rejected), shape (P, 2), raw logits, NaN for pairs with a drop reason.

        Args:
            keys: for every pair the key of its prompt (`pair_groups.prompt_keys`): replies to one prompt share rows, and identical ones are
                scored once.
        """
        rewards = np.full((len(rendered), 2), np.nan, dtype=np.float32)
        pairs = {i: rendered.sequences(i) for i in rendered.usable()}
        groups = group_pairs(pairs, keys, self.module.row_layout(self.config.max_tokens_per_batch))
        scored = score_groups(self.module, [group.group for group in groups], self.config.max_tokens_per_batch, self._count, self.memory)
        for group, values in zip(groups, scored, strict=True):
            rewards[list(group.pairs)] = np.stack([values[list(group.chosen)], values[list(group.rejected)]], axis=1)
        return rewards

    def score_replies(self, prompt: Sequence[Message], replies: Sequence[str]) -> Rewards:
        """Return the rewards of any number of replies to one prompt, in their order.

        Identical ones are scored once, and no micro-batch grows with their number: more than fit `max_tokens_per_batch` repeat the prompt.

        Raises:
            InputError: a conversation exceeds `max_length_tokens`.
        """
        rendered = render_replies(self.tokenizer, prompt, replies, self.config.max_length_tokens, self.config.over_long)
        different = list(dict.fromkeys(tuple(sequence) for sequence in rendered))
        places = {sequence: place for place, sequence in enumerate(different)}
        budget = self.config.max_tokens_per_batch
        groups = split_replies([np.asarray(sequence, dtype=np.int32) for sequence in different], self.module.row_layout(budget))
        rewards = np.concatenate([np.zeros(0, dtype=np.float32), *score_groups(self.module, groups, budget, None, self.memory)])
        of_replies: Rewards = rewards[np.asarray([places[tuple(sequence)] for sequence in rendered], dtype=np.int64)]
        return of_replies

    def _count(self, stats: PackingStats) -> None:
        self._counted.update(stats.counters())


def score_groups(
    module: RewardModule,
    groups: Sequence[Group],
    max_tokens_per_batch: int,
    count: Callable[[PackingStats], None] | None = None,
    memory: MemoryLimit | None = None,
) -> list[Rewards]:
    """Return for each group the rewards of its sequences, in order; `count` is told how the tokens were packed.

    A micro-batch that does not fit in memory is halved; `memory` remembers from call to call what did not fit.
    """
    rewards: list[Rewards] = [np.zeros(0, dtype=np.float32)] * len(groups)
    device = next(module.parameters()).device
    plan = plan_batches(groups, max_tokens_per_batch)
    start = time.perf_counter()

    def forward(batch: Sequence[int]) -> torch.Tensor:
        rewards_of_batch: torch.Tensor = module(pack([groups[i] for i in batch]).to(device))
        return rewards_of_batch

    with torch.inference_mode():
        outputs = list((memory or MemoryLimit()).run(plan, lambda batch: batch_tokens(groups[i] for i in batch), forward))
    for batch, output in outputs:
        values = iter(output.cpu().numpy())
        for i in batch:
            rewards[i] = np.fromiter(values, dtype=np.float32, count=len(groups[i].sequences))
    stats = packing_stats(groups, [batch for batch, _ in outputs])
    _log_speed(stats, len(groups), time.perf_counter() - start)
    if count is not None:
        count(stats)
    return rewards


def add_rewards(shard: pa.Table, scorer: PairScorer) -> pa.Table:
    """Score a shard: rows and order unchanged, nulls and a drop_reason where there is no reward (REWARDS_SCHEMA)."""
    return add_rewards_of_all(shard, [scorer])[0]


def add_rewards_of_all(shard: pa.Table, scorers: Sequence[PairScorer]) -> list[pa.Table]:
    """Score a shard with several models, tokenised once for those that read the same tokens (Stage 2's best RM and gold RM, Sec. 3.3)."""
    rendered: dict[tuple[str, int, str], RenderedPairs] = {}
    keys = prompt_keys(shard["prompt"]) if "prompt" in shard.column_names else []
    tables = []
    for scorer in scorers:
        key = (scorer.template_digest, scorer.config.max_length_tokens, scorer.config.over_long)
        if key not in rendered:
            rendered[key] = scorer.render(shard)
        tables.append(_rewards_table(rendered[key], scorer.score_rendered(rendered[key], keys)))
    return tables


class RewardModel:
    """The public face: `RewardModel.load(folder).score(pairs)`."""

    def __init__(self, scorer: PairScorer):
        self._scorer = scorer

    @classmethod
    def load(cls, model: str, **settings: Any) -> "RewardModel":
        """Load a reward model's folder; `settings` are the other fields of `ScorerConfig`."""
        return cls(PairScorer.load(str(model), ScorerConfig(**settings)))

    def score(self, pairs: pa.Table | Sequence[Mapping[str, Any]]) -> pa.Table:
        """Score pairs with `prompt` (text or messages), `chosen` and `rejected`, order kept; `pair_id` is computed where absent.

        Returns:
            A table of schema REWARDS_SCHEMA.
        """
        rows = pairs.to_pylist() if isinstance(pairs, pa.Table) else [dict(row) for row in pairs]
        for row in rows:
            if missing := [name for name in ("prompt", "chosen", "rejected") if row.get(name) is None]:
                raise InputError(f"a pair needs prompt, chosen and rejected; missing: {', '.join(missing)}")
            if isinstance(row["prompt"], str):
                row["prompt"] = [{"role": Role.USER.value, "content": row["prompt"]}]
            row.setdefault("pair_id", pair_id(row["prompt"], row["chosen"], row["rejected"]))
        columns = {name: [row[name] for row in rows] for name in ("pair_id", "prompt", "chosen", "rejected")}
        return add_rewards(pa.table(columns), self._scorer)

    def score_replies(self, prompt: str | Sequence[Message], replies: Sequence[str]) -> list[float]:
        """Return the rewards of several replies to one prompt."""
        messages = [{"role": Role.USER.value, "content": prompt}] if isinstance(prompt, str) else prompt
        return [float(reward) for reward in self._scorer.score_replies(messages, replies)]


def _rewards_table(rendered: RenderedPairs, rewards: Rewards) -> pa.Table:
    finite = np.isfinite(rewards[:, 0]) & np.isfinite(rewards[:, 1])
    default = [None if ok else DropReason.NON_FINITE_REWARD.value for ok in finite.tolist()]
    reasons = [reason or other for reason, other in zip(rendered.drop_reasons, default, strict=True)]
    margin = np.where(finite, rewards[:, 0] - rewards[:, 1], np.float32(0.0)).astype(np.float32)
    p_chosen = 1.0 / (1.0 + np.exp(-np.clip(margin.astype(np.float64), -700.0, 700.0)))
    columns = [rewards[:, 0], rewards[:, 1], margin, p_chosen.astype(np.float32)]
    arrays = [pa.array(column, pa.float32(), mask=~finite) for column in columns]
    return pa.table([pa.array(rendered.pair_ids, pa.string()), *arrays, pa.array(reasons, pa.string())], schema=REWARDS_SCHEMA)


def _check_template(model: str, digest: str) -> None:
    """Refuse to score with another template or tokenizer than the one a model was trained with; models of others carry no record."""
    file = Path(model) / RECORD_FILE
    if not file.is_file():
        return
    trained = json.loads(file.read_text(encoding="utf-8")).get("template_digest")
    if trained is not None and trained != digest:
        found = f"{digest[:12]}, trained with {trained[:12]}"
        raise InputError(f"the tokenizer or chat template in {model} is not the one the model was trained with ({found})")


def _log_speed(stats: PackingStats, num_groups: int, seconds: float) -> None:
    logger.info(
        "%d prompts, %d unique tokens in %.2f s (%.0f/s), padding %.3f, shared %.3f",
        num_groups, stats.unique_tokens, seconds, stats.unique_tokens / max(seconds, 1e-9), stats.padding_fraction, stats.shared_fraction,
    )  # fmt: skip
