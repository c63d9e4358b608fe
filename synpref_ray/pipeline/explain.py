"""What `jobs/report.py explain` prints: the story of one pair (`reporting/pair_story.py`) with its source's licence, as text or as JSON."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from synpref_ray.errors import ConfigError
from synpref_ray.ingest.catalogue import catalogue
from synpref_ray.ingest.source import Route
from synpref_ray.pipeline.ingest_growth import read_records
from synpref_ray.reporting.pair_story import tell_pair
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.pools import open_pool, pool_exists
from synpref_ray.tables.storage import Storage

WIDTH = 150
MAX_TEXT = 600  # ours: enough to recognise a prompt or a reply; format=json has it whole
MARKS = ("hygiene", "pii", "token_lengths", "decontamination")
_ATTRIBUTES = [name for name in ATTRIBUTES_SCHEMA.names if name not in ("pair_id", "drop_reason")]


def explain_pair(storage: Storage, pair: str, *, as_json: bool) -> str:
    """Return one pair's story.

    Raises:
        ConfigError: no pair is named.
        InputError: no pool holds it.
    """
    if not pair:
        raise ConfigError("name the pair: pair=PAIR_ID (or the first 8 digits of it or more)")
    story = tell_pair(storage, pair)
    story["source_record"] = source_record(storage, story["source"])
    return json.dumps(story, ensure_ascii=False, indent=2) if as_json else "\n".join(describe_story(story))


def source_record(storage: Storage, source: str) -> dict[str, Any]:
    """Return what ingest recorded of a source (route, licence, kind of labels, data set), and its catalogue row's adapter and notes."""
    for route in Route:
        if not pool_exists(storage, route.value):
            continue
        accounts = [record["sources"] for record in read_records(open_pool(storage, route.value))]
        for found in (sources[source] for sources in reversed(accounts) if source in sources):
            record = {name: found[name] for name in ("route", "licence", "label_kind", "catalogue", "hub", "revision") if name in found}
            row = catalogue().get(found.get("catalogue", ""))
            return record | ({"adapter": row.adapter.kind, "notes": row.notes, "confirmed": row.confirmed} if row else {})
    return {}


