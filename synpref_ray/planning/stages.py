"""A curation run stage by stage: work, pace, GPU hours, wall hours, bytes and cost.

Paper: Sec. 3 and 4 (the stages), App. F (people). Our choice: everything else; `cost.py` is linear in three sizes, so that a budget can be split,
while here every stage, every model of the family and every table has a line of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import pyarrow as pa
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from synpref_ray.config import Settings
from synpref_ray.planning.cost import Assumptions, Prices, Sizes, Throughputs
from synpref_ray.planning.derived import SECONDS_PER_HOUR, Compute, PairTokens

BYTES_PER_GB = 1e9
ID_BYTES = 17.0  # of 32 hex digits of a hash in a Parquet file with zstd: 16 are the least
LABEL_BYTES = 0.5  # of a word out of few, in a dictionary
OPTIMIZER_BYTES = 12  # of a parameter in a checkpoint: float32 weights and two moments
STORED_BYTES = 2  # of a parameter of a stored model, bfloat16


class FamilyModel(Settings):
    """One model of the family."""

    name: str
    """As in jobs/configs/family/."""
    billions: PositiveFloat
    """Its parameters, 10^9."""
    with_flipped: bool = False
    """Whether it trains on flipped pairs as well (the 40M kind)."""
    recompute: bool = True
    """Whether activations are computed again in its training."""


class LanguageModel(Settings):
    """One tagger or judge: on GPUs, or behind an endpoint."""

    name: str
    """As in the configs of the stages."""
    billions: NonNegativeFloat = 0.0
    """On GPUs: parameters that a token passes (of a mixture of experts the active ones), 10^9; 0: it is behind an endpoint."""
    speed: PositiveFloat = 1.0
    """Share of the assumed FLOPs and tokens a second that it reaches. Ours: assumed."""
    stages: tuple[Literal[1, 2], ...] = (1, 2)
    """The stages that ask it."""
    price_per_million_prompt_tokens: NonNegativeFloat = 0.0
    """Of an endpoint."""
    price_per_million_output_tokens: NonNegativeFloat = 0.0
    """Of an endpoint."""
    tokens_per_minute: NonNegativeFloat = 0.0
    """Of an endpoint: the account's limit, prompt and reply together."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.billions) == bool(self.tokens_per_minute):
            raise ValueError(f"{self.name}: give billions of a model on GPUs, or tokens_per_minute of one behind an endpoint")
        return self

    def cost_per_pair(self, tokens: PairTokens) -> float:
        """Return an endpoint's price of a pair."""
        return (tokens.prompt * self.price_per_million_prompt_tokens + tokens.output * self.price_per_million_output_tokens) / 1e6

    def pairs_per_hour(self, tokens: PairTokens) -> float:
        """Return how many pairs an endpoint's limit lets through in an hour."""
        return 60 * self.tokens_per_minute / (tokens.prompt + tokens.output)


class StagesConfig(Settings):
    """The table of a run stage by stage; see docs/plan_40m.md."""

    gpus: NonNegativeInt = 0
    """GPUs that a stage has at once; 0: no such table."""
    cpu_cores: PositiveInt = 64
    """Cores that ingest and hygiene have at once."""
    cpu_core_hour: NonNegativeFloat = 0.05
    """Price of a core hour. Ours: assumed."""
    gigabyte_month: NonNegativeFloat = 0.023
    """Price of a GB kept for a month. Ours: assumed, object storage."""
    months: NonNegativeFloat = 3.0
    """How long everything is kept. Ours: assumed."""
    ingest_megabytes_per_core_second: PositiveFloat = 14.3
    """Text that ingest goes through. Measured: 2,000,000 rows of 2.4 KB in 167.7 s on 2 CPU cores (docs/ingest.md)."""
    hygiene_megabytes_per_core_second: PositiveFloat = 3.0
    """Text that hygiene (languages, near-duplicates, token lengths, personal data) goes through. Ours: assumed."""
    bytes_per_token: PositiveFloat = 4.0
    """Of text. Ours: assumed, English."""
    compression: float = Field(default=0.4, gt=0.0, le=1.0)
    """What a pool's files take of its text. Ours: between two real sets, 0.31 (3.0 KB a pair) and 0.51 (0.8 KB a pair), ids and columns included."""
    bytes_per_token_id: PositiveFloat = 2.2
    """Of int32 token ids with zstd. Ours: assumed."""
    tokenizers: NonNegativeInt = 2
    """How many tables of token ids there are: one for each tokenizer of the family."""
    embedding_dimension: PositiveInt = 1024
    """Of an embedding, stored in float32."""
    search_gflops_per_core: PositiveFloat = 25.0
    """What a core does of exact search for exemplars, 10^9 FLOPs a second. Ours: assumed, float32 products of FAISS."""
    working_gold_fraction: float = Field(default=0.7, gt=0.0, le=1.0)
    """Of gold, what exemplars are taken from. Ours: all but `gold.audit_fraction` of Stage 1."""
    taggers: tuple[LanguageModel, ...] = ()
    """The taggers; empty: one of `compute.llm_billions` on GPUs."""
    judges: tuple[LanguageModel, ...] = ()
    """The judges; empty: one of `compute.llm_billions` on GPUs."""
    benchmark_replies: NonNegativeInt = 175_000
    """Replies that each final model scores. Ours: about what the seven benchmarks of Sec. 4 have together."""
    models: tuple[FamilyModel, ...] = ()
    """The models that are trained at the end."""


