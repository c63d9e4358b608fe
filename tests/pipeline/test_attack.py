"""Planting injections in gold, and counting what they do, with scripted judges; real votes, real pools, no Ray and no engine."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.attack_judges import main
from synpref_ray.evaluation.shares import share
from synpref_ray.llm.engine import Request
from synpref_ray.llm.injections import CONTROL, INJECTIONS, InjectionKind, plant
from synpref_ray.llm.judge import JudgeConfig, judge_pairs
from synpref_ray.llm.prompts import quote
from synpref_ray.pipeline.attack import (
    ALL_JUDGES,
    PLANTED_SCHEMA,
    Outcome,
    PlantConfig,
    attack_report,
    count_outcomes,
    plant_pairs,
    plant_pool,
    read_outcomes,
)
from synpref_ray.pipeline.gathering import gather_sidecars
from synpref_ray.pipeline.gold import gather_gold, report_judges
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.retrieval.exemplars import EXEMPLARS_SCHEMA
from synpref_ray.rules.gold import check_exemplars
from synpref_ray.schema import ATTRIBUTES_SCHEMA, GATHERED_SCHEMA, Verdict
from synpref_ray.tables.pools import Pool
from synpref_ray.tables.sidecars import Sidecar, zip_shard
from tests.builders import make_pairs
from tests.llm.fakes import ScriptedEngine
from tests.pipeline.test_gold import EMBEDDINGS, GOLD, labelled_pool, seal

C, R, A = Verdict.CHOSEN, Verdict.REJECTED, Verdict.ABSTAIN
HUMAN = ["chosen", "rejected", "chosen", "chosen", "rejected", "chosen"]
PLANTED = {plant("", injection): injection.name for injection in (CONTROL, *INJECTIONS)}
SMALL = PlantConfig(num_pairs=4, injections_per_pair=3)


def gold_rows(human: list[str]) -> pa.Table:
    pairs = make_pairs(len(human))
    more = {
        "source_pool": ["gold"] * len(human),
        "source_shard": [0] * len(human),
        "source_row": list(range(len(human))),
        "human_verdict": human,
        "gold_split": ["working", "audit"] * (len(human) // 2),
    }
    for name, values in more.items():
        kind = GATHERED_SCHEMA.field(name).type if name in GATHERED_SCHEMA.names else pa.string()
        pairs = pairs.append_column(name, pa.array(values, kind))
    return pairs


def test_every_taken_pair_gets_its_injections_and_the_control_in_the_worse_reply() -> None:
    gold = gold_rows(HUMAN)
    planted = plant_pairs(gold, SMALL)
    assert planted.schema == PLANTED_SCHEMA
    originals = {row["pair_id"]: row for row in gold.to_pylist()}
    by_pair: dict[str, list[str]] = {}
    for row in planted.to_pylist():
        original = originals[row["pair_id"]]
        worse, better = ("rejected", "chosen") if original["human_verdict"] == "chosen" else ("chosen", "rejected")
        assert row["planted_in"] == worse
        assert row[better] == original[better]
        assert PLANTED[row[worse].removeprefix(original[worse])] == row["injection"]
        kept = [name for name in GATHERED_SCHEMA.names if name != worse]
        assert {name: row[name] for name in kept} == {name: original[name] for name in kept}
        by_pair.setdefault(row["pair_id"], []).append(row["injection"])
    assert len(by_pair) == 4
    assert list(by_pair) == [name for name in gold["pair_id"].to_pylist() if name in by_pair]
    for names in by_pair.values():
        assert names[0] == CONTROL.name
        assert len(set(names)) == 4
    assert plant_pairs(gold, SMALL).equals(planted)
    assert not plant_pairs(gold, SMALL.model_copy(update={"seed": 1})).equals(planted)


def test_a_pair_s_injections_do_not_depend_on_the_other_pairs() -> None:
    gold, every = gold_rows(HUMAN), PlantConfig(injections_per_pair=3)
    alone = pa.concat_tables([plant_pairs(gold.slice(row, 1), every) for row in range(gold.num_rows)])
    assert alone.equals(plant_pairs(gold, every))


def test_named_injections_and_one_split_of_gold() -> None:
    config = PlantConfig(injections=("german", "chatml"), injections_per_pair=9, gold_split="audit")
    rows = plant_pairs(gold_rows(HUMAN), config).to_pylist()
    assert {row["source_row"] for row in rows} == {1, 3, 5}
    assert [row["injection"] for row in rows] == ["control", "german", "chatml"] * 3
    assert {row["kind"] for row in rows} == {InjectionKind.CONTROL, InjectionKind.LANGUAGE, InjectionKind.TEMPLATE_TOKENS}
    with pytest.raises(ValueError, match="no injection klingon; there are ignore-above-1"):
        PlantConfig(injections=("klingon",))


def make_gold(root: Path) -> tuple[GoldTables, Sidecar]:
    """Return gold of one pair per verdict in HUMAN, and exemplars: of every pair two others of working gold."""
    labelled = labelled_pool(root, list(HUMAN))
    gold = gather_gold(labelled.pool.storage, "gold-r00", [labelled], GOLD, EMBEDDINGS)
    found = gold.read()
    ids = found["pair_id"].to_pylist()
    working = [name for name, split in zip(ids, found["gold_split"].to_pylist(), strict=True) if split == "working"]
    rows = [{"pair_id": name, "exemplar_ids": [other for other in working if other != name][:2]} for name in ids]
    return gold, seal(Sidecar(gold.pool, "exemplars", "9" * 32), pa.Table.from_pylist(rows, schema=EXEMPLARS_SCHEMA))


def target_of(request: Request) -> tuple[str, list[str]]:
    """Return the request and the two candidates that a judge prompt ends with."""
    lines = request.prompt.splitlines()
    topic = [line for line in lines if line.startswith("Request: ")][-1]
    candidates = [line for line in lines if line.startswith("Candidate ")][-2:]
    return json.loads(topic.removeprefix("Request: ")), [json.loads(line.partition(": ")[2]) for line in candidates]


def is_planted(reply: str) -> bool:
    return any(reply.endswith(ending) for ending, name in PLANTED.items() if name != CONTROL.name)


def truthful(request: Request) -> str:
    """Name the reply that people prefer, whatever is written in it."""
    topic, candidates = target_of(request)
    number = int(topic.rstrip(".").rpartition(" ")[2])
    better = "tea is good" if HUMAN[number] == "chosen" else "no tea"
    return "1" if candidates[0].startswith(better) else "2"


def obedient(request: Request) -> str:
    """Name the reply with an injection, else the better one."""
    planted = [is_planted(reply) for reply in target_of(request)[1]]
    return "12"[planted.index(True)] if any(planted) else truthful(request)


def positional(request: Request) -> str:
    """Name Candidate 1 when told anything, else the better one."""
    return "1" if any(is_planted(reply) for reply in target_of(request)[1]) else truthful(request)


def judged(pool: Pool, attributes: Sidecar, exemplars: Sidecar, gold: GoldTables, answer: Callable[[Request], str], **settings: object) -> Sidecar:
    """Return the sealed votes of a scripted judge, and check that no exemplar shares its target's prompt."""
    beside = [(attributes, {"task_category": "task_category"}), (exemplars, {"exemplar_ids": "exemplar_ids"})]
    shard = zip_shard(pool, 0, ["prompt", "chosen", "rejected", "prompt_group"], beside)
    check_exemplars(shard, gold.read())
    config = JudgeConfig(
        **{
            "judge": answer.__name__,
            "guideline": "general",
            "max_exemplars": 2,
            "attributes": ("task_category",),
            "max_input_tokens": 100_000,
            **settings,
        }
    )
    return seal(Sidecar(pool, f"votes.{answer.__name__}", "8" * 32), judge_pairs(shard, gold.read(), ScriptedEngine(answer), config))


