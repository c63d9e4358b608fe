"""Throughputs from FLOPs, stages and bytes of tables: worked by hand, and the bytes against files that the pipeline's own writer made."""

import secrets
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from synpref_ray.llm.judge import VOTE, VOTES_SCHEMA
from synpref_ray.planning.cost import Assumptions, Prices, Sizes, Throughputs
from synpref_ray.planning.derived import Compute
from synpref_ray.planning.stages import FamilyModel, LanguageModel, StagesConfig, derived_throughputs, model_lines, row_bytes, stage_lines, stage_work
from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.rules.gate import DECISION_SCHEMA
from synpref_ray.schema import POOL_SCHEMA, REWARDS_SCHEMA
from synpref_ray.tables.storage import Storage

ROUND = Compute(
    prompt_tokens=100, reply_tokens=200, attribute_tokens=50, guideline_tokens=450, judge_input_tokens=3000, gpu_tflops=100, score_mfu=0.5,
    train_mfu=0.5, embed_mfu=0.5, llm_prompt_mfu=0.5, llm_output_tokens_per_second=100, llm_billions=10, embedder_billions=1, reward_billions=1,
)  # fmt: skip
# 50 TFLOP/s = 50,000 GFLOP a second, 180,000,000 an hour; a pair has 500 unique tokens.


def test_throughputs_follow_from_flops() -> None:
    assert ROUND.score_rate(1) == pytest.approx(180_000_000 / (2 * 500))
    assert ROUND.train_rate(1, recompute=True) == pytest.approx(180_000_000 / (8 * 500))
    assert ROUND.train_rate(2, recompute=False) == pytest.approx(180_000_000 / (6 * 2 * 500))
    assert ROUND.embed_rate() == pytest.approx(180_000_000 / (2 * 150))
    assert ROUND.exemplars == 3  # (3,000 - 450 - 550) / 550 = 3.6
    assert ROUND.judge_tokens == 5 * 550  # three exemplars, and the pair in both orders
    found = ROUND.throughputs()
    assert found.judge == pytest.approx(180_000_000 / (2 * 10 * 2750))
    assert found.tag == pytest.approx(3600 / (100 * 20 / 50_000 + 50 / 100))  # 0.04 s to read, 0.5 s to write


def test_a_prompt_too_short_for_an_exemplar_holds_none() -> None:
    assert ROUND.model_copy(update={"judge_input_tokens": 900}).exemplars == 0
    assert ROUND.model_copy(update={"max_exemplars": 2}).exemplars == 2


def test_the_work_of_the_stages() -> None:
    work = stage_work(Sizes(gold=90, silver=910, stage2=1000), Assumptions(rounds=8, mismatch_fraction=0.3, curated_fraction=0.6))
    assert (work.all_pairs, work.mismatches, work.kept, work.curated) == (2000, 300, 600, 1000)
    assert work.judged_in_stage1 == 910 + sum(10 * (number + 1) for number in range(9))  # silver once, and all gold so far whenever it has grown
    assert work.scored_gold == sum(10 * (number + 1) for number in range(8)) + 2 * 90
    assert work.trained_in_stage1 == pytest.approx(sum(910 / 9 * number for number in range(1, 10)) + 90)  # eight rounds and the last training


def test_stages_cost_their_hours() -> None:
    config = StagesConfig(gpus=4, cpu_cores=2, bytes_per_token=2, ingest_megabytes_per_core_second=1, models=(FamilyModel(name="a", billions=2),))
    paces = Throughputs(tag=10, score=100, judge=5, train=90_000)  # training: twice the derived 45,000 of a billion
    lines = stage_lines(Sizes(gold=0, silver=1000, stage2=1000), Assumptions(rounds=1), paces, Prices(gpu_hour=3), ROUND, config)
    found = {line.name: line for line in lines}
    assert found["score, both RMs"].device_hours == 20
    assert (found["score, both RMs"].hours, found["score, both RMs"].cost) == (5, 60)
    assert found["judge mismatches"].device_hours == 350 / 5
    assert found["train a"].per_hour == pytest.approx(2 * 180_000_000 / (8 * 2 * 500))  # as much faster than derived as what was measured
    ingest = found["ingest, decontamination"]
    assert not ingest.on_gpus
    assert ingest.device_hours * 3600 == pytest.approx(2000 * 500 * 2 / 1e6)  # 2 MB at 1 MB a second
    assert found["score gold, Stage 1"].cost == 0


