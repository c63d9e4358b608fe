"""The whole of ingest over broken corpora: every record of every source ends in one place, and the counts say so."""

import functools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.ingest.catalogue import catalogue
from synpref_ray.ingest.readers import read_pair_file
from synpref_ray.ingest.source import list_source_files
from synpref_ray.pipeline.ingest import check_ingest, run_ingest
from synpref_ray.pipeline.ingest_sources import IngestConfig, resolve_sources
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import open_pool, pool_exists

FIXTURES = Path(__file__).parents[1] / "ingest" / "fixtures"
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compared": {"adapter": {"kind": "comparison", "a": "chosen", "b": "rejected", "verdict": {"by": "strength", "strength": "x"}}},
    "rated": {"adapter": {"kind": "ratings", "replies": "list", "text": "text", "scores": ["x"], "pairs": {"max_pairs": 3}}},
    "grouped": {"adapter": {"kind": "rated_rows", "reply": "chosen", "scores": ["x"]}},
}
ROUTES = {"plain": "seed", "compared": "unverified", "rated": "wild", "grouped": "wild"}


GOOD_ROWS: list[dict[str, Any]] = [  # so that every source has a pair
    {"prompt": "good?", "chosen": reply, "rejected": "no", "x": place, "list": [{"text": "a", "x": 1}, {"text": "b", "x": 2}]}
    for place, reply in ((1, "yes"), (2, "indeed"))
]


def broken_row(chance: random.Random) -> Any:
    text: list[Any] = ["", " ", "a", "b", "c", None, 3, LONG, [{"role": "user", "content": "q"}], [{"role": "robot"}], {}]
    prompt: list[Any] = ["p", "q", f"Well, {LONG}", " ", None, "short one"]
    row = {
        "prompt": chance.choice(prompt),
        "chosen": chance.choice(text),
        "rejected": chance.choice(text),
        "x": chance.choice([1, 2, -1, 0, "N/A", None]),
        "list": chance.choice([None, [], [{"text": chance.choice(text), "x": chance.choice([1, 2, None])} for _ in range(4)]]),
    }
    return chance.choice([row, row, row, row, {key: row[key] for key in chance.sample(list(row), 3)}, 7])


