"""The inputs of `llm.py`: a workspace with pairs, gold and exemplars, and the very prompts that the steps send, found by recording them.

A prompt is stored as what every side can use: token ids from `PlainEncoder` (the engine's own) and sampling parameters by vLLM's names.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from synpref_ray.bundled import resolve_model
from synpref_ray.config import Settings
from synpref_ray.errors import InputError
from synpref_ray.llm.engine import Engine, EngineConfig, EngineCounts, ModelIdentity, Reply, Request
from synpref_ray.llm.judge import JudgeConfig, judge_pairs
from synpref_ray.llm.tagger import TaggerConfig, tag_pairs
from synpref_ray.llm.tokens import PlainEncoder
from synpref_ray.pipeline.gold_tables import ATTRIBUTE_COLUMNS, GoldTables
from synpref_ray.pipeline.judge_steps import JudgedPool, JudgeStepConfig
from synpref_ray.pipeline.llm_steps import PAIR_COLUMNS
from synpref_ray.pipeline.tag_steps import TagStepConfig
from synpref_ray.retrieval.exemplars import EXEMPLARS_SCHEMA
from synpref_ray.rules.gold import GoldConfig, GoldSplit, split_gold
from synpref_ray.schema import ATTRIBUTES_SCHEMA, HUMAN_SCHEMA, POOL_SCHEMA, Verdict, comparison_id, pair_id, prompt_group, stable_hash
from synpref_ray.tables.pools import Pool, commit_pool, open_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar, open_sidecar, zip_shard
from synpref_ray.tables.storage import Storage

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS, GOLD = "targets", "gold"
REQUESTS_OF_PAIR = {"tag": 1, "judge": 2}  # the judge asks in both orders
TASKS = tuple(REQUESTS_OF_PAIR)
NUM_GOLD, NUM_EXEMPLARS = 48, 4
MAX_TARGET_CHARS, MAX_GOLD_CHARS = 2000, 600  # so that a target and four exemplars fit 1,536 tokens, and nothing is dropped
ATTRIBUTES = {
    "task_category": "advice_seeking",
    "objectivity": "subjective",
    "controversiality": "low",
    "desired_attributes": "helpful, honest, harmless",
    "annotation_guideline": "Prefer the reply that helps without doing harm.",
}
PROMPTS_SCHEMA = pa.schema([("key", pa.string()), ("tokens", pa.list_(pa.int32())), ("sampling", pa.string())])


class Setup(Settings):
    """The steps as they are measured; jobs/configs/laptop_stage1.yaml has the same tagger, and a judge without exemplars."""

    tag: TagStepConfig
    judge: JudgeStepConfig

    def engine(self, task: str) -> EngineConfig:
        """The engine's settings, which all sides share."""
        engine = (self.tag if task == "tag" else self.judge).engine
        assert isinstance(engine, EngineConfig)  # no endpoint: see make_setup
        return engine


@dataclass(frozen=True)
class Prompt:
    """One request as any engine can be sent it. `sampling` has vLLM's names; a JSON schema in it is text, so that Arrow keeps its keys' order."""

    key: str
    tokens: list[int]
    sampling: Mapping[str, Any]


class Recorder:
    """An engine that remembers what it was asked and gives the first reply that the request allows."""

    def __init__(self, encoder: PlainEncoder) -> None:
        self._encoder = encoder
        self.requests: list[Request] = []

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[Reply], None] | None = None, on_idle: Callable[[], None] | None = None
    ) -> list[Reply]:
        """Remember the requests, answer them."""
        self.requests += requests
        replies = [Reply(key=r.key, text=first_reply(r), finish_reason="stop", prompt_tokens=0, output_tokens=0) for r in requests]
        for reply in replies if on_finished is not None else ():
            on_finished(reply)  # type: ignore[misc]  # not None: there would be no reply
        return replies

    def count_tokens(self, text: str) -> int:
        """Count as `VllmEngine` does."""
        return len(self._encoder.encode_text(text))

    def counts(self) -> EngineCounts:
        """Nothing was generated."""
        return EngineCounts(requests_sent=0, replies=0, prompt_tokens=0, cached_prompt_tokens=0, output_tokens=0, start_seconds=0.0)

    def identity(self) -> ModelIdentity:
        """No model."""
        return ModelIdentity(model="recorder", revision="none")


def first_reply(request: Request) -> str:
    """Return a reply that a request's choices or JSON schema allow."""
    if request.choices is not None:
        return request.choices[0]
    properties = (request.json_schema or {}).get("properties", {})
    return json.dumps({name: rule["enum"][0] if "enum" in rule else "x" for name, rule in properties.items()})