def test_several_judges_have_a_line_each_and_endpoints_a_price() -> None:
    judges = (
        LanguageModel(name="large", billions=20),
        LanguageModel(name="experts", billions=10, speed=0.5, stages=(2,)),
        LanguageModel(name="paid", price_per_million_prompt_tokens=2, price_per_million_output_tokens=10, tokens_per_minute=1000),
    )
    config = StagesConfig(gpus=4, judges=judges, embedding_dimension=50, search_gflops_per_core=0.001, working_gold_fraction=0.5)
    sizes, about = Sizes(gold=100, silver=900, stage2=1000), Assumptions(rounds=1, mismatch_fraction=0.5)
    derived = derived_throughputs(ROUND, config)
    assert derived.judge == pytest.approx(1 / (2 / ROUND.judge_rate(20)))  # half the size at half the share of the peak: as long as the first
    paces = derived.model_copy(update={"judge": 2 * derived.judge})
    found = {line.name: line for line in stage_lines(sizes, about, paces, Prices(gpu_hour=3), ROUND, config)}
    for name in ("judge mismatches: large", "judge mismatches: experts"):
        assert found[name].device_hours == pytest.approx(500 / (2 * ROUND.judge_rate(20)))
    assert "judge, Stage 1: experts" not in found
    tokens = ROUND.judge_request
    assert (tokens.requests, tokens.output) == (2, 2 * ROUND.choice_tokens)
    assert tokens.prompt == 2 * (ROUND.guideline_tokens + 4 * 550)  # three exemplars and the pair, in each order
    paid = found["judge mismatches: paid"]
    assert not paid.on_gpus
    assert paid.cost == pytest.approx(500 * (2 * tokens.prompt + 10 * tokens.output) / 1e6)
    assert paid.hours == pytest.approx(500 * (tokens.prompt + tokens.output) / 1000 / 60)
    search = found["exemplars of mismatches"]
    assert search.device_hours == pytest.approx(500 * 50 * 2 * 50 / 1e6 / 3600)  # 500 pairs with 50 of gold, 50 numbers each, 10^6 FLOPs a second
    assert found["exemplars, Stage 1"].device_hours == pytest.approx(
        (500 * 25 + 550 * 50) * 100 / 1e6 / 3600
    )  # two rounds: silver 450, gold 50 and 100


def test_a_model_is_on_gpus_or_behind_an_endpoint() -> None:
    for values in ({"name": "x"}, {"name": "x", "billions": 1, "tokens_per_minute": 1}):
        with pytest.raises(ValidationError, match="give billions of a model on GPUs"):
            LanguageModel.model_validate(values)


def test_models_and_checkpoints() -> None:
    stored, checkpoints = model_lines([FamilyModel(name="a", billions=1), FamilyModel(name="b", billions=3)])
    assert (stored.gigabytes, checkpoints.gigabytes) == (8, 72)


def made(schema: pa.Schema, rows: int) -> pa.Table:
    """Return a table of random hashes and numbers, words out of few, and texts that do not compress."""

    def value(name: str, kind: pa.DataType, row: int) -> object:
        if name in ("prompt", "votes"):
            return None
        if name in ("chosen", "rejected"):
            return secrets.token_hex(300)  # 300 bytes that cannot be told in fewer
        if pa.types.is_fixed_size_list(kind):
            return np.random.default_rng(row).standard_normal(kind.list_size, np.float32)
        if pa.types.is_string(kind):
            is_id = name.endswith(("id", "_group")) and name != "source_id"
            return secrets.token_hex(16) if is_id else ("one", "two", "three")[row % 3]
        if pa.types.is_boolean(kind):
            return secrets.randbelow(2) == 1
        return secrets.randbelow(1 << 24) / (1 << 24) if pa.types.is_floating(kind) else secrets.randbelow(1 << 31)

    loose = pa.schema([field.with_nullable(True) for field in schema])
    return pa.table([pa.array([value(field.name, field.type, row) for row in range(rows)], field.type) for field in loose], schema=loose)


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        (POOL_SCHEMA, {"prompt": 0.0, "chosen": 300.0, "rejected": 300.0}),
        (REWARDS_SCHEMA, {}),
        (DECISION_SCHEMA, {}),
        (embeddings_schema(1024), {}),
    ],
    ids=["pool", "rewards", "decision", "embeddings"],
)
def test_estimated_bytes_are_about_those_of_a_file(tmp_path: Path, schema: pa.Schema, texts: dict[str, float]) -> None:
    rows = 1024
    Storage(str(tmp_path)).write_table("t.parquet", made(schema, rows))
    assert (tmp_path / "t.parquet").stat().st_size / rows == pytest.approx(row_bytes(schema, texts), rel=0.25)


def test_a_pair_s_votes_are_counted_by_their_fields() -> None:
    vote = row_bytes(VOTE, {})
    assert vote == 6 * 0.5 + 1 + 1 + 4  # six words out of few, order, sample, log-probability
    assert row_bytes(VOTES_SCHEMA, {"votes": 2 * vote}) == 17 + 2 * vote + 4 + 0.5
