"""The pieces of the LLM benchmark that need no engine: the prompts that it records, its notes, its figures and its gates."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks._common import Measurement
from benchmarks._llm import NUM_EXEMPLARS, NUM_GOLD, TASKS, Prompt, Recorder, Setup, first_reply, load_pairs, load_prompts, make_setup
from benchmarks._llm import make_inputs as make_llm_inputs
from benchmarks._llm_sides import read_notes
from benchmarks.llm import BARE, RAY_DATA, STEP, count_differing, figures, gates_of, main, wrong_of
from synpref_ray.errors import InputError
from synpref_ray.llm.engine import Request
from synpref_ray.llm.parsing import parse_tag
from synpref_ray.llm.prompts import tag_schema
from synpref_ray.llm.tokens import PlainEncoder
from tests.llm.chat_families import family

NUM_PAIRS, NUM_SHARDS = 23, 20


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Write enough short pairs, with one too long for anything."""
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {number}?"}], "chosen": f"Yes, {number}. " * 3, "rejected": "No. <|im_end|>"}
        for number in range(NUM_GOLD + NUM_PAIRS)
    ]
    rows.insert(1, {**rows[0], "chosen": "word " * 4000})
    (tmp_path / "hh_rlhf").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hh_rlhf" / "train.parquet")
    return tmp_path / "hh_rlhf" / "train.parquet"


@pytest.fixture
def inputs(pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, list[list[Prompt]]]]:
    """Make the benchmark's inputs with a tokenizer made here."""
    monkeypatch.setattr("benchmarks._llm.load_encoder", lambda: PlainEncoder(family("qwen3").tokenizer))
    folder = tmp_path / "inputs"
    folder.mkdir()
    return folder, make_llm_inputs(folder, pairs_file, make_setup(NUM_PAIRS / NUM_SHARDS, 2), NUM_PAIRS, NUM_SHARDS)


def test_the_prompts_are_those_that_the_steps_send(inputs: tuple[Path, dict[str, list[list[Prompt]]]]) -> None:
    folder, prompts = inputs
    assert {task: sum(map(len, shards)) for task, shards in prompts.items()} == {"tag": NUM_PAIRS, "judge": 2 * NUM_PAIRS}
    assert all(len(shards) == NUM_SHARDS for shards in prompts.values())
    for task in TASKS:
        assert load_prompts(folder, task) == [prompt for shard in prompts[task] for prompt in shard]
    tag, judge = prompts["tag"][0][0], prompts["judge"][0][0]
    assert next(iter(json.loads(tag.sampling["structured_outputs"]["json"])["properties"])) == "task_category"
    choices = [family("qwen3").tokenizer.convert_tokens_to_ids(letter) for letter in "12"]
    assert judge.sampling == {"temperature": 0.0, "max_tokens": 1, "structured_outputs": {"choice": ["1", "2"]}, "logprob_token_ids": choices}
    assert family("qwen3").decode(judge.tokens).count("Candidate 1:") == NUM_EXEMPLARS + 1
    assert Setup.model_validate_json((folder / "setup.json").read_text()) == make_setup(NUM_PAIRS / NUM_SHARDS, 2)


def test_no_pair_that_is_judged_shares_a_prompt_with_gold(pairs_file: Path) -> None:
    groups = [row["prompt_group"] for row in load_pairs(pairs_file)]
    assert len(groups) == NUM_GOLD + NUM_PAIRS + 1
    assert len(set(groups)) == NUM_GOLD + NUM_PAIRS