def make_setup(pairs_per_shard: float, threads: int) -> Setup:
    """Return the steps of the laptop configs, with `NUM_EXEMPLARS` and all attributes for the judge.

    No unreadable reply is asked again: all sides have the same requests. So many shards are in flight that twice as many requests wait as the engine
    serves at once, as two of the pipeline's own shards (64 to 512 pairs) would give; a shard here is small so that there are many borders.
    """
    engine = EngineConfig(model=MODEL, num_threads=threads)
    tagger = TaggerConfig(instructions="short", max_attributes_chars=40, max_guideline_chars=60, max_new_tokens=96, max_retries=0)
    judge = JudgeConfig(judge="smollm2-135m", guideline="short", max_exemplars=NUM_EXEMPLARS, max_retries=0)
    in_flight = {task: max(2, math.ceil(2 * engine.max_num_seqs / (requests * pairs_per_shard))) for task, requests in REQUESTS_OF_PAIR.items()}
    return Setup(
        tag=TagStepConfig(engine=engine, tagger=tagger, concurrent_shards=in_flight["tag"], max_failed_fraction=1.0),
        judge=JudgeStepConfig(engine=engine, judge=judge, concurrent_shards=in_flight["judge"], max_failed_fraction=1.0),
    )


def make_inputs(folder: Path, file: Path, setup: Setup, num_pairs: int, num_shards: int) -> dict[str, list[list[Prompt]]]:
    """Write workspace, setup and prompts into `folder` and return the prompts: by task, by shard.

    Raises:
        InputError: the file is not there or has too few pairs that are short enough.
    """
    storage = Storage(str(folder / "workspace"))
    pairs = load_pairs(file)
    gold = [row for row in pairs if _chars(row) <= MAX_GOLD_CHARS][:NUM_GOLD]
    groups = {row["prompt_group"] for row in gold}
    targets = [row for row in pairs if row["prompt_group"] not in groups and _chars(row) <= MAX_TARGET_CHARS][:num_pairs]
    if len(gold) < NUM_GOLD or len(targets) < num_pairs:
        raise InputError(f"{file} has {len(gold)} pairs for gold and {len(targets)} to label; {NUM_GOLD} and {num_pairs} were asked for")
    make_tables(storage, targets, gold, num_shards)
    (folder / "setup.json").write_text(setup.model_dump_json(), encoding="utf-8")
    prompts = record_prompts(storage, setup)
    for task, shards in prompts.items():
        (folder / task).mkdir()
        for number, shard in enumerate(shards):
            rows = [{"key": prompt.key, "tokens": prompt.tokens, "sampling": json.dumps(prompt.sampling)} for prompt in shard]
            pq.write_table(pa.Table.from_pylist(rows, schema=PROMPTS_SCHEMA), folder / task / f"shard-{number:05d}.parquet")
    return prompts