@dataclass(frozen=True)
class StageLine:
    """One stage: so many units of work at a pace per hour of a GPU, of a core, or of all that an endpoint lets through."""

    name: str
    work: float
    per_hour: float
    price: float
    at_once: int
    device: Literal["GPU", "core", "endpoint"] = "GPU"

    @property
    def on_gpus(self) -> bool:
        """Whether its hours are those of GPUs."""
        return self.device == "GPU"

    @property
    def device_hours(self) -> float:
        """Hours of one device."""
        return self.work / self.per_hour if self.work else 0.0

    @property
    def hours(self) -> float:
        """Wall hours with all devices at work."""
        return self.device_hours / self.at_once

    @property
    def cost(self) -> float:
        """Device hours times their price."""
        return self.device_hours * self.price


@dataclass(frozen=True)
class TableLine:
    """One kind of stored table: so many rows of so many bytes, after compression."""

    name: str
    rows: float
    bytes_per_row: float

    @property
    def gigabytes(self) -> float:
        """In 10^9 bytes."""
        return self.rows * self.bytes_per_row / BYTES_PER_GB


@dataclass(frozen=True)
class StageWork:
    """What the stages go through, from sizes and assumptions."""

    all_pairs: float
    mismatches: float
    kept: float
    curated: float
    judged_in_stage1: float
    exemplar_products: float
    """Of pairs with gold, that Stage 1's searches for exemplars compute."""
    scored_gold: float
    trained_in_stage1: float


def stage_work(sizes: Sizes, about: Assumptions) -> StageWork:
    """Return the work of the stages, as `pipeline/stage1.py` and `pipeline/stage2.py` do it.

    Our choice: gold and silver grow evenly over the seed and the rounds, so there are rounds + 1 parts of each. Judges are asked about every silver
    pair once and about all gold so far each time that gold has grown; not about a verified pair where it stood. The best RM is trained on all silver
    so far in every round and once more after the last, the gold RM once (on working gold, a part of gold: counted whole). Stage 2 takes Stage 1's
    votes on gold, its judges being the same. The 40M kind is all of Stage 2, kept and flipped.
    """
    rounds = about.rounds
    parts = rounds + 1
    products = sum((sizes.silver + part * sizes.gold) * part * sizes.gold for part in range(1, parts + 1)) / parts**2
    return StageWork(
        all_pairs=sizes.gold + sizes.silver + sizes.stage2,
        mismatches=about.mismatch_fraction * sizes.stage2,
        kept=about.curated_fraction * sizes.stage2,
        curated=sizes.stage2,
        judged_in_stage1=sizes.silver + sizes.gold * (rounds + 2) / 2,
        exemplar_products=products,
        scored_gold=sizes.gold * (rounds / 2 + 2),
        trained_in_stage1=sizes.silver * (rounds + 2) / 2 + sizes.gold,
    )


def derived_throughputs(compute: Compute, config: StagesConfig) -> Throughputs:
    """Return the four throughputs by arithmetic; of several taggers or judges those on GPUs one after another (those of all stages)."""

    def together(models: Sequence[LanguageModel], rate: Callable[[float], float]) -> float:
        hours = sum(1 / (model.speed * rate(model.billions)) for model in models if model.billions)
        return 1 / hours if hours else rate(compute.llm_billions)

    found = compute.throughputs()
    tag, judge = together(config.taggers, compute.tag_rate), together(config.judges, compute.judge_rate)
    return found.model_copy(update={"tag": tag, "judge": judge})


