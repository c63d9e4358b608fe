"""Notes of LLMs on replies: which pairs are noted, and how notes reach the queue. (The real engine is in test_annotated_round.py.)"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.config import load_config
from synpref_ray.errors import ConfigError
from synpref_ray.human.database import Item
from synpref_ray.llm.noter import NOTES_SCHEMA
from synpref_ray.pipeline import preverify
from synpref_ray.pipeline.annotation import AnnotateConfig, fill_queue
from synpref_ray.pipeline.preverify import NoteStepConfig, PreverifyConfig, run_preverify, shown_notes
from synpref_ray.pipeline.steps import Step, StepInput
from synpref_ray.pipeline.verification import notes_path
from synpref_ray.reporting.run import Run
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.garbage import find_items
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.pipeline.test_gold import seal


@pytest.fixture
def seed(tmp_path: Path) -> Pool:
    """Eight pairs, every second one objective."""
    storage, pairs = Storage(str(tmp_path / "ws")), make_pairs(8)
    pool = commit_pool(storage, "seed", "f" * 32, [write_pool_shard(storage, "seed", 0, pairs)], {})
    rows = [
        {"pair_id": pair_id, "task_category": "math", "objectivity": ("objective", "subjective")[number % 2], "controversiality": "low"}
        for number, pair_id in enumerate(pairs["pair_id"].to_pylist())
    ]
    seal(Sidecar(pool, "attributes", "a" * 32), pa.Table.from_pylist(rows, schema=ATTRIBUTES_SCHEMA))
    return pool


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let a stand-in for the engine note every reply; return a list that gets the pairs it was asked about."""
    found: list[str] = []

    def run_llm_step(run: Run, name: str, step: Step, inputs: Sequence[StepInput], config: NoteStepConfig) -> list[list[Sidecar]]:
        pool = inputs[0].pool
        found.extend(pool.read_all(["pair_id"])["pair_id"].to_pylist())
        rows = [{"pair_id": pair_id, "chosen": "correct", "rejected": "incorrect"} for pair_id in found]
        return [[seal(Sidecar(pool, step.outputs[0].name, "b" * 32), pa.Table.from_pylist(rows, schema=NOTES_SCHEMA))]]

    monkeypatch.setattr(preverify, "run_llm_step", run_llm_step)
    return found


def settings(pool: Pool, *more: str) -> PreverifyConfig:
    engine = "noters=[{engine: {model: HuggingFaceTB/SmolLM2-135M-Instruct}}]"
    return load_config(PreverifyConfig, None, [engine, f"workspace={pool.storage.url}", *more])


def test_objective_pairs_of_the_queue_are_noted_and_the_notes_reach_its_items(seed: Pool, asked: list[str]) -> None:
    config = settings(seed)
    run = Run(seed.storage, "preverify", config)
    assert "noter" in run_preverify(config, run)
    assert run.metrics["preverify"]["asked"] == len(asked) <= run.metrics["preverify"]["queued"] == 4
    objective = set(seed.read_all(["pair_id"])["pair_id"].to_pylist()[::2])
    assert set(asked) <= objective
    annotate = AnnotateConfig(workspace=seed.storage.url)
    fill_queue(annotate, Run(seed.storage, "annotate", annotate))
    database = annotate.open_database()
    with database.read() as session:
        notes = {item.pair_id: item.notes for item in session.query(Item)}
    database.close()
    assert len(notes) == 4
    assert {pair_id for pair_id, note in notes.items() if note} == set(asked)
    assert all(notes[pair_id] == {"chosen": "correct (noter)", "rejected": "incorrect (noter)"} for pair_id in asked)


def test_what_the_notes_are_from_is_not_removed(seed: Pool, asked: list[str]) -> None:
    config = settings(seed)
    run_preverify(config, Run(seed.storage, "preverify", config))
    paths = {item.path: item.may_go for item in find_items(seed.storage, unfinished=True) if "seed-preverified-" in item.path}
    assert len(paths) == 2  # the gathered pool and its notes
    assert not any(paths.values())


def test_all_pairs_of_the_queue_where_the_config_says_so(seed: Pool, asked: list[str]) -> None:
    config = settings(seed, "objective_only=false")
    run_preverify(config, Run(seed.storage, "preverify", config))
    assert len(asked) == 4
    assert seed.storage.read_table(notes_path("seed")).num_rows == 4


def test_several_noters_are_shown_with_their_names() -> None:
    rows = [{"pair_id": "a", "chosen": "correct", "rejected": None}, {"pair_id": "b", "drop_reason": "too_long"}]
    one = pa.Table.from_pylist(rows, schema=NOTES_SCHEMA)
    two = pa.Table.from_pylist([{"pair_id": "a", "chosen": "incorrect", "rejected": "incorrect"}], schema=NOTES_SCHEMA)
    assert shown_notes({"x": one, "y": two}).to_pylist() == [
        {"pair_id": "a", "chosen": "correct (x); incorrect (y)", "rejected": "incorrect (y)"},
        {"pair_id": "b", "chosen": None, "rejected": None},
    ]
    assert shown_notes({}).num_rows == 0


def test_noters_have_names_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a name of its own"):
        load_config(PreverifyConfig, None, ["noters=[{engine: {model: a}}, {engine: {model: a}}]"])
