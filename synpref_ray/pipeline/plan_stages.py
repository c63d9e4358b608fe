"""The table of a run stage by stage that `jobs/plan.py` prints, with what its tables take on disk (docs/plan_40m.md shows it for 40 million)."""

from collections.abc import Sequence
from dataclasses import asdict

from synpref_ray.llm.both_orders import VOTE
from synpref_ray.llm.judge import VOTES_SCHEMA
from synpref_ray.planning.cost import Assumptions, Prices, Sizes, Throughputs
from synpref_ray.planning.derived import Compute
from synpref_ray.planning.stages import ID_BYTES, StageLine, StagesConfig, TableLine, model_lines, row_bytes, stage_lines, stage_work
from synpref_ray.reporting.run import Run
from synpref_ray.reporting.table import format_table
from synpref_ray.retrieval.embedder import embeddings_schema
from synpref_ray.retrieval.exemplars import EXEMPLARS_SCHEMA
from synpref_ray.reward.training_plan import TOKENS_SCHEMA
from synpref_ray.rules.gate import DECISION_SCHEMA
from synpref_ray.rules.verdicts import VERDICT_SCHEMA
from synpref_ray.schema import ATTRIBUTES_SCHEMA, GATHERED_SCHEMA, HYGIENE_SCHEMA, POOL_SCHEMA, REWARDS_SCHEMA, TAGS_SCHEMA

VOTES_A_PAIR = 2  # one sample in each order
BATCH_TOKEN_BYTES = 4  # micro-batches lie as plain int32


def describe_stages(sizes: Sizes, about: Assumptions, paces: Throughputs, prices: Prices, compute: Compute, config: StagesConfig, run: Run) -> str:
    """Return the stages, the stored tables and the sums; the numbers go into the run's metrics under `stages`."""
    stages = stage_lines(sizes, about, paces, prices, compute, config)
    tables = table_lines(sizes, about, compute, config)
    gigabytes = sum(table.gigabytes for table in tables)
    people, kept = sizes.gold * prices.gold_pair, gigabytes * config.gigabyte_month * config.months
    total = people + kept + sum(stage.cost for stage in stages)
    gpu_hours = sum(stage.device_hours for stage in stages if stage.on_gpus)
    endpoints = sum(stage.cost for stage in stages if stage.device == "endpoint")
    run.metrics["stages"] = {
        "stages": [asdict(stage) | {"device_hours": stage.device_hours, "hours": stage.hours, "cost": stage.cost} for stage in stages],
        "tables": [asdict(table) | {"gigabytes": table.gigabytes} for table in tables],
        "gpu_hours": gpu_hours,
        "gigabytes": gigabytes,
        "endpoints": endpoints,
        "total": total,
    }
    hours = sum(stage.hours for stage in stages)
    rows = [_stage_row(stage) for stage in stages]
    if endpoints:
        rows.append(("GPUs and cores", "", "", "", "", "", f"{sum(stage.cost for stage in stages) - endpoints:,.0f}"))
        rows.append(("endpoints", "", "", "", "", "", f"{endpoints:,.0f}"))
    rows.append(("people", f"{sizes.gold:,} pairs", "", "", "", "", f"{people:,.0f}"))
    rows.append((f"storage, {config.months:g} months", f"{gigabytes:,.0f} GB", "", "", "", "", f"{kept:,.0f}"))
    rows.append(("all", "", "", "", f"{gpu_hours:,.0f} GPU", f"{hours:,.0f}", f"{total:,.0f}"))
    stage_table = format_table(("stage", "work", "an hour of one", "at once", "device hours", "hours", "cost"), rows)
    stored = [(table.name, f"{table.rows:,.0f}", f"{table.bytes_per_row:,.0f}", f"{table.gigabytes:,.1f}") for table in tables]
    stored_table = format_table(("stored", "rows", "bytes a row", "GB"), [*stored, ("all", "", "", f"{gigabytes:,.0f}")])
    return f"{stage_table}\n\n{stored_table}"


def _stage_row(stage: StageLine) -> tuple[str, ...]:
    on_endpoint = stage.device == "endpoint"
    return (
        stage.name,
        f"{stage.work:,.0f} pairs",
        f"{stage.per_hour:,.0f}",
        "endpoint" if on_endpoint else f"{stage.at_once} {stage.device}s",
        "" if on_endpoint else f"{stage.device_hours:,.0f} {stage.device}",
        f"{stage.hours:,.1f}",
        f"{stage.cost:,.0f}",
    )


def table_lines(sizes: Sizes, about: Assumptions, compute: Compute, config: StagesConfig) -> Sequence[TableLine]:
    """Return what is stored at the end, by the schemas of the tables; a gathered pool holds its pairs a second time."""
    work, stage1 = stage_work(sizes, about), sizes.gold + sizes.silver
    text = config.bytes_per_token * config.compression
    pair_texts = {"prompt": compute.prompt_tokens * text, "chosen": compute.reply_tokens * text, "rejected": compute.reply_tokens * text}
    written = compute.attribute_tokens * text
    tags = {"desired_attributes": written / 2, "annotation_guideline": written / 2}
    ids = (compute.prompt_tokens + compute.reply_tokens) * config.bytes_per_token_id
    shown = {"exemplar_ids": compute.max_exemplars * ID_BYTES, "exemplar_scores": compute.max_exemplars * 4.0}
    votes = {"votes": VOTES_A_PAIR * row_bytes(VOTE, {})}
    tagged = sizes.stage2 if about.tag_scope == "all" else work.mismatches
    asked_or_verified = work.judged_in_stage1 + sizes.gold + work.mismatches  # a verified pair has its rows too, without votes
    num_taggers, num_judges = len(config.taggers) or 1, len(config.judges) or 1
    longest = max((work.curated if model.with_flipped else work.kept for model in config.models), default=0.0)
    lines = [
        TableLine("pools", work.all_pairs, row_bytes(POOL_SCHEMA, pair_texts)),
        TableLine("hygiene", work.all_pairs, row_bytes(HYGIENE_SCHEMA, {})),
        TableLine("gathered pools", stage1 + work.mismatches, row_bytes(GATHERED_SCHEMA, pair_texts)),
        TableLine("tags and attributes", stage1 + tagged, num_taggers * row_bytes(TAGS_SCHEMA, tags) + row_bytes(ATTRIBUTES_SCHEMA, tags)),
        TableLine("embeddings", stage1 + work.mismatches, row_bytes(embeddings_schema(config.embedding_dimension), {})),
        TableLine("exemplars", asked_or_verified, row_bytes(EXEMPLARS_SCHEMA, shown)),
        TableLine("votes and verdicts", asked_or_verified, num_judges * row_bytes(VOTES_SCHEMA, votes) + row_bytes(VERDICT_SCHEMA, {})),
        TableLine("rewards, both RMs", 2.0 * sizes.stage2, row_bytes(REWARDS_SCHEMA, {})),
        TableLine("decisions, verdicts scattered back", sizes.stage2, row_bytes(DECISION_SCHEMA, {}) + row_bytes(VERDICT_SCHEMA, {})),
        TableLine("token ids, by tokenizer", config.tokenizers * work.all_pairs, row_bytes(TOKENS_SCHEMA, {"chosen": ids, "rejected": ids})),
        TableLine("micro-batches of one training", longest, 2.0 * (compute.prompt_tokens + compute.reply_tokens) * BATCH_TOKEN_BYTES),
        *model_lines(config.models),
    ]
    return [line for line in lines if line.rows]
