"""The card of an exported data set: README.md with the front matter that `datasets` and the hub read, counts and histograms for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from synpref_ray.reporting.histograms import format_histogram, length_bars

UNKNOWN = "unknown"
MIN_LANGUAGE_SHARE = 0.01  # ours: short prompts are guesses, and a card that names fifty languages says nothing
_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
    (100_000_000, "10M<n<100M"),
)


@dataclass(frozen=True)
class CardFacts:
    """A title, and the record of an export (`pipeline/export.py`)."""

    title: str
    record: Mapping[str, Any]


def dataset_card(facts: CardFacts) -> str:
    """Return the card's text."""
    record = facts.record
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)}---",
        f"# {facts.title}",
        "Preference pairs: `prompt` (messages), `chosen` and `rejected` (one assistant message each; `chosen` is the preferred reply, and `flipped` "
        "says that the source had it the other way round). "
        f"{record['pairs']} pairs, {record['flipped']} of them flipped; the set `{record['set']}` of a synpref_ray workspace (arXiv 2507.01352).",
    ]
    if record["simulated_gold"]:
        parts.append("**The human labels behind this set are SIMULATED** (an annotator that reads known truth): it is a trial, not data to train on.")
    filters = [
        *(f"`{name}` is {' or '.join(values)}" for name, values in record.get("where", {}).items()),
        *(f"`{name}` is at least {bound:g}" for name, bound in record.get("at_least", {}).items()),
        *(f"`{name}` is at most {bound:g}" for name, bound in record.get("at_most", {}).items()),
    ]
    if filters:
        parts.append(f"Of that set, the pairs of which {', and '.join(filters)}.")
    parts.append(
        "`datasets.load_dataset` reads this folder; TRL's `RewardTrainer` takes it as it is, and OpenRLHF's `train_rm` with `--prompt_key prompt "
        "--chosen_key chosen --rejected_key rejected --apply_chat_template`."
    )
    for title, counts in (
        ("Licences", "licences"),
        ("Sources", "sources"),
        ("Task categories", "task_categories"),
        ("Languages of the prompts", "languages"),
    ):
        parts.append(f"## {title}\n\n{_count_table(record[counts])}")
    if record["token_lengths"]:
        parts.append("## Lengths in tokens")
        parts += [f"{name.replace('_', ' ')}:\n\n```\n{format_histogram(length_bars(bars))}\n```" for name, bars in record["token_lengths"].items()]
    parts.append(f"## Left out\n\n{_left_out(record)}")
    parts.append(
        "Each pair keeps the licence of its source (column `licence`), whose terms bind whoever uses it. `pii_score` (0 to 3) says whether a scan "
        "found what looks like personal data, null that it found nothing or was not made; `task_category` and `language` are machine-made."
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    record = facts.record
    licences = list(record["licences"])
    total = sum(record["languages"].values())
    languages = [name for name, count in record["languages"].items() if name != UNKNOWN and count >= MIN_LANGUAGE_SHARE * total]
    size = next((name for limit, name in _SIZES if record["pairs"] < limit), "n>100M")
    return {
        "pretty_name": facts.title,
        "license": licences[0] if len(licences) == 1 and licences[0] != UNKNOWN else "other",
        **({"language": sorted(languages)} if languages else {}),
        "tags": ["preference", "reward-model"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }


def _count_table(counts: Mapping[str, int]) -> str:
    rows = [f"| {name.replace('|', '/')} | {count} |" for name, count in counts.items()]
    return "\n".join(["| | pairs |", "|---|---|", *rows])


def _left_out(record: Mapping[str, Any]) -> str:
    if not record["left_out"]:
        return "Nothing of the set."
    lines = [f"- {count}: {_REASONS[reason]}" for reason, count in record["left_out"].items()]
    return "\n".join([*lines, *(f"  - under {name}: {count}" for name, count in record["left_out_by_licence"].items())])


_REASONS = {
    "filter": "the filters of this export leave them out",
    "licence": "the licence of the source is unknown, or not among those asked for",
    "contaminated": "judges say that the pair gives a benchmark item away",
    "personal_data": "the scan for personal data gave a higher score than this export allows",
    "not_scanned_whole": "the scan for personal data did not read the pair to its end",
    "settled_twice": "the same comparison is in the set already",
}
