"""Benchmarks end to end on a tiny model: official numbers, one cache for all of them, and what is not there is said."""

import gzip
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import evaluate
from synpref_ray.bundled import digest_folder
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.llm.judge import JudgeConfig
from synpref_ray.pipeline import score_cache
from synpref_ray.pipeline.benchmark_files import find_benchmark
from synpref_ray.pipeline.benchmark_judges import judge_outcomes
from synpref_ray.pipeline.benchmark_overlap import ContaminationConfig
from synpref_ray.pipeline.evaluate import EvaluateConfig, benchmark_files, check_evaluate, load_benchmark, run_evaluate
from synpref_ray.pipeline.judge_steps import JudgeStepConfig, PlainJudgeWorker, without_exemplars
from synpref_ray.pipeline.score_cache import ScoreCache, conversations_of
from synpref_ray.pipeline.scoring import ScoreConfig
from synpref_ray.pipeline.steps import ShardKey
from synpref_ray.reporting.run import Run
from synpref_ray.reward import RewardModel, reply_scorer
from synpref_ray.reward.packing import Group
from synpref_ray.tables.pools import commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.llm.http_server import Answer, LocalServer, Seen, chat
from tests.reward.conftest import save_tiny_backbone

INLINE = ScoreConfig(dtype="float32", max_length_tokens=200, num_threads=1, num_workers=0)
CHAT = [{"id": n, "prompt": f"Question {n}?", "chosen": [f"a{n}", f"bb{n}", f"ccc{n}"], "rejected": [f"x{n}", f"yy{n}", f"zzz{n}"]} for n in range(6)]
JUDGED = [
    {"pair_id": f"j{n}", "source": "mmlu-pro-law", "question": f"Question {n}?", "response_model": "gpt-4o-2024-05-13"}
    | {"response_A": f"a{n}", "response_B": f"x{n}", "label": "A>B" if n % 2 else "B>A"}
    for n in range(4)
]
MANY = [{"id": f"m{n}", "prompt": f"Question {n}?", "chosen": f"a{n}", "rejected": [f"x{n}", f"yy{n}", f"new{n}"]} for n in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_backbone(tmp_path_factory.mktemp("models") / "model", head=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name in ("rm_bench", "judgebench"):
        (folder / name).mkdir(parents=True)
    (folder / "rm_bench" / "chat_filtered.json.gz").write_bytes(gzip.compress(json.dumps(CHAT).encode()))
    (folder / "rm_bench" / "expected_metrics.json").write_text("{}")
    (folder / "judgebench" / "gpt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JUDGED))
    (folder / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MANY))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each call of the model got; loading a model counts as a call too."""
    found: list[int] = []
    score, load = reply_scorer.score_groups, score_cache.PairScorer.load

    def counting(module: Any, groups: Sequence[Group], *args: Any) -> Any:
        found.append(sum(len(group.sequences) for group in groups))
        return score(module, groups, *args)

    def loading(*args: Any) -> Any:
        found.append(0)
        return load(*args)

    monkeypatch.setattr(reply_scorer, "score_groups", counting)
    monkeypatch.setattr(score_cache.PairScorer, "load", loading)
    return found


def config_of(tmp_path: Path, model: str, data: Path, *benchmarks: str, **settings: Any) -> EvaluateConfig:
    common = {"workspace": str(tmp_path / "ws"), "data": str(data), "score": INLINE, "num_resamples": 50}
    return EvaluateConfig(**{**common, "model": model, "benchmarks": benchmarks, **settings})


def run_of(config: EvaluateConfig) -> tuple[Run, str]:
    run = Run(config.storage, "evaluate", config)
    return run, run_evaluate(config, run)


def write_lines(file: Path, rows: Sequence[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cache_files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_ino for path in folder.rglob("shard-*.parquet")}


def test_official_numbers_their_intervals_and_what_stands_behind_them(tmp_path: Path, model: str, data: Path) -> None:
    run, summary = run_of(config_of(tmp_path, model, data, "rm_bench", "judgebench", "many"))
    scorer = RewardModel.load(model, dtype="float32", num_threads=1)
    rewards = [scorer.score_replies(row["prompt"], [*row["chosen"], *row["rejected"]]) for row in CHAT]
    matrix = np.mean([[[six[i] > six[3 + j] for j in range(3)] for i in range(3)] for six in rewards], axis=0)
    assert run.metrics["rm_bench/chat/hard"] == pytest.approx(matrix[np.triu_indices(3, 1)].mean())
    assert run.metrics["rm_bench/chat/matrix/concise_over_markdown"] == matrix[0, 2]
    assert run.metrics["rm_bench/missing"]["overall"] == "no item of math, code, safety"
    assert run.metrics["rm_bench/chat/hard/verified"] == "official output"
    assert run.metrics["rm_bench/chat/hard/low"] <= run.metrics["rm_bench/chat/hard"] <= run.metrics["rm_bench/chat/hard/high"]
    assert run.metrics["judgebench/unscored"] == 0
    many = [scorer.score_replies(row["prompt"], [row["chosen"], *row["rejected"]]) for row in MANY]
    assert run.metrics["many/accuracy"] == pytest.approx(np.mean([four[0] > max(four[1:]) for four in many]))
    assert run.metrics["many/best_of/4/model"] == pytest.approx(run.metrics["many/accuracy"])
    assert run.metrics["many/best_of/4/oracle"] == 1.0
    assert run.metrics["benchmarks"]["rm_bench"]["official_items"] == 1327
    assert run.metrics["model_digest"] == digest_folder(model)
    assert (run.metrics["rm_bench/chat/hard/items"], run.metrics["rm_bench/chat/hard/official_items"]) == (6, 129)
    assert (run.metrics["judgebench/micro/items"], run.metrics["judgebench/micro/official_items"]) == (4, 350)
    assert (run.metrics["many/mrr/items"], run.metrics["many/mrr/official_items"]) == (3, None)
    assert "rm_bench, reward model: no overall: no item of math, code, safety" in summary
    assert all(text in summary for text in ("6/1327", "official output", "hand-worked"))


def test_all_benchmarks_share_the_cache_and_a_second_run_calls_no_model(tmp_path: Path, model: str, data: Path, calls: list[int]) -> None:
    first, _ = run_of(config_of(tmp_path, model, data, "rm_bench"))
    assert sum(calls) == 36
    second, _ = run_of(config_of(tmp_path, model, data, "rm_bench", "judgebench", "many"))
    assert sum(calls) == 36 + 3  # only the three replies that are new: JudgeBench's and most of the file's are RM-Bench's here
    assert second.metrics["replies"] == {"all": 39, "computed": 3, "from_cache": 36}
    files = cache_files(tmp_path / "ws" / "scores")
    calls.clear()
    third, _ = run_of(config_of(tmp_path, model, data, "rm_bench", "judgebench", "many"))
    assert calls == []
    assert cache_files(tmp_path / "ws" / "scores") == files
    numbers = {name: value for name, value in second.metrics.items() if name != "replies"}
    assert {name: value for name, value in third.metrics.items() if name != "replies"} == numbers
    assert {name: first.metrics[name] for name in first.metrics if name.startswith("rm_bench/")}.items() <= third.metrics.items()


def test_an_interrupted_evaluation_goes_on_from_its_shards_with_whatever_benchmarks(
    tmp_path: Path, model: str, data: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        score = reply_scorer.score_groups

        def dying(module: Any, groups: Sequence[Group], *args: Any) -> Any:
            if sum(calls) >= 18:
                raise KeyboardInterrupt
            return score(module, groups, *args)

        patch.setattr(reply_scorer, "score_groups", dying)
        with pytest.raises(KeyboardInterrupt):
            run_of(config_of(tmp_path, model, data, "rm_bench", replies_per_shard=6))
    assert sum(calls) == 18
    before = cache_files(tmp_path / "ws" / "scores")
    run, _ = run_of(config_of(tmp_path, model, data, "judgebench", "rm_bench", replies_per_shard=6))
    assert sum(calls) == 36
    assert run.metrics["replies"] == {"all": 36, "computed": 18, "from_cache": 18}
    assert before.items() <= cache_files(tmp_path / "ws" / "scores").items()


def test_another_model_or_another_way_of_scoring_has_rewards_of_its_own(tmp_path: Path, model: str, data: Path, calls: list[int]) -> None:
    other = save_tiny_backbone(tmp_path / "other", head=True, seed=1)
    for folder, score in ((model, INLINE), (other, INLINE), (model, INLINE.model_copy(update={"max_length_tokens": 150}))):
        run_of(config_of(tmp_path, folder, data, "judgebench", score=score))
    assert sum(calls) == 3 * 8
    run_of(config_of(tmp_path, model, data, "judgebench", score=INLINE.model_copy(update={"max_tokens_per_batch": 100})))
    assert sum(calls) == 3 * 8  # the size of a batch is no way of scoring


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_a_cache_of_its_own_serves_several_workspaces(tmp_path: Path, model: str, data: Path, calls: list[int], where: str) -> None:
    cache = str(tmp_path / "cache") if where == "folder" else f"memory://{uuid.uuid4().hex}"
    for workspace in ("one", "two"):
        run_of(config_of(tmp_path, model, data, "judgebench", cache=cache, workspace=str(tmp_path / workspace)))
    assert sum(calls) == 8
    assert not (tmp_path / "one" / "scores").exists()


def test_the_cache_keeps_why_there_is_no_reward(tmp_path: Path, model: str, calls: list[int]) -> None:
    storage = Storage(str(tmp_path / "cache"))
    said = [{"role": "user", "content": "hello"}]
    wanted = conversations_of([(said, "fine"), (said, "x" * 500), (said, "fine")])
    config = config_of(tmp_path, model, tmp_path, "b")
    for _ in range(2):
        cache = ScoreCache(storage, model, INLINE)
        cache.fill(Run(storage, "evaluate", config), wanted)
        scores = [cache.get(name) for name in wanted]
        assert [score.drop_reason for score in scores] == [None, "too_long"]
        assert [score.reward is None for score in scores] == [False, True]
    assert sum(calls) == 1


def spoil(cache: Path, reason: str) -> None:
    """Write into every shard of the cache, for the first reply that has a reward, what a run leaves whose workers died of it."""
    for file in cache.rglob("rewards.*/*/shard-*.parquet"):
        table = pq.ParquetFile(file).read()
        rows = table.to_pylist()
        rows[0] |= {"reward": None, "drop_reason": reason}
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)


@pytest.mark.parametrize("reason", ["engine_crash", "non_finite_reward"])
def test_what_a_machine_did_not_manage_is_asked_again(tmp_path: Path, model: str, data: Path, calls: list[int], reason: str) -> None:
    config = config_of(tmp_path, model, data, "judgebench")
    first, summary = run_of(config)
    assert first.metrics["replies_without_reward"] == {}
    assert "without a reward" not in summary
    for attempt in range(1, 3):  # the second time the pool of the one reply that is missing has a verdict too
        spoil(tmp_path / "ws" / "scores", reason)
        calls.clear()
        again, _ = run_of(config)
        assert again.metrics["replies"] == {"all": 8, "computed": 1, "from_cache": 7}
        assert sum(calls) == 1, attempt
        assert again.metrics["judgebench/micro"] == first.metrics["judgebench/micro"]
    calls.clear()
    assert run_of(config)[0].metrics["replies"]["computed"] == 0
    assert calls == []


def test_replies_without_a_reward_are_told_by_reason(tmp_path: Path, model: str) -> None:
    write_lines(tmp_path / "long.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "x" * 500}, {"prompt": "q", "chosen": "b", "rejected": "c"}])
    run, summary = run_of(config_of(tmp_path, model, tmp_path, "long"))
    assert run.metrics["replies_without_reward"] == {"too_long": 1}
    assert "reward model: replies without a reward: too_long 1" in summary


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"attention": "varlen"}, {"compile_layers": True}, {"dtype": "bfloat16"}])
def test_rewards_of_another_device_or_way_are_not_given(tmp_path: Path, model: str, other: dict[str, Any]) -> None:
    storage = Storage(str(tmp_path / "cache"))
    wanted = conversations_of([([{"role": "user", "content": "hello"}], "fine")])
    cache = ScoreCache(storage, model, INLINE)
    cache.fill(Run(storage, "evaluate", config_of(tmp_path, model, tmp_path, "b")), wanted)
    assert len(ScoreCache(storage, model, INLINE)) == 1
    assert len(ScoreCache(storage, model, INLINE.model_copy(update=other))) == 0


def test_a_part_of_the_items_is_seeded_and_said(tmp_path: Path, model: str, data: Path) -> None:
    run, summary = run_of(config_of(tmp_path, model, data, "rm_bench", sample_fraction=0.5, seed=3))
    again, _ = run_of(config_of(tmp_path, model, data, "rm_bench", sample_fraction=0.5, seed=3))
    number = run.metrics["benchmarks"]["rm_bench"]["items"]
    assert 0 < number < 6
    assert again.metrics["benchmarks"] == run.metrics["benchmarks"]
    assert "a sample of 50% of the items, not the official set" in summary


def test_items_that_share_their_prompt_with_a_pool_are_named_and_left_out_of_the_clean_numbers(tmp_path: Path, model: str, data: Path) -> None:
    storage, pairs = Storage(str(tmp_path / "ws")), make_pairs(3).to_pylist()
    pairs[1]["prompt"] = [{"role": "user", "content": "question 2"}]  # a short prompt matches a turn that equals it, case and punctuation aside
    table = make_pairs(3).from_pylist(pairs, schema=make_pairs(3).schema)
    commit_pool(storage, "wild", "f" * 32, [write_pool_shard(storage, "wild", 0, table)], {})
    config = config_of(tmp_path, model, data, "rm_bench", "judgebench", contamination=ContaminationConfig(pools=("wild",)))
    run, summary = run_of(config)
    assert run.metrics["benchmarks"]["rm_bench"]["contaminated_items"] == ["chat/2"]
    assert run.metrics["benchmarks"]["judgebench"]["contaminated_items"] == ["j2"]
    assert "rm_bench: 1 of 6 items share their prompt with wild" in summary
    assert "rm_bench/clean/present_domains/hard" in run.metrics
    flags = [run.metrics[f"judgebench/{name}micro"] for name in ("", "clean/")]
    assert flags[0] * 4 - flags[1] * 3 in (0.0, 1.0)
    again, _ = run_of(config)
    assert [step["computed"] for step in again.steps if step["step"] == "benchmark overlap"] == [0]


def test_a_pair_file_still_gives_its_old_metrics(tmp_path: Path, model: str) -> None:
    replies = [("Blue.", "Seven."), ("Seven.", "Blue.")] * 2  # of a pair and its flip one is right
    rows = [json.dumps({"prompt": "Name a colour.", "chosen": chosen, "rejected": rejected}) for chosen, rejected in replies]
    (tmp_path / "held_out.jsonl").write_text("\n".join([*rows, "not json"]) + "\n")
    run, summary = run_of(config_of(tmp_path, model, tmp_path, "held_out"))
    assert run.metrics["held_out/num_pairs"] == 5
    assert (run.metrics["held_out/num_correct"], run.metrics["held_out/accuracy"]) == (2, 0.4)
    assert run.metrics["held_out/unscored"] == 1
    assert run.metrics["held_out/low"] < run.metrics["held_out/accuracy"] < run.metrics["held_out/high"]  # Wilson's, as ever
    assert "held_out" in summary


def test_what_cannot_be_found_says_what_would_be(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match=r"benchmark 'rewardbench': expected a file of pairs .*in a folder rewardbench or .* or from_hub=true"):
        find_benchmark("rewardbench", str(data))
    with pytest.raises(InputError, match=r"benchmark 'nonsense': .*known benchmarks: rewardbench, rewardbench2"):
        find_benchmark("nonsense", str(data))
    assert find_benchmark("rm_bench", str(data / "rm_bench")).files == find_benchmark("rm_bench", str(data)).files
    with pytest.raises(InputError, match="two benchmarks are called 'many'"):
        benchmark_files(config_of(tmp_path, "m", data, "many", str(data / "many.jsonl")))
    with pytest.raises(ConfigError, match="name a model to evaluate"):
        check_evaluate(config_of(tmp_path, "", data, "many"))
    (data / "rm_bench" / "code_filtered.json").write_text("[1]")
    with pytest.raises(InputError, match=r"code_filtered.json, row 0: wrong_type"):
        load_benchmark(find_benchmark("rm_bench", str(data)), config_of(tmp_path, "m", data, "many").reading.columns)


def test_a_url_or_an_absolute_path_is_looked_for_alone(tmp_path: Path) -> None:
    url = f"memory://bucket-{uuid.uuid4().hex}/held.jsonl"
    Storage(url.removesuffix("/held.jsonl")).write_bytes("held.jsonl", (json.dumps(MANY[0]) + "\n").encode())
    assert find_benchmark(url, ".").files == find_benchmark(url, str(tmp_path)).files == (url,)
    (tmp_path / "held.JSONL").write_text(json.dumps(MANY[0]) + "\n")
    for name, data in ((str(tmp_path / "held.JSONL"), "."), ("held.JSONL", str(tmp_path)), ("held.JSONL", f"{tmp_path}/")):
        (file,) = find_benchmark(name, data).files
        assert Path(file) == tmp_path / "held.JSONL"
    with pytest.raises(InputError, match=r"benchmark '/not/there.jsonl': expected a file of pairs"):
        find_benchmark("/not/there.jsonl", str(tmp_path))


def rewardbench_row(number: int) -> dict[str, object]:
    return {"id": number, "prompt": f"p{number}", "chosen": "a", "rejected": "b", "subset": "math-prm"}


def test_the_raw_split_of_rewardbench_is_never_read(tmp_path: Path) -> None:
    folder = tmp_path / "reward-bench" / "data"
    write_lines(folder / "raw-00000-of-00001.jsonl", [rewardbench_row(n) for n in range(5)])
    with pytest.raises(InputError, match=r"not of its official set: .*raw-00000-of-00001.jsonl"):
        find_benchmark("rewardbench", str(tmp_path))
    write_lines(folder / "filtered-00000-of-00001.jsonl", [rewardbench_row(n) for n in range(3)])
    assert [Path(file).name for file in find_benchmark("rewardbench", str(tmp_path)).files] == ["filtered-00000-of-00001.jsonl"]
    write_lines(tmp_path / "rmb" / "RMB_dataset" / "Pairwise_set" / "Helpfulness" / "one.json", [])
    write_lines(tmp_path / "rmb" / "results" / "Helpfulness.json", [])
    assert [Path(file).name for file in find_benchmark("rmb", str(tmp_path)).files] == ["one.json"]


def test_more_items_than_the_official_set_has_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "rewardbench" / "filtered.jsonl", [rewardbench_row(n) for n in range(2985)])
    columns = config_of(tmp_path, "m", tmp_path, "b").reading.columns
    assert len(load_benchmark(find_benchmark("rewardbench", str(tmp_path)), columns).read.items) == 2985
    write_lines(tmp_path / "rewardbench" / "own.jsonl", [rewardbench_row(2985)])
    with pytest.raises(InputError, match=r"'rewardbench': its official set has 2985 items, found 2986 in .*filtered.jsonl, .*own.jsonl"):
        load_benchmark(find_benchmark("rewardbench", str(tmp_path)), columns)


def test_a_file_that_repeats_another_one_is_refused_and_a_repeated_row_is_not(tmp_path: Path) -> None:
    columns = config_of(tmp_path, "m", tmp_path, "b").reading.columns
    votes = [{"question_id": n, "prompt": f"q{n % 3}", "response_1": "a", "response_2": "b", "winner": "model_a"} for n in range(4)]
    write_lines(tmp_path / "ppe_preference" / "one.jsonl", votes)  # people asked one question twice: that is the set's own
    assert len(load_benchmark(find_benchmark("ppe_preference", str(tmp_path)), columns).read.items) == 4
    write_lines(tmp_path / "ppe_preference" / "two.jsonl", [{**vote, "prompt": f"r{n}"} for n, vote in enumerate(votes[:3])] + votes[:1])
    assert len(load_benchmark(find_benchmark("ppe_preference", str(tmp_path)), columns).read.items) == 8
    write_lines(tmp_path / "ppe_preference" / "copy.jsonl", votes)
    with pytest.raises(InputError, match=r"'ppe_preference': .*copy.jsonl and .*one.jsonl hold 3 items in common: leave one of them out"):
        load_benchmark(find_benchmark("ppe_preference", str(tmp_path)), columns)


def test_the_job_names_what_is_missing_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert evaluate.main([f"workspace={tmp_path / 'ws'}", "model=nowhere/model", "benchmarks=[rm_bench]", f"data={tmp_path}"]) == 2
    assert evaluate.main([f"workspace={tmp_path / 'ws'}", "benchmarks=[rm_bench]", f"data={tmp_path}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "evaluate: name a model to evaluate (model=FOLDER), or judges"


def judge_of(server: LocalServer) -> JudgeStepConfig:
    engine = {"base_url": server.url, "model": "m", "api": "chat", "guidance": "none", "max_concurrent_requests": 4, "backoff_seconds": 0.01}
    return JudgeStepConfig.model_validate({"engine": engine, "judge": {"judge": "small", "max_input_tokens": 4000}})


def answers(choose: Callable[[list[str]], int]) -> Callable[[Seen, int], Answer]:
    """Answer by the two candidates in the prompt."""

    def answer(seen: Seen, number: int) -> Answer:
        lines = str(seen.body["messages"][0]["content"]).splitlines()
        candidates = [json.loads(line.partition(": ")[2]) for line in lines if line.startswith("Candidate ")]
        return Answer(chat(str(choose(candidates))))

    return answer


def test_a_judge_is_stripped_of_exemplars_and_attributes_and_asked_in_both_orders(tmp_path: Path) -> None:
    with LocalServer(answers(lambda candidates: 1 if candidates[0] < candidates[1] else 2)) as server:
        config = without_exemplars(judge_of(server))
        assert config.judge == JudgeConfig(judge="small", guideline="general", max_exemplars=0, attributes=(), max_input_tokens=4000)
        storage, pairs = Storage(str(tmp_path)), make_pairs(3)
        pool = commit_pool(storage, "pairs", "f" * 32, [write_pool_shard(storage, "pairs", 0, pairs)], {})
        worker = PlainJudgeWorker(config, [Sidecar(pool, "votes.small", "e" * 32)])
        votes, counters = worker(pairs, ShardKey(0, 0))
    assert counters["requests_sent"] == server.num_seen() == 6
    assert [{vote["verdict"] for vote in row} for row in votes["votes"].to_pylist()] == [{"rejected"}] * 3  # "no tea" comes before "tea is good"
    assert [sorted(vote["order"] for vote in row) for row in votes["votes"].to_pylist()] == [[0, 1]] * 3


@pytest.mark.ray
@pytest.mark.usefixtures("ray")
def test_a_judge_is_a_row_of_its_own_and_is_asked_once(tmp_path: Path, model: str, data: Path) -> None:
    # Prefers the longer candidate, and the first of two equally long: so equal lengths tie between the orders, and a tie is no win.
    with LocalServer(answers(lambda candidates: 1 if len(candidates[0]) >= len(candidates[1]) else 2)) as server:
        config = config_of(
            tmp_path, model, data, "rm_bench", "judgebench", judges=(judge_of(server),), score=INLINE.model_copy(update={"num_workers": 1})
        )
        run, summary = run_of(config)
        sent = server.num_seen()
        assert sent == 2 * (6 * 9 + 4)
        loaded = [load_benchmark(found, config.reading.columns) for found in benchmark_files(config).values()]
        outcomes = judge_outcomes(run, config.storage, loaded, config.judges[0])
        assert server.num_seen() == sent
    prefix = "rm_bench/judge.small"
    assert [run.metrics[f"{prefix}/chat/{level}"] for level in ("easy", "normal", "hard")] == [1.0, 0.0, 0.0]
    assert run.metrics["judgebench/judge.small/micro"] == 0.0
    assert run.metrics["judgebench/judge.small/unscored"] == 0
    assert all(outcome.answered for outcome in outcomes["rm_bench"])
    assert run.metrics["replies"]["computed"] == 36
    assert "small" in summary