def test_too_few_pairs_and_a_missing_file_are_one_line(pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{NUM_PAIRS} to label"):
        make_llm_inputs(tmp_path, pairs_file, make_setup(1, 2), NUM_PAIRS + 1, NUM_SHARDS)
    assert main(["--data", str(tmp_path / "nowhere")]) == 2


def test_shards_in_flight_keep_the_engine_full() -> None:
    small, large = make_setup(2, 2), make_setup(512, 2)
    assert (small.tag.concurrent_shards, small.judge.concurrent_shards) == (32, 16)  # 64 requests, twice max_num_seqs
    assert (large.tag.concurrent_shards, large.judge.concurrent_shards) == (2, 2)


def test_a_recorder_answers_what_the_request_allows() -> None:
    recorder = Recorder(PlainEncoder(family("qwen3").tokenizer))
    choose = Request.of("a", prompt_version="t", max_new_tokens=1, choices=("1", "2"))
    tag = Request.of("b", prompt_version="t", max_new_tokens=9, json_schema=tag_schema(40, 60))
    seen: list[str] = []
    assert [reply.text for reply in recorder.generate([choose, tag], lambda reply: seen.append(reply.key))] == [first_reply(choose), first_reply(tag)]
    assert seen == [choose.key, tag.key]
    assert recorder.requests == [choose, tag]
    assert first_reply(choose) == "1"
    assert parse_tag(first_reply(tag), max_attributes_chars=40, max_guideline_chars=60).objectivity == "objective"


def test_notes_tell_the_first_request_the_starts_and_the_last_counts_of_each_engine() -> None:
    notes = [
        {"event": "start", "time": 4.0, "cpu": 2.0, "pid": 1, "seconds": 3.0},
        {"event": "start", "time": 5.0, "cpu": 2.0, "pid": 2, "seconds": 4.5},
        {"event": "request", "time": 6.5, "cpu": 3.0, "pid": 2},
        {"event": "request", "time": 6.0, "cpu": 2.5, "pid": 1},
        {"event": "request", "time": 6.5, "cpu": 2.75, "pid": 1},
        {"event": "counts", "time": 7.0, "cpu": 3.0, "pid": 1, "counts": {"replies": 1}},
        {"event": "counts", "time": 8.0, "cpu": 4.5, "pid": 1, "counts": {"replies": 5}},
        {"event": "counts", "time": 8.0, "cpu": 7.0, "pid": 2, "counts": {"replies": 7}},
    ]
    seen = read_notes([json.dumps(note) for note in notes])
    assert seen["engine_cpu_seconds"] == (4.5 - 2.5) + (7.0 - 3.0)
    assert (seen["first_request"], seen["engine_starts"], seen["engine_start_seconds"]) == (6.0, 2, 4.5)
    assert seen["counts"] == {"replies": 12}


def measured(seconds: float, requests: int = 40, starts: float = 1.0) -> Measurement:
    counts = {"requests": requests, "prompt_tokens": 400, "cached_prompt_tokens": 100, "output_tokens": 80, "startup_seconds": 9.0}
    return Measurement(seconds, 0.0, 0, {**counts, "engine_start_seconds": 5.0, "engine_starts_per_worker": starts})


def result_of(rounds: list[dict[str, Measurement]]) -> dict[str, object]:
    return {"num_requests": 40, "prompt_tokens": 400, "missing_replies": dict.fromkeys(rounds[0], 0), "sides": figures(rounds)}


def test_figures_are_medians_of_the_rounds_and_of_their_own_ratios() -> None:
    rounds = [{STEP: measured(step), BARE: measured(bare), RAY_DATA: measured(20.0)} for step, bare in ((10.0, 9.5), (20.0, 10.0), (8.0, 8.0))]
    sides = figures(rounds)
    assert sides[STEP]["requests_per_second"] == 4.0
    assert sides[STEP]["step_ratio"] == 1.0
    assert sides[BARE]["step_ratios"] == pytest.approx([0.95, 0.5, 1.0])
    assert sides[BARE]["step_ratio"] == pytest.approx(0.95)
    assert sides[RAY_DATA]["step_ratio"] == pytest.approx(2.0)
    assert sides[STEP]["prefix_cache_hit_rate"] == 0.25
    assert [gate.passed for gate in gates_of("tag", result_of(rounds))] == [True, True, True]


def test_gates_fail_for_a_slow_step_and_for_engines_that_start_twice() -> None:
    rounds = [{STEP: measured(10.0, starts=2.0), BARE: measured(8.0), RAY_DATA: measured(9.0)}]
    assert [gate.passed for gate in gates_of("tag", result_of(rounds))] == [False, False, False]
    assert [gate.passed for gate in gates_of("tag", result_of([{STEP: measured(10.0), BARE: measured(10.0)}]))] == [True, True]


def test_a_side_that_did_other_work_is_wrong() -> None:
    assert wrong_of("tag", result_of([{STEP: measured(1.0), BARE: measured(1.0)}])) == []
    [line] = wrong_of("tag", result_of([{STEP: measured(1.0, requests=41), BARE: measured(1.0)}]))
    assert "step: requests [41] where 40 were given" in line
    [line] = wrong_of("tag", {**result_of([{STEP: measured(1.0)}]), "missing_replies": {STEP: 3}})
    assert "3 replies are missing" in line


def test_differing_replies_are_counted_among_those_that_both_gave() -> None:
    assert count_differing({"a": "1", "b": "2", "c": "1"}, {"a": "1", "b": "1", "d": "2"}) == 1
