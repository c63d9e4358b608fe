"""What Stage 1 will take, step by step: what `jobs/stage1.py --dry-run` prints before it looks at the inputs."""

from itertools import pairwise

from synpref_ray.pipeline.stage1 import Stage1Config
from synpref_ray.pipeline.step_plan import (
    PoolSize,
    describe_plan,
    embed_work,
    gathered,
    judge_work,
    pool_size,
    score_work,
    tag_work,
    total,
    train_work,
)


def plan_stage1(config: Stage1Config) -> str:
    """Return the steps of Stage 1 with what each takes, as `--dry-run` prints them: rounds at their ceiling (every round retrieves all it may)."""
    plan, rounds = config.plan, config.stop.max_rounds
    sizes = {name: pool_size(config.storage, name, plan) for name in ("seed", "unverified")}
    seed, unverified = sizes.values()
    both = PoolSize(seed.pairs + unverified.pairs, seed.shards + unverified.shards)
    simulated = config.annotator.kind == "simulated"
    gold_by_round = [_planned_gold(config, number) for number in range(rounds + 1)]
    left, selected = unverified.pairs, []
    for _ in range(rounds):
        selected.append(min(left, config.max_pairs_per_round))
        left -= selected[-1]
    looked_at = [seed.pairs + sum(selected[:number]) for number in range(rounds + 1)]
    golds = [gathered(gold, config.gathered_shard_pairs) for gold in gold_by_round]
    new = [seed, *(gathered(count, config.gathered_shard_pairs) for count in selected)]
    verified = [after - before for before, after in pairwise([0, *gold_by_round])]  # of a pool's pairs; judged as gold, not where they stand
    judged = [
        PoolSize(max(pool.pairs - people, 0) + gold.pairs, pool.shards + gold.shards) for pool, people, gold in zip(new, verified, golds, strict=True)
    ]
    works = [*tag_work(config.taggers, both, plan), embed_work(config.embed, both, plan)]
    for judge in config.judges:
        works.append(total([judge_work([judge], size, plan)[0] for size in judged], f"judge ({judge.judge.judge}), seed and {rounds} rounds"))
    silver = [pairs - gold for pairs, gold in zip(looked_at, gold_by_round, strict=True)]
    trained = [train_work(config.train, "", max(pairs, 0), plan) for pairs in silver]
    works.append(total(trained, f"train best RM, {rounds} rounds and the last"))
    works.append(total([score_work(config.score, "", gold, plan, models=1) for gold in golds[:rounds]], f"score gold, {rounds} rounds"))
    works.append(train_work(config.gold_train, "train gold RM", golds[-1].pairs, plan))
    works.append(score_work(config.score, "score gold, final", golds[-1], plan, models=2))
    people = (
        f"{gold_by_round[-1]:,} gold pairs at the end" if gold_by_round[-1] else "gold is not known (`plan.gold_pairs`), so steps on it count nothing"
    )
    return describe_plan(works, sizes, [f"people: {people}{', simulated' if simulated else ''}; shards of a training are its optimizer steps"])


def _planned_gold(config: Stage1Config, number: int) -> int:
    """Return how much gold there is after a round: an annotator's budget, or what the plan states, grown evenly."""
    if config.annotator.kind == "simulated":
        return config.annotator.seed_pairs + number * config.annotator.round_pairs
    return round(config.plan.gold_pairs * (number + 1) / (config.stop.max_rounds + 1))