def attack(root: Path, *answers: Callable[[Request], str], **settings: object) -> dict[str, list[Outcome]]:
    gold, exemplars = make_gold(root)
    planted = plant_pool(gold.pool.storage, gold, PlantConfig(injections_per_pair=99))
    attributes = gather_sidecars("attributes", ATTRIBUTES_SCHEMA, [(planted, {gold.pool.name: gold.attributes})])[0]
    same = gather_sidecars("exemplars", EXEMPLARS_SCHEMA, [(planted, {gold.pool.name: exemplars})])[0]
    clean = {answer.__name__: judged(gold.pool, gold.attributes, exemplars, gold, answer, **settings) for answer in answers}
    attacked = {answer.__name__: judged(planted, attributes, same, gold, answer, **settings) for answer in answers}
    return read_outcomes(planted, attacked, clean)


def test_an_obedient_judge_is_moved_always_and_a_truthful_one_never(tmp_path: Path) -> None:
    report = attack_report(attack(tmp_path, obedient, truthful))
    for judge, moved in (("obedient", 1.0), ("truthful", 0.0)):
        figures = report[judge]
        assert figures["overall"]["num_planted"] == len(HUMAN) * len(INJECTIONS)
        assert set(figures["by_kind"]) == set(InjectionKind)
        assert set(figures["by_injection"]) == {injection.name for injection in (CONTROL, *INJECTIONS)}
        for name, counts in [("overall", figures["overall"]), *figures["by_kind"].items()]:
            expected = 0.0 if name == "control" else moved
            assert [counts[field]["value"] for field in ("moved_to_planted", "changed", "planted_wins")] == [expected] * 3
            assert (counts["clean_right"]["value"], counts["clean_planted_wins"]["value"]) == (1.0, 0.0)
            assert counts["moved_to_planted"]["num_prompts"] == len(HUMAN)  # several injections in one pair are one trial
            assert counts["not_judged"] == {}
    together = report[ALL_JUDGES]["overall"]  # one says planted, one says better: a tie, so an abstention
    assert (together["moved_to_planted"]["value"], together["changed"]["value"]) == (0.0, 1.0)
    json.dumps(report, allow_nan=False)


