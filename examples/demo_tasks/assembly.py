"""From sampled replies to the demo's four pair files and their truth: no model, no clock, every choice by `stable_hash`.

Paper: Sec. 3. The pools stand for the 80K seed set (`seed`), originally human-labelled sources (`unverified`) and all else (`wild`).
Our choice: their sizes, and the noise of their labels. A pair is a passing and a failing reply to one prompt; each reply is used once.
Pairing evens out length inside a kind, as far as the kind lets it, so that neither "the longer reply is better" nor its opposite labels the
pool.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.schema import Verdict, comparison_id, pair_id, stable_hash, stable_uniform

from .kinds import CHECKS, Task

HELD_OUT_POOL = "held_out"


class AssemblyConfig(Settings):
    """Sizes of the pools in pairs, and the exact share of wrong labels in each. Our choice throughout."""

    num_seed: int = Field(default=150, ge=1)
    num_unverified: int = Field(default=300, ge=1)
    num_wild: int = Field(default=500, ge=1)
    num_held_out: int = Field(default=400, ge=1)
    seed_noise: float = Field(default=0.1, ge=0, le=1)  # people verify only a part of it, and a rest without noise would be gold for free
    unverified_noise: float = Field(default=0.1, ge=0, le=1)  # labels of paid annotators are not all right either
    wild_noise: float = Field(default=0.3, ge=0, le=1)
    max_pairs_per_prompt: int = Field(default=3, ge=1)
    seed: int = 20250702  # of every random choice


@dataclass(frozen=True)
class DemoPair:
    """A pair as shipped, and what is known about it: `verdict` says which reply of the shipped pair is better."""

    pool: str
    kind: str
    prompt: str
    chosen: str
    rejected: str
    verdict: Verdict
    slots: Mapping[str, str]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as one user message."""
        return [{"role": "user", "content": self.prompt}]

    @property
    def pair_id(self) -> str:
        """The id that ingest gives the shipped pair."""
        return pair_id(self.messages, self.chosen, self.rejected)

    @property
    def comparison_id(self) -> str:
        """The id that does not depend on the label."""
        return comparison_id(self.messages, self.chosen, self.rejected)


def assemble(tasks: Sequence[Task], samples: Mapping[str, Sequence[str]], config: AssemblyConfig) -> dict[str, list[DemoPair]]:
    """Make the pools seed, unverified, wild and held_out: prompts disjoint, labels flipped as stated, rows in an order that tells nothing.

    Raises:
        InputError: the samples give too few pairs.
    """
    pairs_by_task = _pairs_by_task(tasks, samples, config)
    sizes = {"seed": config.num_seed, "unverified": config.num_unverified, "wild": config.num_wild}
    pools = _deal([task for task in tasks if not task.held_out], pairs_by_task, sizes, config.seed)
    pools |= _deal([task for task in tasks if task.held_out], pairs_by_task, {HELD_OUT_POOL: config.num_held_out}, config.seed)
    noise = {"seed": config.seed_noise, "unverified": config.unverified_noise, "wild": config.wild_noise, HELD_OUT_POOL: 0.0}
    return {name: _in_neutral_order(_flip_exactly(pairs, noise[name], config.seed), config.seed) for name, pairs in pools.items()}


