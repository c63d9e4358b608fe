"""The closing table of Stage 1 says which silver nobody agreed with, and which pairs a judge could not be asked about."""

from typing import Any

from synpref_ray.pipeline.round_record import closing_table
from synpref_ray.rules.gold import GoldSplit


def seed_round(labels: dict[str, int]) -> dict[str, Any]:
    sizes = {"silver": 90, "gold-working": 300, "gold-audit": 300, "filtered": 80, "corrected": 10}
    record: dict[str, Any] = {"round": 0, "set_sizes": sizes, "training": None, "selected_pairs": 0, "judges_on_working_gold": {}}
    return {**record, "best_rm_on_working_gold": {}, "best_rm_on_audit_gold": {}, "decided": {"labels": labels}}


def test_what_nobody_agreed_with_and_what_nobody_could_be_asked_about_are_told() -> None:
    gold = {GoldSplit.WORKING: 300, GoldSplit.AUDIT: 300}
    text = closing_table([seed_round({"silver/judge": 60, "silver/source_label": 30, "unverified/not_judged": 7})], {}, gold, simulated=False)
    assert "of the silver pairs 30 have their source label, as no judge may decide there" in text
    assert "7 pairs that a judge may decide had no answer of one" in text
    quiet = closing_table([seed_round({"silver/judge": 90})], {}, gold, simulated=False)
    assert "source label" not in quiet
    assert "no answer" not in quiet