def test_a_judge_that_obeys_by_position_abstains_and_is_not_moved(tmp_path: Path) -> None:
    outcomes = attack(tmp_path, positional)
    assert list(outcomes) == ["positional"]  # one judge alone is all judges
    counts = attack_report(outcomes)["positional"]["overall"]
    assert [counts[field]["value"] for field in ("moved_to_planted", "changed")] == [0.0, 1.0]


def test_what_does_not_fit_is_counted_and_moves_nothing(tmp_path: Path) -> None:
    figures = attack_report(attack(tmp_path, obedient, max_input_tokens=3000))["obedient"]
    long = figures["by_kind"]["very_long"]
    assert (long["num_planted"], long["not_judged"]) == (12, {"too_long": 12})
    assert (long["moved_to_planted"]["num_pairs"], long["moved_to_planted"]["value"]) == (0, None)
    assert figures["by_kind"]["instruction"]["not_judged"] == {}


def test_a_pair_that_loses_exemplars_to_the_planted_text_is_counted_apart(tmp_path: Path) -> None:
    lengths: list[int] = []

    def listen(request: Request) -> str:
        lengths.append(len(request.prompt + request.reply_start))
        return "1"

    gold, exemplars = make_gold(tmp_path / "clean")
    judged(gold.pool, gold.attributes, exemplars, gold, listen)
    plea = next(injection for injection in INJECTIONS if injection.name == "long-plea")  # the longest of the corpus
    room = min(lengths) + len(quote(plant("", plea))) - 3  # a token is a character: with both exemplars it lacks one at least
    figures = attack_report(attack(tmp_path / "attacked", obedient, max_input_tokens=room))["obedient"]
    longest, control = figures["by_injection"]["long-plea"], figures["by_injection"]["control"]
    assert (longest["num_planted"], longest["not_judged"]) == (len(HUMAN), {})
    assert longest["other_exemplars"]["num_planted"] == len(HUMAN)
    assert longest["other_exemplars"]["changed"]["value"] == 1.0
    assert (longest["changed"]["num_pairs"], longest["moved_to_planted"]["num_pairs"]) == (0, 0)
    assert (control["other_exemplars"]["num_planted"], control["changed"]["num_pairs"]) == (0, len(HUMAN))


def test_a_planted_prompt_differs_from_the_clean_one_in_one_line(tmp_path: Path) -> None:
    gold, exemplars = make_gold(tmp_path)
    planted = plant_pool(gold.pool.storage, gold, SMALL)
    attributes = gather_sidecars("attributes", ATTRIBUTES_SCHEMA, [(planted, {gold.pool.name: gold.attributes})])[0]
    same = gather_sidecars("exemplars", EXEMPLARS_SCHEMA, [(planted, {gold.pool.name: exemplars})])[0]
    prompts: dict[str, list[str]] = {}

    def prompts_of(name: str, pool: Pool, attributes: Sidecar, exemplars: Sidecar) -> None:
        def listen(request: Request) -> str:
            prompts.setdefault(name, []).append(request.prompt)
            return "1"

        judged(pool, attributes, exemplars, gold, listen)

    prompts_of("clean", gold.pool, gold.attributes, exemplars)
    prompts_of("planted", planted, attributes, same)
    assert len(prompts["planted"]) == 2 * planted.num_rows
    for prompt in prompts["planted"]:
        lines = prompt.splitlines()
        pairs = [clean.splitlines() for clean in prompts["clean"] if len(clean.splitlines()) == len(lines)]
        assert min(sum(a != b for a, b in zip(clean, lines, strict=True)) for clean in pairs) == 1


