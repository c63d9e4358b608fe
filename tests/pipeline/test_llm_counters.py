"""What the LLM workers say they asked of the engine: equal requests once, and nothing that an earlier run had paid for."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.llm.engine import EngineConfig, Request
from synpref_ray.llm.judge import JudgeConfig
from synpref_ray.llm.tagger import TaggerConfig
from synpref_ray.pipeline import judge_steps, llm_steps
from synpref_ray.pipeline.gold_tables import GoldTables
from synpref_ray.pipeline.judge_steps import JudgeStepConfig, JudgeWorker
from synpref_ray.pipeline.llm_steps import METERED, EngineMeter
from synpref_ray.pipeline.steps import ShardKey
from synpref_ray.pipeline.tag_steps import TagStepConfig, TagWorker
from synpref_ray.reporting.usage import OF_JOURNAL
from synpref_ray.schema import POOL_SCHEMA
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.llm.fakes import GOOD_TAG, ScriptedEngine

ENGINE = EngineConfig(model="scripted")
KEY = ShardKey(0, 0)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sidecar:
    """Return the table that a worker with a scripted engine feeds; three pairs, each twice, as a pool of its own makes them."""
    monkeypatch.setattr(llm_steps, "open_engine", lambda engine, budget: ScriptedEngine(lambda request: "1" if request.choices else GOOD_TAG))
    storage = Storage(str(tmp_path))
    return Sidecar(commit_pool(storage, "seed", "f" * 32, [write_pool_shard(storage, "seed", 0, make_pairs(3))], {}), "attributes", "a" * 32)


def asked(counters: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in counters.items() if name not in METERED and name not in OF_JOURNAL}


def test_the_tagger_counts_what_it_sends(table: Sidecar) -> None:
    config = TagStepConfig(engine=ENGINE, tagger=TaggerConfig(max_input_tokens=5000))
    shard = pa.concat_tables([make_pairs(3), make_pairs(3)])
    assert asked(TagWorker(config, [table])(shard, KEY)[1]) == {"requests_sent": 3, "from_journal": 0, "asked_again": 0}
    assert asked(TagWorker(config, [table])(shard, KEY)[1]) == {"requests_sent": 0, "from_journal": 3, "asked_again": 0}


def test_the_judge_counts_what_it_sends(table: Sidecar, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = POOL_SCHEMA.empty_table()
    monkeypatch.setattr(GoldTables, "read", lambda _: gold)
    monkeypatch.setattr(judge_steps, "check_exemplars", lambda *_: None)
    config = JudgeStepConfig(
        engine=ENGINE, judge=JudgeConfig(judge="small", guideline="short", max_exemplars=0, attributes=(), max_input_tokens=5000)
    )
    worker = JudgeWorker(config, GoldTables(table.pool, table, table, table), [table])
    assert asked(worker(make_pairs(3), KEY)[1]) == {"judged": 3, "requests_sent": 6, "from_journal": 0, "asked_again": 0}
    assert asked(worker(make_pairs(3), KEY)[1]) == {"judged": 3, "requests_sent": 0, "from_journal": 6, "asked_again": 0}


def test_what_the_engine_counts_is_shared_out_among_the_shards_once() -> None:
    engine = ScriptedEngine(lambda request: "1")
    meter = EngineMeter(engine)
    for prompts in (["one", "three"], [], ["four"]):
        engine.generate([Request.of(prompt, prompt_version="v", max_new_tokens=1) for prompt in prompts])
        assert meter.take() == {
            "prompt_tokens": sum(map(len, prompts)),
            "cached_prompt_tokens": 0,
            "output_tokens": len(prompts),
            "retries": 0,
            "cost": 0,
        }
