"""Whether an LLM judge may decide labels: only where it has proved on gold that it beats chance. A small judge may well not.

Our choice: the paper trusts its judges after manual checks (agreement in Table 14). Here every judge first judges working gold, each gold
pair with exemplars of other prompts only (leave-one-out), and the Wilson lower bound of its agreement must lie above chance, overall and in
the pair's category. A prompt counts once there, with the share of its pairs that agree: outcomes of one prompt go together, and people
verify all pairs of a prompt. The bound is taken anew for every category and round, without a correction for asking often.

Chance is 0.5 whatever share of the source labels is right: a judge sees two candidates in both orders and never the label, so one that
guesses agrees with gold half of the time.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import Field

from synpref_ray.config import Settings
from synpref_ray.rules.intervals import wilson_interval
from synpref_ray.rules.votes import VoteRecord, merge_votes
from synpref_ray.schema import Verdict

CHANCE = 0.5


class TrustConfig(Settings):
    """What a judge must show on working gold."""

    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)  # ours: the usual two-sided level; the lower bound alone errs 2.5 % of the time
    min_verdicts: int = Field(
        default=6, ge=1
    )  # ours, of different prompts: Wilson lets 4 of 4 pass, which guessing reaches once in 16; 6 of 6 once in 64
    must_beat_source_label: bool = False  # ours: true also asks the bound to exceed the share of source labels that gold confirms


class AgreementRecord(NamedTuple):
    """One judge on one gold pair: its merged verdict, the human one, and how many of its single answers named the first candidate."""

    category: str | None
    judge_verdict: Verdict
    gold_verdict: Verdict
    num_first_choices: int = 0
    num_choices: int = 0
    prompt_group: str | None = None
    """Pairs of one group count as one in the bound, because they go right or wrong together; None: a group of its own."""


@dataclass(frozen=True)
class Agreement:
    """A judge's record on some gold pairs. `lower_bound` is 0 without a verdict; it counts every prompt with a verdict once, and
    `num_prompts_agreed` is the sum of the shares of each prompt's verdicts that agree.
    """

    num_pairs: int
    num_verdicts: int
    num_prompts: int
    num_agreed: int
    num_prompts_agreed: float
    num_source_agreed: int
    num_choices: int
    num_first_choices: int
    lower_bound: float

    @property
    def agreement(self) -> float | None:
        """Share of its verdicts (abstentions aside) that gold confirms; None without a verdict."""
        return self.num_agreed / self.num_verdicts if self.num_verdicts else None

    @property
    def source_agreement(self) -> float | None:
        """Share of source labels that gold confirms, on all these pairs."""
        return self.num_source_agreed / self.num_pairs if self.num_pairs else None

    @property
    def abstention_share(self) -> float | None:
        """Share of the pairs on which it abstained."""
        return 1 - self.num_verdicts / self.num_pairs if self.num_pairs else None

    @property
    def first_choice_share(self) -> float | None:
        """Share of its readable single answers that named the candidate shown first; 0.5 is no position bias when every pair is shown "
        "both ways."""
        return self.num_first_choices / self.num_choices if self.num_choices else None


@dataclass(frozen=True)
class JudgeTrust:
    """What a judge showed on working gold, and what follows from it."""

    overall: Agreement
    by_category: Mapping[str, Agreement]
    config: TrustConfig

    def decides(self, category: str | None) -> bool:
        """Whether its verdict may decide a pair of this category; never for a category without gold, or for a pair without one."""
        if category is None or category not in self.by_category:
            return False
        passes = [self._beats_chance, *([self._beats_source_label] if self.config.must_beat_source_label else [])]
        return all(test(agreement) for test in passes for agreement in (self.overall, self.by_category[category]))

    @property
    def weight(self) -> float:
        """What its verdicts weigh in a merge by agreement: the log-odds of being right on a prompt of working gold, at least 0.

        Our choice: log-odds make the weighted majority of independent judges the most likely verdict (Nitzan and Paroush 1982); one prompt
        right and one wrong are added, so that few verdicts weigh little.
        """
        right, wrong = self.overall.num_prompts_agreed + 1, self.overall.num_prompts - self.overall.num_prompts_agreed + 1
        return max(0.0, math.log(right / wrong))

    def report(self) -> dict[str, Any]:
        """Return plain values for metrics and reports: the overall record, one per category, and which categories it decides."""
        categories = sorted(self.by_category)
        return {
            "chance": CHANCE,
            "confidence": self.config.confidence,
            "beats_chance_overall": self._beats_chance(self.overall),
            "beats_chance_in": [category for category in categories if self._beats_chance(self.by_category[category])],
            "must_beat_source_label": self.config.must_beat_source_label,
            "beats_source_label_overall": self._beats_source_label(self.overall),
            "weight": self.weight,
            "decides": [category for category in categories if self.decides(category)],
            "overall": _figures(self.overall),
            "by_category": {category: _figures(self.by_category[category]) for category in categories},
        }

    def _beats_chance(self, agreement: Agreement) -> bool:
        return self._passes(agreement, CHANCE)

    def _beats_source_label(self, agreement: Agreement) -> bool:
        return self._passes(agreement, agreement.source_agreement or 0.0)

    def _passes(self, agreement: Agreement, bar: float) -> bool:
        return agreement.num_prompts >= self.config.min_verdicts and agreement.lower_bound > bar