def stage_lines(sizes: Sizes, about: Assumptions, paces: Throughputs, prices: Prices, compute: Compute, config: StagesConfig) -> list[StageLine]:
    """Return the stages in the order of a run.

    Args:
        paces: pairs per GPU hour, all four above 0; of several taggers or judges all those on GPUs together.
    """
    work = stage_work(sizes, about)
    stage1 = sizes.gold + sizes.silver
    derived = derived_throughputs(compute, config)
    text = compute.unique_tokens * config.bytes_per_token / 1e6
    tagged = sizes.stage2 if about.tag_scope == "all" else work.mismatches

    def on_cores(name: str, megabytes: float) -> StageLine:
        return StageLine(name, work.all_pairs, megabytes * 3600 / text, config.cpu_core_hour, config.cpu_cores, "core")

    def on_gpus(name: str, pairs: float, per_hour: float) -> StageLine:
        return StageLine(name, pairs, per_hour, prices.gpu_hour, config.gpus)

    def search(name: str, pairs: float, products: float) -> list[StageLine]:
        gold = products * config.working_gold_fraction / pairs if pairs else 0.0
        flops = 2 * config.embedding_dimension * gold
        per_hour = config.search_gflops_per_core * 1e9 * SECONDS_PER_HOUR / flops if flops else 0.0
        return [StageLine(name, pairs, per_hour, config.cpu_core_hour, config.cpu_cores, "core")] if per_hour else []

    def ask(name: str, kind: Literal["tag", "judge"], stage: Literal[1, 2], pairs: float) -> list[StageLine]:
        models, tokens = (config.taggers, compute.tag_request) if kind == "tag" else (config.judges, compute.judge_request)
        pace = paces.tag if kind == "tag" else paces.judge
        if not models:
            return [on_gpus(name, pairs, pace)]
        speed_up = pace / (derived.tag if kind == "tag" else derived.judge)
        rate = compute.tag_rate if kind == "tag" else compute.judge_rate
        found = []
        for model in models:
            title = f"{name}: {model.name}"
            if stage in model.stages and model.billions:
                found.append(on_gpus(title, pairs, speed_up * model.speed * rate(model.billions)))
            elif stage in model.stages:
                an_hour = model.pairs_per_hour(tokens)
                found.append(StageLine(title, pairs, an_hour, an_hour * model.cost_per_pair(tokens), 1, "endpoint"))
        return found

    lines = [
        on_cores("ingest, decontamination", config.ingest_megabytes_per_core_second),
        on_cores("hygiene", config.hygiene_megabytes_per_core_second),
        *ask("tag, Stage 1", "tag", 1, stage1),
        on_gpus("embed, Stage 1", stage1, compute.embed_rate()),
        *search("exemplars, Stage 1", work.judged_in_stage1, work.exemplar_products),
        *ask("judge, Stage 1", "judge", 1, work.judged_in_stage1),
        on_gpus("train, Stage 1", work.trained_in_stage1, paces.train),
        on_gpus("score gold, Stage 1", work.scored_gold, paces.score),
        on_gpus("score, both RMs", 2 * sizes.stage2, paces.score),
        *ask("tag mismatches" if about.tag_scope == "mismatches" else "tag, Stage 2", "tag", 2, tagged),
        on_gpus("embed mismatches", work.mismatches, compute.embed_rate()),
        *search("exemplars of mismatches", work.mismatches, work.mismatches * sizes.gold),
        *ask("judge mismatches", "judge", 2, work.mismatches),
    ]
    speed_up = paces.train / compute.train_rate(compute.reward_billions, recompute=True)  # of a measured pace over the derived one: all sizes alike
    for model in config.models:
        pairs = (work.curated if model.with_flipped else work.kept) * about.num_epochs
        lines.append(on_gpus(f"train {model.name}", pairs, speed_up * compute.train_rate(model.billions, recompute=model.recompute)))
    if config.models:
        speed_up = paces.score / compute.score_rate(compute.reward_billions)
        billions = sum(model.billions for model in config.models) / len(config.models)
        pairs = len(config.models) * config.benchmark_replies / 2
        lines.append(on_gpus(f"evaluate {len(config.models)} models", pairs, speed_up * compute.score_rate(billions)))
    return lines


def row_bytes(schema: pa.Schema | pa.StructType, texts: Mapping[str, float]) -> float:
    """Return the bytes of a row of a table in a Parquet file with zstd, by estimate.

    Args:
        texts: by column what its texts or lists take after compression; other strings are ids (`…id`, `…_group`, `…_key`) or words out of few.
    """
    return sum(texts[field.name] if field.name in texts else _value_bytes(field.name, field.type) for field in schema)


def _value_bytes(name: str, kind: pa.DataType) -> float:
    if pa.types.is_fixed_size_list(kind):
        return float(kind.list_size) * _value_bytes(name, kind.value_type)
    if pa.types.is_string(kind):
        return ID_BYTES if name.endswith(("id", "_group", "_key")) and name != "source_id" else LABEL_BYTES
    return kind.bit_width / 8 if pa.types.is_primitive(kind) else LABEL_BYTES


def model_lines(models: Sequence[FamilyModel]) -> list[TableLine]:
    """Return what the family's models take, and the two checkpoints of the largest training."""
    parameters = [model.billions * 1e9 for model in models]
    return [
        TableLine("models, stored", sum(parameters), STORED_BYTES),
        TableLine("checkpoints, two of the largest", 2 * max(parameters, default=0.0), OPTIMIZER_BYTES),
    ]