def load_pairs(file: Path) -> list[dict[str, Any]]:
    """Return all pairs of a file as rows of a pool, in the file's order, which is that of a hash."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; name the folder that holds {file.parent.name}/ with --data")
    rows = []
    for number, row in enumerate(pq.read_table(file, columns=["prompt", "chosen", "rejected"]).to_pylist()):
        three = (row["prompt"], row["chosen"], row["rejected"])
        names = {"pair_id": pair_id(*three), "comparison_id": comparison_id(*three), "prompt_group": prompt_group(row["prompt"])}
        rows.append({**row, **names, "source": file.parent.name, "source_id": str(number), "contradicted": False})
    return list({row["pair_id"]: row for row in rows}.values())


def _chars(row: Mapping[str, Any]) -> int:
    return len(row["chosen"]) + len(row["rejected"]) + sum(len(message["content"]) for message in row["prompt"])


def make_tables(storage: Storage, targets: Sequence[Mapping[str, Any]], gold: Sequence[Mapping[str, Any]], num_shards: int) -> None:
    """Write the pools, the attributes of both, gold's verdicts, and the exemplars: four of working gold, drawn by a hash of the target's name."""
    bounds = [len(targets) * number // num_shards for number in range(num_shards + 1)]
    target_pool = _write_pool(storage, TARGETS, [targets[start:end] for start, end in itertools.pairwise(bounds)])
    gold_pool = _write_pool(storage, GOLD, [gold])
    splits = split_gold(pa.array([row["prompt_group"] for row in gold]), GoldConfig()).to_pylist()
    working = [row["pair_id"] for row, split in zip(gold, splits, strict=True) if split == GoldSplit.WORKING]
    for pool in (target_pool, gold_pool):
        _write_sidecar(pool, "attributes", ATTRIBUTES_SCHEMA, lambda name: ATTRIBUTES)
    verdicts = {row["pair_id"]: split for row, split in zip(gold, splits, strict=True)}
    _write_sidecar(gold_pool, "human", HUMAN_SCHEMA, lambda name: {"human_verdict": Verdict.CHOSEN.value, "gold_split": verdicts[name]})

    def exemplars(name: str) -> dict[str, Any]:
        return {"exemplar_ids": sorted(working, key=lambda other: stable_hash(0, name + other, "exemplar"))[:NUM_EXEMPLARS]}

    _write_sidecar(target_pool, "exemplars", EXEMPLARS_SCHEMA, exemplars)


def _write_pool(storage: Storage, name: str, shards: Sequence[Sequence[Mapping[str, Any]]]) -> Pool:
    written = [write_pool_shard(storage, name, number, pa.Table.from_pylist(list(rows), schema=POOL_SCHEMA)) for number, rows in enumerate(shards)]
    return commit_pool(storage, name, "benchmark", written, {})


def _write_sidecar(pool: Pool, name: str, schema: pa.Schema, values: Callable[[str], Mapping[str, Any]]) -> None:
    sidecar = Sidecar(pool, name, "0" * 32)
    for shard in pool.shards:
        rows = [{"pair_id": pair, **values(pair)} for pair in pool.read(shard.number, ["pair_id"])["pair_id"].to_pylist()]
        sidecar.write(shard.number, pa.Table.from_pylist(rows, schema=schema))
    manifest = {"fingerprint": sidecar.fingerprint, "pool_digest": pool.digest, "rejected": {}}
    pool.storage.write_json(f"{sidecar.folder}/manifest.json", manifest)


def open_tables(storage: Storage) -> tuple[Pool, JudgedPool, GoldTables]:
    """Return what `make_tables` wrote, as `tag_pools` and `judge_pools` take it."""
    targets, gold = open_pool(storage, TARGETS), open_pool(storage, GOLD)
    attributes = open_sidecar(gold, "attributes")
    tables = GoldTables(gold, attributes, attributes, open_sidecar(gold, "human"))  # judging reads no embeddings: exemplars are found already
    return targets, JudgedPool(targets, open_sidecar(targets, "attributes"), open_sidecar(targets, "exemplars"), None), tables


def load_encoder() -> PlainEncoder:
    """Return an encoder with the model's tokenizer."""
    from transformers import AutoTokenizer

    return PlainEncoder(AutoTokenizer.from_pretrained(resolve_model(MODEL)))


def record_prompts(storage: Storage, setup: Setup) -> dict[str, list[list[Prompt]]]:
    """Return what the steps will send, by task and shard: their own functions run over a recorder."""
    encoder = load_encoder()
    targets, judged, gold = open_tables(storage)
    examples = gold.read()
    beside: list[tuple[Sidecar, Mapping[str, str]]] = [(judged.attributes, ATTRIBUTE_COLUMNS), (judged.exemplars, {"exemplar_ids": "exemplar_ids"})]
    found: dict[str, list[list[Prompt]]] = {task: [] for task in TASKS}
    for shard in targets.shards:
        pairs = zip_shard(targets, shard.number, [*PAIR_COLUMNS, "prompt_group"], beside)
        for task in TASKS:
            recorder = Recorder(encoder)
            engine: Engine = recorder
            if task == "tag":
                tag_pairs(pairs, engine, setup.tag.tagger)
            else:
                judge_pairs(pairs, examples, engine, setup.judge.judge)
            found[task].append([Prompt(r.key, encoder.encode_request(r), sampling_of(r, encoder)) for r in recorder.requests])
    return found


def sampling_of(request: Request, encoder: PlainEncoder) -> dict[str, Any]:
    """Return what `VllmEngine` asks of vLLM for this request: guided decoding, the reply's longest length, log-probabilities of the choices."""
    if request.choices is None:
        return {
            "temperature": request.temperature,
            "max_tokens": request.max_new_tokens,
            "structured_outputs": {"json": json.dumps(request.json_schema)},
        }
    choices = [encoder.encode_text(choice) for choice in request.choices]
    return {
        "temperature": request.temperature,
        "max_tokens": min(request.max_new_tokens, max(map(len, choices))),
        "structured_outputs": {"choice": list(request.choices)},
        "logprob_token_ids": next(list(column) for column in zip(*choices, strict=False) if len(set(column)) == len(column)),
    }


def load_prompts(folder: Path, task: str) -> list[Prompt]:
    """Return the prompts of a task, in the order of the shards."""
    rows = [row for file in sorted((folder / task).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    return [Prompt(row["key"], row["tokens"], json.loads(row["sampling"])) for row in rows]