def describe_story(story: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a story."""
    yield f"pair {story['pair_id']} (comparison {story['comparison_id']}, prompt group {story['prompt_group'][:16]})"
    record = story["source_record"]
    about = ", ".join(f"{name} {value}" for name, value in record.items() if value) or "ingest left no record of it"
    yield f"source {story['source']}, id there {story['source_id'] or '-'}: {about}"
    if story["contradicted"]:
        yield "contradicted: the sources label this comparison both ways"
    yield from _section("stands in", [_describe_place(place) for place in story["places"]])
    turns = [f"{message['role']}: {_short(message['content'])}" for message in story["prompt"]]
    yield from _section("text, as ingested", [*turns, f"chosen: {_short(story['chosen'])}", f"rejected: {_short(story['rejected'])}"])
    tables = _Tables(story["tables"])
    yield from _section("marks", [_values(told) for told in tables.take(*MARKS)])
    yield from _section("tags", [line for told in tables.take("attributes") for line in _describe_tags(told)])
    people = [f"{name}: {_fields(row)}" for name, rows in story["people"].items() for row in rows]
    yield from _section("people", [*(_describe_human(told) for told in tables.take("human")), *people])
    votes = [line for told in tables.take("votes") for line in _describe_votes(told)]
    yield from _section("judges", [*votes, *(_values(told) for told in tables.take("exemplars", "notes"))])
    yield from _section("votes merged", [_describe_merge(told) for told in tables.take("verdict", "judge_verdict")])
    yield from _section("rewards (as ingested: chosen, rejected)", [_describe_rewards(told) for told in tables.take("rewards")])
    yield from _section("retrieved", [_describe_retrieval(row) for row in story["retrieved"]])
    yield from _section("as gold it called for", [_describe_call(row) for row in story["called_for"]])
    yield from _section("labels by round", [_values(told) for told in tables.take("label")])
    yield from _section("sets", [f"{row['set']} ({'label turned round' if row['flipped'] else 'label as ingested'})" for row in story["sets"]])
    yield from _section("Stage 2", _describe_decision(story["decision"]) if story["decision"] else [])
    yield from _section("other tables", [_values(told) for told in tables.rest()])
    if tables.num_unused:
        yield f"\n{tables.num_unused} tables of other settings or earlier runs are not shown (format=json has them)"


class _Tables:
    """The tables of a story by kind. Where some of one name and pool are in use, those of other settings are left out and counted."""

    def __init__(self, tables: Sequence[Mapping[str, Any]]):
        used = {(told["pool"], told["table"]) for told in tables if told["used_by"]}
        shown = [told for told in tables if told["used_by"] or (told["pool"], told["table"]) not in used]
        self._left = [told for told in shown if told["table"] != "decision" or not told["used_by"]]
        self.num_unused = len(tables) - len(shown)

    def take(self, *kinds: str) -> list[Mapping[str, Any]]:
        """Return the tables whose names are or begin with one of these."""
        taken = [told for told in self._left if told["table"].split(".")[0] in kinds]
        self._left = [told for told in self._left if told not in taken]
        return taken

    def rest(self) -> list[Mapping[str, Any]]:
        """Return what nobody took."""
        return self._left


def _section(title: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield f"\n{title}"
        for line in lines:
            yield from textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="      ", break_long_words=False) or ["  "]


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= MAX_TEXT else f"{one_line[:MAX_TEXT]} … ({len(text)} characters)"


def _describe_place(place: Mapping[str, Any]) -> str:
    gathered = place["gathered_from"]
    taken = f", gathered from {gathered['pool']} shard {gathered['shard']} row {gathered['row']}" if gathered else ""
    return f"pool {place['pool']} (version {place['version']}), shard {place['shard']}, row {place['row']}{taken}"


def _head(told: Mapping[str, Any]) -> str:
    used = f", in use by {', '.join(told['used_by'])}" if told["used_by"] else ""
    return f"{told['pool']}/{told['table']}/{told['fingerprint'][:8]}{used}"


def _fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items() if value is not None and value != []) or "nothing"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _short(str(value))


def _values(told: Mapping[str, Any]) -> str:
    return f"{_head(told)}: {_fields(told['values'])}"


def _describe_tags(told: Mapping[str, Any]) -> Iterator[str]:
    values = told["values"]
    how = {"merge tags": "merged", "edit tags": "edited by people"}.get(told["step"], told["step"])
    reason = f"; {values['drop_reason']}" if values.get("drop_reason") else ""
    yield f"{_head(told)} ({how}): " + ("; ".join(f"{name} {values[name]}" for name in _ATTRIBUTES if values.get(name)) or "none") + reason


def _describe_human(told: Mapping[str, Any]) -> str:
    values = told["values"]
    if values["human_verdict"] is None:
        return f"{_head(told)}: no verdict ({values['drop_reason'] or 'nobody was asked'})"
    simulated = " (SIMULATED)" if values["simulated"] else ""
    split = f", {values['gold_split']} gold" if values["gold_split"] else ", no gold"
    return f"{_head(told)}: {values['human_verdict']} by {values['annotator']}{simulated}{split}"


def _describe_votes(told: Mapping[str, Any]) -> Iterator[str]:
    values = told["values"]
    if not values["votes"]:
        yield f"{_head(told)}: not asked ({values['drop_reason'] or 'no vote'})"
        return
    yield f"{_head(told)}, {values['num_exemplars']} exemplars:"
    for vote in values["votes"]:
        sure = "" if vote["logprob"] is None else f", logprob {vote['logprob']:.3f}"
        first = "chosen shown first" if vote["order"] == 0 else "rejected shown first"
        yield f"  {vote['judge']} ({vote['model']}), order {vote['order']} ({first}), sample {vote['sample']}: {vote['verdict']}{sure}"


def _describe_merge(told: Mapping[str, Any]) -> str:
    values = told["values"]
    if not values["num_votes"]:
        return f"{_head(told)}: no judge has voted"
    alone = f"all judges together: {values['all_judges_verdict'] or 'none'}"
    rule = f"rule merge votes {told['version']}, weights {told['settings']['weights']}; " if "weights" in told["settings"] else ""
    verdict = values["judge_verdict"] or "no verdict"
    return f"{_head(told)}: {verdict}, {values['verdict_reason']} ({rule}{values['num_votes']} votes; {alone})"


def _describe_rewards(told: Mapping[str, Any]) -> str:
    values = told["values"]
    if values["margin"] is None:
        return f"{_head(told)}: none ({values['drop_reason']})"
    rewards = f"{values['reward_chosen']:.4f}, {values['reward_rejected']:.4f}"
    return f"{_head(told)}: {rewards}; margin {values['margin']:+.4f}, p_chosen {values['p_chosen']:.4f}"


def _describe_retrieval(row: Mapping[str, Any]) -> str:
    if row["gold_pair_id"] is None:
        score = "" if row["uncertainty"] is None else f", uncertainty {row['uncertainty']:.4f}"
        return f"round {row['round']}: by {row['selected_by']}, rank {row['rank']}{score}"
    error = f"gold pair {row['gold_pair_id']} (p {row['gold_confidence']:.4f} in the human label, so k = {row['k']})"
    return f"round {row['round']}: called for by {error}, its neighbour {row['place'] + 1} of them, similarity {row['similarity']:.4f}"


def _describe_call(row: Mapping[str, Any]) -> str:
    ids = ", ".join(row["pair_ids"])
    return f"round {row['round']}: p {row['gold_confidence']:.4f} in its label, k = {row['k']}, got {len(row['pair_ids'])}: {ids}"


def _describe_decision(decision: Mapping[str, Any]) -> list[str]:
    judge = decision["judge_verdict"] or "none"
    margins = ", ".join(f"{name} RM {_margin(decision[f'margin_{name}'], decision[f'{name}_agrees'])}" for name in ("best", "gold"))
    rule = ", ".join(f"{name} {value}" for name, value in decision["rule"].items())
    what = f"{decision['decision']}{' (chosen and rejected swapped)' if decision['flipped'] else ''}, because {decision['decision_reason']}"
    return [
        what,
        f"evidence: margins {margins}; judge's verdict: {judge}",
        f"why: {decision['why']}",
        f"rule: {rule}; table {decision['fingerprint'][:8]}",
    ]


def _margin(margin: float | None, agrees: bool | None) -> str:
    if margin is None:
        return "none"
    return f"{margin:+.4f} ({'no opinion' if agrees is None else 'agrees' if agrees else 'disagrees'} with the label)"