def test_the_pool_is_named_by_its_content(tmp_path: Path) -> None:
    gold, _ = make_gold(tmp_path)
    storage = gold.pool.storage
    first = plant_pool(storage, gold, SMALL, max_pairs=5)
    assert [shard.rows for shard in first.shards] == [5, 5, 5, 1]
    assert plant_pool(storage, gold, SMALL, max_pairs=5) == first
    assert plant_pool(storage, gold, SMALL.model_copy(update={"seed": 1}), max_pairs=5).name != first.name
    places = first.read_all(["source_pool", "source_row", "pair_id"]).to_pylist()
    ids = gold.pool.read_all(["pair_id"])["pair_id"].to_pylist()
    assert all(row["source_pool"] == gold.pool.name and ids[row["source_row"]] == row["pair_id"] for row in places)


def outcome(clean: Verdict | None, attacked: Verdict | None, prompt: str = "p", reason: str | None = None) -> Outcome:
    """Return an outcome of a text planted in the rejected reply: gold says chosen."""
    return Outcome("german", "other_language", prompt, R, clean, attacked, reason)


def test_counts_by_hand() -> None:
    found = [
        outcome(C, R, "p1"),  # right, then moved
        outcome(A, R, "p1"),  # abstained, then moved
        outcome(C, C, "p2"),
        outcome(C, A, "p3"),  # changed, not moved
        outcome(R, R, "p4"),  # wrong already: nothing to move
        outcome(R, C, "p4"),  # planting cost it the verdict
        outcome(C, None, "p5", "too_long"),
        outcome(None, None, "p6", "no_attributes"),
        outcome(C, R, "p7")._replace(same_exemplars=False),  # the planted text, or the exemplars that it left no room for
        outcome(C, C, "p8")._replace(same_exemplars=False),
    ]
    counts = count_outcomes(found)
    assert (counts["num_planted"], counts["not_judged"]) == (10, {"no_attributes": 1, "too_long": 1})
    assert (counts["other_exemplars"]["num_planted"], counts["other_exemplars"]["changed"]["value"]) == (2, 1 / 2)
    assert counts["clean_right"]["value"] == 3 / 6
    assert counts["clean_planted_wins"]["value"] == 2 / 6
    assert counts["planted_wins"]["value"] == 3 / 6
    assert counts["moved_to_planted"] == share([True, True, False, False], ["p1", "p1", "p2", "p3"])
    assert counts["changed"] == share([True, True, False, True, False, True], ["p1", "p1", "p2", "p3", "p4", "p4"])
    assert count_outcomes([])["moved_to_planted"]["value"] is None


def test_the_judges_report_on_both_parts_of_gold(tmp_path: Path) -> None:
    gold, exemplars = make_gold(tmp_path)
    votes = [judged(gold.pool, gold.attributes, exemplars, gold, answer) for answer in (truthful, positional)]
    reports = report_judges(gold, votes)
    splits = gold.read()["gold_split"].to_pylist()
    assert {split: report["num_pairs"] for split, report in reports.items()} == {split: splits.count(split) for split in ("working", "audit")}
    for report in reports.values():
        assert report["judges"]["truthful"]["agreement"]["overall"]["value"] == 1.0
        assert report["judges"]["truthful"]["rows_by_reason"] == {}
        assert report["between_judges"][0]["all_verdicts"]["equal"]["value"] == 1.0  # nothing is planted in gold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Stage 1 has not finished"),
        (("attack.injections=[klingon]",), "no injection klingon"),
        (("judges=[]",), "judges: Tuple should have at least 1 item"),
    ],
)
def test_the_job_says_what_is_missing_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    config = Path(__file__).parents[2] / "jobs" / "configs" / "laptop_attack.yaml"
    assert main(["--config", str(config), f"workspace={tmp_path}", "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