def write_corpus(folder: Path, num_rows: int, seed: int) -> None:
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in KINDS:
        lines = [json.dumps(broken_row(chance)).encode() for _ in range(num_rows // len(KINDS))]
        for place in range(0, len(lines), 17):
            lines[place] = chance.choice([b"{broken", b"\xff\xfe", b"[1, 2]", lines[place]])
        lines[-2:] = [json.dumps(row).encode() for row in GOOD_ROWS]
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "bench.json").write_text(json.dumps([{"prompt": LONG}, {"prompt": "Short one!"}]))


def ingest(folder: Path, workspace: Path, **more: Any) -> dict[str, Any]:
    sources = [{"name": name, "path": str(folder / f"{name}.jsonl"), "route": ROUTES[name], **kind} for name, kind in KINDS.items()]
    decontaminate = {"benchmarks": [{"path": str(folder / "bench.json"), "name": "bench"}], **more}
    config = IngestConfig.model_validate(
        {"sources": sources, "workspace": str(workspace), "max_rejected_fraction": 1.0, "max_pairs_per_shard": 97, "decontaminate": decontaminate}
    )
    run = Run(config.storage, "ingest", config)
    run_ingest(config, run)
    metrics = run.metrics
    check_counts(config, folder, metrics)
    return metrics


def check_counts(config: IngestConfig, folder: Path, metrics: dict[str, Any]) -> None:
    storage = config.storage
    rejects: dict[str, dict[str, int]] = {name: {} for name in KINDS}
    for path in storage.list_files("rejects/ingest"):
        for row in storage.read_table(path, ["source", "reason"]).to_pylist():
            rejects[row["source"]][row["reason"]] = rejects[row["source"]].get(row["reason"], 0) + 1
    pooled: dict[str, int] = dict.fromkeys(KINDS, 0)
    for route in ("seed", "unverified", "wild"):
        if pool_exists(storage, route):
            for name in open_pool(storage, route).read_all(["source"])["source"].to_pylist():
                pooled[name] += 1
    for name, counts in metrics["sources"].items():
        assert counts["rows"] == sum(1 for line in (folder / f"{name}.jsonl").read_bytes().split(b"\n") if line)
        assert counts["kept"] == pooled[name]
        told = {**counts["rejected"], "duplicate": counts["duplicates"], "contaminated": counts["contaminated"]}
        assert {reason: count for reason, count in told.items() if count} == rejects[name]
        assert counts["records"] == counts["kept"] + sum(rejects[name].values())
        if name in ("plain", "compared"):
            assert counts["records"] == counts["rows"]
    assert metrics["records"] == sum(counts["records"] for counts in metrics["sources"].values())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_counts_add_up_on_a_fuzzed_corpus(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, 240, seed)
    ingest(folder, folder / "ws")


@pytest.mark.slow
def test_counts_add_up_on_twenty_thousand_broken_rows(tmp_path: Path) -> None:
    write_corpus(tmp_path, 20_000, seed=20)
    metrics = ingest(tmp_path, tmp_path / "ws")
    assert metrics["rows_read"] == 20_000
    assert metrics["rejected"]["contaminated"] > 0
    assert metrics["rejected"]["duplicate"] > 0


def test_reporting_drops_nothing_and_names_the_matches(tmp_path: Path) -> None:
    write_corpus(tmp_path, 240, seed=5)
    dropped = ingest(tmp_path, tmp_path / "drop")
    reported = ingest(tmp_path, tmp_path / "report", action="report")
    assert "contaminated" not in reported["rejected"]
    assert reported["benchmarks"] == dropped["benchmarks"]
    assert reported["benchmark_items"] == {"bench": {"read": 2, "skipped": 0}}
    assert set(dropped["benchmarks"]["bench"]) >= {"overlap", "exact"}
    (file, *_) = sorted((tmp_path / "report" / "decontamination").rglob("*.parquet"))
    line = pq.read_table(file).to_pylist()[0]
    assert (line["benchmark"], line["source"]) == ("bench", "plain")
    assert line["ngram"] in {" ".join(LONG.split()[start : start + n]) for start in range(14) for n in range(5, 14)} | {"short one"}


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=24), max_rows=st.integers(1, 25))
def test_counts_of_matches_do_not_depend_on_where_chunks_are_cut(tmp_path_factory: pytest.TempPathFactory, order: list[int], max_rows: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    prompts = (LONG, "Short one!", " ".join(LONG.split()[:6]), "Else?")
    rows = [{"prompt": prompts[place], "chosen": "Yes.", "rejected": "No."} for place in order]  # equal pairs, near and far
    (folder / "wild.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench.json").write_text(json.dumps([{"prompt": LONG}, {"prompt": "Short one!"}]))
    decontaminate = {"benchmarks": [{"path": str(folder / "bench.json"), "name": "bench"}], "action": "report"}
    given_settings = {"data": str(folder / "wild.jsonl"), "workspace": str(folder / "ws"), "decontaminate": decontaminate}
    config = IngestConfig.model_validate(given_settings)
    run = Run(config.storage, "ingest", config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("synpref_ray.pipeline.ingest.read_pair_file", functools.partial(read_pair_file, max_rows=max_rows))
        run_ingest(config, run)
    wanted = {kind: order.count(place) for place, kind in enumerate(("overlap", "exact", "candidate")) if place in order}
    assert run.metrics.get("benchmarks", {}) == ({"bench": wanted} if wanted else {})


def test_fingerprints_know_the_matcher_only_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.jsonl").write_text('{"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}\n')
    (tmp_path / "bench.json").write_text('[{"prompt": "other"}]')
    benchmarks = {"benchmarks": [{"path": str(tmp_path / "bench.json")}]}

    def fingerprints(version: int) -> list[str]:
        monkeypatch.setattr("synpref_ray.pipeline.ingest.MATCHER_VERSION", version)
        found = []
        for number, decontaminate in enumerate(({}, benchmarks)):
            workspace = str(tmp_path / f"ws{version}-{number}")
            config = IngestConfig.model_validate({"data": str(tmp_path / "data"), "workspace": workspace, "decontaminate": decontaminate})
            run_ingest(config, Run(config.storage, "ingest", config))
            found.append(open_pool(config.storage, "seed").fingerprint)
        return found

    first, second = fingerprints(1), fingerprints(2)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_benchmark_that_changes_under_its_path_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.jsonl").write_text('{"prompt": "Hi there?", "chosen": "Hi.", "rejected": "No."}\n')
    found = []
    for number, prompt in enumerate(("other", "hi there")):  # one process, one path
        (tmp_path / "bench.json").write_text(json.dumps([{"prompt": prompt}]))
        decontaminate = {"benchmarks": [{"path": str(tmp_path / "bench.json"), "name": "bench"}]}
        config = IngestConfig.model_validate(
            {"data": str(tmp_path / "data"), "workspace": str(tmp_path / f"ws{number}"), "decontaminate": decontaminate}
        )
        run = Run(config.storage, "ingest", config)
        run_ingest(config, run)
        found.append(run.metrics["rejected"].get("contaminated", 0))
    assert found == [0, 1]


def test_files_staged_without_ids_are_staged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.jsonl").write_text('{"prompt": "Hi there?", "chosen": "Hi.", "rejected": "No."}\n7\n')
    config = IngestConfig.model_validate({"data": str(tmp_path / "data"), "workspace": str(tmp_path / "ws")})

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("synpref_ray.pipeline.pools.make_plan", stop)
        with pytest.raises(KeyboardInterrupt):
            run_ingest(config, Run(config.storage, "ingest", config))
    (done,) = (tmp_path / "ws" / "staging").rglob("done.json")
    old = json.loads(done.read_text())  # as an earlier version wrote it
    del old["pieces"]
    done.write_text(json.dumps({**old, "chunks": 1}))
    run = Run(config.storage, "ingest", config)
    run_ingest(config, run)
    assert (run.metrics["records"], run.metrics["pools"], run.metrics["rejected"]) == (2, {"seed": 1}, {"duplicate": 0, "wrong_type": 1})
    assert not list((tmp_path / "ws" / "staging").rglob("*.arrow"))


def test_the_record_tells_licences_and_where_sets_came_from(tmp_path: Path) -> None:
    sources = [
        {"name": name, "catalogue": name, "path": str(FIXTURES / f"{name}.jsonl"), "format": "jsonl"}
        for name in ("helpsteer3", "pku_saferlhf", "skywork_80k")
    ]
    config = IngestConfig.model_validate({"sources": sources, "workspace": str(tmp_path / "ws")})
    run = Run(config.storage, "ingest", config)
    table = run_ingest(config, run)
    assert run.metrics["licences"] == {
        "cc-by-4.0": {"pairs": 2, "sources": ["helpsteer3"]},
        "cc-by-nc-4.0": {"pairs": 2, "sources": ["pku_saferlhf"]},
        "unknown": {"pairs": 2, "sources": ["skywork_80k"]},
    }
    counts = run.metrics["sources"]["helpsteer3"]
    assert (counts["hub"], counts["label_kind"], counts["rejected"]) == ("nvidia/HelpSteer3", "human", {"tied": 1})
    assert run.metrics["pools"] == {"seed": 2, "unverified": 4}
    assert "rejected: tied" in table


def test_where_catalogue_sources_are_read(tmp_path: Path) -> None:
    (tmp_path / "helpsteer3" / "preference").mkdir(parents=True)
    (tmp_path / "helpsteer3" / "preference" / "train.jsonl.gz").write_bytes(b"")
    (tmp_path / "nectar").mkdir()
    sources = [{"name": "helpsteer3"}, {"name": "nectar"}]
    placed = resolve_sources(IngestConfig.model_validate({"sources": sources, "copies": str(tmp_path)}))
    assert [source.path for source in placed] == [f"{tmp_path}/helpsteer3/preference/train.jsonl.gz", f"{tmp_path}/nectar"]
    streamed = resolve_sources(IngestConfig.model_validate({"sources": sources, "from_hub": True}))
    assert [(source.path, source.hub.dataset) for source in streamed] == [("", "nvidia/HelpSteer3"), ("", "berkeley-nest/Nectar")]
    check_ingest(IngestConfig.model_validate({"sources": sources, "from_hub": True}))
    with pytest.raises(ConfigError, match="source 'nectar' has no path; give it a path, or copies=FOLDER, or from_hub=true"):
        resolve_sources(IngestConfig.model_validate({"sources": [{"name": "nectar"}]}))
    with pytest.raises(ConfigError, match="source 'mine' has no path; give it a path"):
        resolve_sources(IngestConfig.model_validate({"sources": [{"name": "mine"}]}))


PUBLISHED = {
    "hh_rlhf": (
        [f"{folder}/{split}.jsonl.gz" for folder in ("harmless-base", "helpful-base", "helpful-online") for split in ("train", "test")]
        + ["helpful-rejection-sampled/train.jsonl.gz", "red-team-attempts/red_team_attempts.jsonl.gz", "red-team-attempts/train.jsonl.gz"],
        [f"{folder}/train.jsonl.gz" for folder in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")],
    ),
    "ultrafeedback_binarized": (
        [f"data/{split}-00000-of-00001.parquet" for split in ("train_prefs", "train_sft", "train_gen", "test_prefs", "test_sft", "test_gen")],
        ["data/train_prefs-00000-of-00001.parquet"],
    ),
    "wildguardmix": (["train/wildguard_train.parquet", "test/wildguard_test.parquet"], ["train/wildguard_train.parquet"]),
    "dpo_en_20k": (["dpo_en.json", "dpo_zh.json"], ["dpo_en.json"]),
    "dpo_zh_20k": (["dpo_en.json", "dpo_zh.json"], ["dpo_zh.json"]),
    "helpsteer": (["train.jsonl.gz", "validation.jsonl.gz"], ["train.jsonl.gz"]),
    "helpsteer2": (["train.jsonl.gz", "validation.jsonl.gz", "preference/preference.jsonl.gz"], ["train.jsonl.gz"]),
    "pku_saferlhf": ([f"data/Alpaca-7B/{split}.jsonl" for split in ("train", "test")], ["data/Alpaca-7B/train.jsonl"]),
    "beavertails": ([f"round0/{size}/{split}.jsonl.gz" for size in ("30k", "330k") for split in ("train", "test")], ["round0/330k/train.jsonl.gz"]),
    "shp": (
        [f"{site}/{split}.json" for site in ("askhr", "askcarguys") for split in ("train", "validation")],
        ["askcarguys/train.json", "askhr/train.json"],
    ),
    "shp_2": ([f"reddit/askhr/{split}.json" for split in ("train", "test")], ["reddit/askhr/train.json"]),
    "stack_exchange_paired": ([f"data/{part}/a.parquet" for part in ("evaluation", "finetune", "reward", "rl")], None),
    "magpie_air_dpo": ([f"data/{split}-0.parquet" for split in ("train", "test")], ["data/train-0.parquet"]),
}
"""By row: files as the repository has them, and those that are to be read (None: all but the first)."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_copy_as_published_is_read_without_its_held_out_splits(tmp_path: Path, name: str) -> None:
    files, wanted = PUBLISHED[name]
    for file in files:
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).touch()
    (source,) = resolve_sources(IngestConfig.model_validate({"sources": [{"name": name}], "copies": str(tmp_path)}))
    assert list(list_source_files(source)) == [f"{tmp_path}/{name}/{file}" for file in (files[1:] if wanted is None else wanted)]


def test_a_folder_of_a_copy_is_read_by_the_end_of_the_pattern(tmp_path: Path) -> None:
    for file in ("hh/helpful-online/train.jsonl.gz", "hh/helpful-online/test.jsonl.gz", "flat/wildguard_test.parquet"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    sources = [
        {"name": "part", "catalogue": "hh_rlhf", "path": f"{tmp_path}/hh/helpful-online"},
        {"name": "flat", "catalogue": "wildguardmix", "path": f"{tmp_path}/flat"},
    ]
    part, flat = resolve_sources(IngestConfig.model_validate({"sources": sources}))
    assert list_source_files(part) == (f"{tmp_path}/hh/helpful-online/train.jsonl.gz",)
    with pytest.raises(InputError, match=r"found no file at .*/flat/train/\*\.parquet"):
        list_source_files(flat)  # nothing is read on the chance that it is no held-out split


def test_ties_are_no_sign_of_a_wrong_format(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "a": "x", "b": f"y{number}", "s": 0 if number else 1} for number in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = {"kind": "comparison", "a": "a", "b": "b", "verdict": {"by": "strength", "strength": "s"}}
    source = {"name": "mine", "path": str(tmp_path / "a.jsonl"), "adapter": adapter}
    config = IngestConfig.model_validate({"sources": [source], "workspace": str(tmp_path / "ws")})
    run = Run(config.storage, "ingest", config)
    run_ingest(config, run)
    assert run.metrics["rejected"] == {"duplicate": 0, "tied": 8}
    wrong = {**source, "adapter": {**adapter, "a": "left"}}
    config = IngestConfig.model_validate({"sources": [wrong], "workspace": str(tmp_path / "other"), "max_rejected_fraction": 0.1})
    with pytest.raises(InputError, match="1 of 9 rows refused"):
        run_ingest(config, Run(config.storage, "ingest", config))


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "comparison", "a": "a", "b": "b", "verdict": {"by": "strength", "strength": "zero"}},
        {"kind": "rated_rows", "reply": "answer", "scores": ["s"]},
        {"kind": "rated_rows", "reply": "empty", "scores": ["s"]},
        {"kind": "ratings", "replies": "list", "text": "text", "scores": ["s"]},
    ],
)
def test_a_source_without_one_pair_is_an_error_that_names_its_columns(tmp_path: Path, adapter: dict[str, Any]) -> None:
    rows = [{"prompt": "q", "a": "x", "b": f"y{number}", "s": number, "zero": 0, "empty": None, "list": []} for number in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"name": "mine", "path": str(tmp_path / "a.jsonl"), "adapter": adapter}
    config = IngestConfig.model_validate({"sources": [source], "workspace": str(tmp_path / "ws"), "max_rejected_fraction": 1.0})
    for _ in range(2):  # also when its files are staged already
        with pytest.raises(InputError, match=r"'mine': 9 rows and not one pair .*; the columns of a row: a, b, empty, list, prompt, s, zero;"):
            run_ingest(config, Run(config.storage, "ingest", config))


def test_fixtures_of_several_sources_together_add_up(tmp_path: Path) -> None:
    names = sorted(catalogue())[:4]
    sources = [{"name": name, "catalogue": name, "path": str(FIXTURES / f"{name}.jsonl"), "format": "jsonl"} for name in names]
    config = IngestConfig.model_validate({"sources": sources, "workspace": str(tmp_path / "ws"), "max_rejected_fraction": 1.0})
    run = Run(config.storage, "ingest", config)
    run_ingest(config, run)
    expected = json.loads((FIXTURES / "expected.json").read_text())
    assert {name: counts["kept"] for name, counts in run.metrics["sources"].items()} == {name: expected[name]["pairs"] for name in names}