def agreement_record(category: str | None, votes: Iterable[VoteRecord], gold_verdict: Verdict, prompt_group: str | None = None) -> AgreementRecord:
    """Make the record of one judge's votes on one gold pair; a judge without a readable vote abstained."""
    votes = list(votes)
    if len({vote.judge for vote in votes}) > 1:
        raise ValueError("an agreement record is about the votes of one judge")
    first = {0: Verdict.CHOSEN, 1: Verdict.REJECTED}
    choices = [vote for vote in votes if vote.verdict is not Verdict.ABSTAIN]
    num_first = sum(vote.verdict is first[vote.order] for vote in choices)
    return AgreementRecord(category, merge_votes(votes).verdict or Verdict.ABSTAIN, gold_verdict, num_first, len(choices), prompt_group)


def judge_trust(records: Iterable[AgreementRecord], config: TrustConfig | None = None) -> JudgeTrust:
    """Measure one judge against working gold.

    Args:
        records: one per working-gold pair that the judge was asked about, judged leave-one-out.

    Raises:
        ValueError: a gold verdict is an abstention (a pair that a person could not decide is no gold).
    """
    config = config or TrustConfig()
    records = list(records)
    if any(record.gold_verdict is Verdict.ABSTAIN for record in records):
        raise ValueError("a gold verdict cannot be an abstention")
    categories = {record.category for record in records if record.category is not None}
    by_category = {name: _measure([record for record in records if record.category == name], config) for name in sorted(categories)}
    return JudgeTrust(_measure(records, config), by_category, config)


def _measure(records: list[AgreementRecord], config: TrustConfig) -> Agreement:
    verdicts = [record for record in records if record.judge_verdict is not Verdict.ABSTAIN]
    agreed = sum(record.judge_verdict is record.gold_verdict for record in verdicts)
    by_prompt: dict[str | int, list[bool]] = {}
    for number, record in enumerate(verdicts):
        key = record.prompt_group if record.prompt_group is not None else number
        by_prompt.setdefault(key, []).append(record.judge_verdict is record.gold_verdict)
    prompts_agreed = sum(sum(found) / len(found) for found in by_prompt.values())
    return Agreement(
        num_pairs=len(records),
        num_verdicts=len(verdicts),
        num_prompts=len(by_prompt),
        num_agreed=agreed,
        num_prompts_agreed=prompts_agreed,
        num_source_agreed=sum(record.gold_verdict is Verdict.CHOSEN for record in records),
        num_choices=sum(record.num_choices for record in records),
        num_first_choices=sum(record.num_first_choices for record in records),
        lower_bound=wilson_interval(prompts_agreed, len(by_prompt), confidence=config.confidence)[0],
    )


def describe_trust(judge: str, report: Mapping[str, Any]) -> str:
    """Return one line for people: what a judge (its `JudgeTrust.report()`) showed on working gold, which bar it had to pass, where it decides."""
    overall = report["overall"]
    if not overall["num_verdicts"]:
        return f"judge {judge}: no verdict on working gold, so it decides nothing"
    found = f"agrees with working gold on {100 * overall['agreement']:.0f} % of {overall['num_verdicts']} verdicts (lower bound "
    found += f"{100 * overall['lower_bound']:.0f} %, {'above' if report['beats_chance_overall'] else 'not above'} chance)"
    if report["must_beat_source_label"]:
        found += f"; must also beat the source labels ({100 * overall['source_agreement']:.0f} % right on gold)"
    return f"judge {judge}: {found}; decides in: {', '.join(report['decides']) or 'no category, so the stated fallback applies'}"


def describe_doubted(judge: str, report: Mapping[str, Any]) -> str:
    """Return one line for people: what a judge (its `JudgeTrust.report()`) showed on the working gold whose source label the best RM rejects."""
    overall = report["overall"]
    if not overall["num_verdicts"]:
        return f"judge {judge}: no verdict on working gold whose label the best RM rejects, the kind of pairs that it is asked about here"
    bound = f"lower bound {100 * overall['lower_bound']:.0f} %, {'above' if report['beats_chance_overall'] else 'not above'} chance"
    return (
        f"judge {judge}: on working gold whose label the best RM rejects, the kind of pairs that it is asked about here, it agrees on "
        f"{100 * overall['agreement']:.0f} % of {overall['num_verdicts']} verdicts ({bound}); its trust is measured on all working gold"
    )


def _figures(agreement: Agreement) -> dict[str, float | int | None]:
    return {
        "num_pairs": agreement.num_pairs,
        "num_verdicts": agreement.num_verdicts,
        "num_prompts": agreement.num_prompts,
        "agreement": agreement.agreement,
        "lower_bound": agreement.lower_bound,
        "source_agreement": agreement.source_agreement,
        "abstention_share": agreement.abstention_share,
        "first_choice_share": agreement.first_choice_share,
    }