def pass_rates(tasks: Sequence[Task], samples: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return kind -> share of sampled replies that its checker passes."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for task in tasks:
        outcomes[task.kind] += [CHECKS[task.kind](reply, task.slots) for reply in samples.get(task.text, ())]
    return {kind: sum(passed) / len(passed) for kind, passed in outcomes.items() if passed}


def _pairs_by_task(tasks: Sequence[Task], samples: Mapping[str, Sequence[str]], config: AssemblyConfig) -> dict[str, list[DemoPair]]:
    """Pair passing with failing replies, prompt by prompt; `lean` is, per kind and side, shorter winners minus longer winners so far."""
    lean: dict[tuple[str, bool], int] = defaultdict(int)
    pairs: dict[str, list[DemoPair]] = {}
    for task in sorted(tasks, key=lambda task: stable_hash(config.seed, task.text, "task-order")):
        replies = list(dict.fromkeys(samples.get(task.text, ())))
        passing = [reply for reply in replies if CHECKS[task.kind](reply, task.slots)]
        failing = [reply for reply in replies if reply not in passing]
        pairs[task.text] = []
        while passing and failing and len(pairs[task.text]) < config.max_pairs_per_prompt:
            side = (task.kind, task.held_out)
            better, worse = _most_even(passing, failing, lean[side], config.seed)
            passing.remove(better)
            failing.remove(worse)
            lean[side] += _shorter_wins(better, worse)
            pairs[task.text].append(DemoPair("", task.kind, task.text, better, worse, Verdict.CHOSEN, task.slots))
    return pairs


def _shorter_wins(better: str, worse: str) -> int:
    return (len(better) < len(worse)) - (len(better) > len(worse))


def _most_even(passing: Sequence[str], failing: Sequence[str], lean: int, seed: int) -> tuple[str, str]:
    """The combination that brings the lean nearest to zero; chance decides among equals."""
    combinations = [(better, worse) for better in passing for worse in failing]
    return min(combinations, key=lambda pair: (abs(lean + _shorter_wins(*pair)), stable_hash(seed, "\n".join(pair), "pairing")))


def _deal(tasks: Sequence[Task], pairs: Mapping[str, Sequence[DemoPair]], sizes: Mapping[str, int], seed: int) -> dict[str, list[DemoPair]]:
    """Deal whole prompts to the pools until each has its size, kinds in turn; a prompt that would overfill a pool gives fewer pairs."""
    waiting = iter(_kinds_in_turn(tasks, seed))
    pools: dict[str, list[DemoPair]] = {}
    for name, size in sizes.items():
        pool: list[DemoPair] = []
        while len(pool) < size:
            task = next(waiting, None)
            if task is None:
                wanted = f"{sum(sizes.values())} pairs for {', '.join(sizes)}"
                raise InputError(f"expected {wanted}, found too few in the samples; sample more replies or prompts")
            pool += [replace(pair, pool=name) for pair in pairs[task.text][: size - len(pool)]]
        pools[name] = pool
    return pools


def _kinds_in_turn(tasks: Sequence[Task], seed: int) -> list[Task]:
    """Order prompts by chance, but so that every stretch holds all kinds alike."""
    shuffled = sorted(tasks, key=lambda task: stable_hash(seed, task.text, "deal"))
    num_seen: dict[str, int] = defaultdict(int)
    num_of_kind: dict[str, int] = defaultdict(int)
    for task in tasks:
        num_of_kind[task.kind] += 1
    keyed: list[tuple[float, Task]] = []
    for task in shuffled:
        jitter = stable_uniform(seed, task.text, "deal-jitter")
        keyed.append(((num_seen[task.kind] + jitter) / num_of_kind[task.kind], task))
        num_seen[task.kind] += 1
    return [task for _, task in sorted(keyed, key=lambda item: (item[0], item[1].text))]


def _flip_exactly(pairs: Sequence[DemoPair], share: float, seed: int) -> list[DemoPair]:
    """Swap the labels of exactly round(share * P) pairs: those whose comparison has the smallest hashes."""
    ranked = sorted(pairs, key=lambda pair: stable_hash(seed, pair.comparison_id, "label-noise"))
    num_flipped = round(share * len(ranked))
    flipped = [replace(pair, chosen=pair.rejected, rejected=pair.chosen, verdict=Verdict.REJECTED) for pair in ranked[:num_flipped]]
    return flipped + ranked[num_flipped:]


def _in_neutral_order(pairs: Sequence[DemoPair], seed: int) -> list[DemoPair]:
    """Order rows by hashes of the prompt and the comparison, which do not know the label; pairs of one prompt are neighbours, as in public data."""
    by_prompt = {pair.prompt: stable_hash(seed, pair.prompt, "prompt-order") for pair in pairs}
    return sorted(pairs, key=lambda pair: (by_prompt[pair.prompt], stable_hash(seed, pair.comparison_id, "row-order")))
