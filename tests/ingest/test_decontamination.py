"""Benchmark prompts are found in pairs: by 13 words, by equality when short, and shorter overlaps are only proposed."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from synpref_ray.errors import InputError
from synpref_ray.ingest.benchmark_prompts import (
    BenchmarkFile,
    BenchmarkItem,
    DecontaminateConfig,
    count_benchmark_items,
    first_turn,
    read_benchmarks,
    split_words,
)
from synpref_ray.ingest.chunk import count_reasons, normalise_rows
from synpref_ray.ingest.decontamination import (
    FULL_NGRAM,
    MIN_NGRAM,
    BenchmarkIndex,
    MatchKind,
    drop_contaminated,
    find_matches,
    limit_candidates,
    matches_table,
)
from synpref_ray.ingest.fields import TextForm
from synpref_ray.ingest.readers import read_pair_file
from synpref_ray.ingest.source import FileFormat, SourceConfig

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
SHORT = "Name a quiet hobby, please."


def index_of(*prompts: str, candidates: bool = True) -> BenchmarkIndex:
    return BenchmarkIndex([BenchmarkItem("bench", str(place), split_words(text)) for place, text in enumerate(prompts)], candidates=candidates)


def find(index: BenchmarkIndex, prompt: str, chosen: str = "yes", rejected: str = "no") -> list[tuple[str, str, str, int]]:
    matches = index.find([{"role": "user", "content": prompt}], chosen, rejected)
    return [(match.kind.value, match.item, match.field, match.n) for match in matches]


def test_words() -> None:
    assert split_words("It's ÉTÉ, x_y 3.5!") == ("it", "s", "été", "x", "y", "3", "5")
    assert split_words("请用中文 reply カナ") == ("请", "用", "中", "文", "reply", "カ", "ナ")
    assert split_words("e\u0301te\u0301 \ufb01ne \uff26\uff55\uff4c\uff4c \uff76\uff85 co\u00adop\u200bera\u2060te STRASSE straße") == (
        *("été", "fine", "full", "カ", "ナ", "cooperate"),
        *("strasse", "strasse"),
    )
    assert split_words("\ufeffascii only") == split_words("ASCII, only!")
    assert first_turn([{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "user", "content": "r"}]) == "q"
    assert first_turn("q") == "q"
    assert first_turn([{"role": "assistant", "content": "a"}]) is None
    assert first_turn(3) is None
    assert first_turn([{"from": "human", "value": "q"}]) == "q"
    assert first_turn({"role": "user", "content": [{"type": "text", "text": "q"}]}) == "q"
    assert first_turn("\n\nHuman: q\n\nAssistant: a", TextForm.TRANSCRIPT) == "q"
    assert first_turn('[{"role": "user", "content": "q"}]', TextForm.JSON) == "q"
    assert first_turn('["q", "r"]', TextForm.JSON_TURNS) == "q"
    assert first_turn("[", TextForm.JSON) is None


def test_thirteen_words_anywhere_in_the_pair() -> None:
    index = index_of(LONG, candidates=False)
    words = LONG.split()
    for field, texts in [("prompt.0", (LONG,)), ("chosen", ("q", f"So: {LONG.upper()}!")), ("rejected", ("q", "a", f"x {' '.join(words[1:])} y"))]:
        assert find(index, *texts) == [("overlap", "0", field, 13)]
    assert find(index, " ".join(words[:12])) == []
    assert find(index, " ".join(words[:7]), " ".join(words[7:])) == []  # no n-gram spans two texts
    assert find(index, " ".join([*words[:6], "and", *words[6:]])) == []


def test_short_prompts_match_when_equal() -> None:
    index = index_of(SHORT, LONG, candidates=False)
    assert find(index, "name a QUIET hobby -- please") == [("exact", "0", "prompt.0", 5)]
    assert find(index, f"{SHORT} Now.") == []
    assert find(index, "q", SHORT) == []  # a reply is no user turn
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": SHORT}, {"role": "user", "content": SHORT}]
    assert [(match.kind.value, match.field) for match in index.find(turns, "a", "b")] == [("exact", "prompt.2")]


def test_shorter_overlaps_are_candidates_the_longest_of_each_item() -> None:
    index = index_of(LONG, SHORT)
    words = LONG.split()
    for n in range(MIN_NGRAM, FULL_NGRAM):
        assert find(index, f"Well, {' '.join(words[:n])} and so on", " ".join(words[:5])) == [("candidate", "0", "prompt.0", n)]
    assert find(index, " ".join(words[:4])) == []
    assert find(index, "q", "Can you name a quiet hobby please? I can.") == [("candidate", "1", "chosen", 5)]
    assert find(index, LONG, SHORT) == [("overlap", "0", "prompt.0", 13), ("candidate", "1", "chosen", 5)]
    assert find(index, f"{SHORT} So.", " ".join(words[:8]), " ".join(words[3:12])) == [
        ("candidate", "0", "rejected", 9),
        ("candidate", "1", "prompt.0", 5),
    ]  # a longer overlap with one item hides no other item


def test_candidates_beyond_the_limit_are_counted() -> None:
    index = index_of(*(f"{LONG} {number}" for number in range(5)), " ".join(LONG.split()[:7]), SHORT)
    asked = [("Well, one two three four five six seven, hm", SHORT, "n"), ("one two three four five", "c", "r"), (SHORT, "c", "r"), ("p", "c", "r")]
    found = [index.find([{"role": "user", "content": prompt}], *replies) for prompt, *replies in asked]
    assert [[match.item for match in matches] for matches in found] == [[*"0123456"], [*"012345"], ["6"], []]
    limited, left_out = limit_candidates(found, 2)
    assert [[(match.item, match.n) for match in matches] for matches in limited] == [[("0", 7), ("1", 7)], [("0", 5), ("1", 5)], [("6", 5)], []]
    assert left_out == 5 + 4
    assert limit_candidates(found, 7) == (found, 0)


def test_every_item_that_is_met_is_named_once() -> None:
    assert find(index_of(LONG, f"{LONG} fifteen", "something else"), f"{LONG} fifteen", LONG) == [
        ("overlap", "0", "prompt.0", 13),
        ("overlap", "1", "prompt.0", 13),
    ]
    assert find(index_of(SHORT, SHORT), SHORT) == [("exact", "0", "prompt.0", 5), ("exact", "1", "prompt.0", 5)]


def brute_force(items: list[tuple[str, ...]], text: tuple[str, ...], n: int) -> set[int]:
    grams = {text[start : start + n] for start in range(len(text) - n + 1)}
    return {number for number, words in enumerate(items) if any(words[start : start + n] in grams for start in range(len(words) - n + 1))}


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), WORDS)
def test_the_index_equals_brute_force(prompts: list[list[str]], text: list[str]) -> None:
    items = [tuple(words) for words in prompts]
    found = find(index_of(*(" ".join(words) for words in prompts)), "zzz", " ".join(text))
    longest = {number: n for n in range(MIN_NGRAM, FULL_NGRAM + 1) for number in brute_force(items, tuple(text), n)}
    assert {int(item): n for _, item, _, n in found} == longest
    assert len(found) == len(longest)
    assert {int(item) for kind, item, _, _ in found if kind == "overlap"} == brute_force(items, tuple(text), FULL_NGRAM)


def test_contaminated_pairs_become_rejects_that_name_the_match() -> None:
    rows = [{"prompt": prompt, "chosen": "x", "rejected": "y", "id": prompt[:3]} for prompt in ("fine", LONG, SHORT, " ".join(LONG.split()[:8]))]
    chunk = normalise_rows(rows, SourceConfig(name="mine", path="x"), file="f")
    matches = find_matches(chunk.pairs, index_of(LONG, SHORT))
    clean = drop_contaminated(chunk, matches)
    assert [pair["source_id"] for pair in clean.pairs.to_pylist()] == ["fin", "one"]
    assert (count_reasons(clean.rejects), clean.num_records, clean.num_rows_read) == ({"contaminated": 2}, 4, 4)
    named = json.loads(clean.rejects["row_json"][0].as_py())
    assert named["contamination"] == {
        "kind": "overlap",
        "benchmark": "bench",
        "item": "0",
        "field": "prompt.0",
        "n": 13,
        "ngram": " ".join(LONG.split()[:13]),
    }
    assert (named["prompt"][0]["content"], named["source_id"]) == (LONG, "one")
    report = matches_table(chunk.pairs, matches).to_pylist()
    assert [(line["row"], line["kind"]) for line in report] == [(1, "overlap"), (2, "exact"), (3, "candidate")]
    assert report[0]["pair_id"] == chunk.pairs["pair_id"][1].as_py()


def benchmark(folder: Path, name: str, content: Any) -> BenchmarkFile:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(data)
    return BenchmarkFile(path=str(folder / name), name=name)


def test_benchmark_files_of_their_own_formats(tmp_path: Path) -> None:
    files = (
        benchmark(tmp_path, "array.json", [{"id": 7, "prompt": "Array prompt"}, {"prompt": None}]),
        benchmark(tmp_path, "lines.jsonl", b'{"question": "Line prompt", "pair_id": "p"}\n{"question": "...!"}\n'),
        benchmark(tmp_path, "packed.json.gz", gzip.compress(b'[{"conversation_input": [{"role": "user", "content": "Packed"}], "pair_uid": "u"}]')),
    )
    assert read_benchmarks(DecontaminateConfig(benchmarks=files)) == [
        BenchmarkItem("array.json", "7", ("array", "prompt")),
        BenchmarkItem("lines.jsonl", "p", ("line", "prompt")),
        BenchmarkItem("packed.json.gz", "u", ("packed",)),
    ]
    assert count_benchmark_items(DecontaminateConfig(benchmarks=files)) == {
        "array.json": {"read": 1, "skipped": 1},
        "lines.jsonl": {"read": 1, "skipped": 1},
        "packed.json.gz": {"read": 1, "skipped": 0},
    }
    with pytest.raises(InputError, match=r"benchmark odd\.json: no row of .* has a prompt in one of the columns prompt, question"):
        read_benchmarks(DecontaminateConfig(benchmarks=(benchmark(tmp_path, "odd.json", [{"text": "x"}]),)))


def test_items_of_one_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, prompts in (("one", ("First", "Second")), ("two", ("Other", "Second"))):  # numbered by row, in each file
        (tmp_path / "b" / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    items = read_benchmarks(DecontaminateConfig(benchmarks=(BenchmarkFile(path=str(tmp_path / "b"), name="b"),)))
    assert [(item.item, item.words) for item in items] == [("0", ("first",)), ("1", ("second",)), ("0#2", ("other",)), ("1", ("second",))]


def test_no_file_of_a_benchmark_s_folder_is_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    lines = benchmark(tmp_path / "bench", "lines.jsonl", b'{"prompt": "Line prompt"}\n')
    (tmp_path / "bench" / "README.md").write_text("about")
    folder = BenchmarkFile(path=str(tmp_path / "bench"), name="b")
    assert len(read_benchmarks(DecontaminateConfig(benchmarks=(folder,)))) == 1
    array = benchmark(tmp_path / "bench", "array.json", [{"prompt": "Array prompt"}])
    with pytest.raises(
        InputError, match=r"benchmark b: .* read only where they are named: .*/bench/array\.json; give each as a benchmark"
    ) as refused:
        read_benchmarks(DecontaminateConfig(benchmarks=(folder,)))
    assert str(refused.value).endswith(f"by a pattern, as in path={tmp_path}/bench/*.jsonl")
    assert len(read_benchmarks(DecontaminateConfig(benchmarks=(lines, array)))) == 2
    assert len(read_benchmarks(DecontaminateConfig(benchmarks=(BenchmarkFile(path=f"{tmp_path}/bench/*.jsonl", name="b"),)))) == 1


def test_a_file_without_prompts_among_others_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    benchmark(tmp_path, "one.json.gz", gzip.compress(b'[{"prompt": "One prompt"}]'))
    benchmark(tmp_path, "metrics.json", {"accuracy": 0.5})
    folder = BenchmarkFile(path=str(tmp_path), name="b", format=FileFormat.JSON)
    remedy = rf"; if it holds none, name the files with prompts by a pattern, as in path={re.escape(str(tmp_path))}/\*\.json\.gz$"
    with pytest.raises(InputError, match=rf"benchmark b: .*/metrics\.json holds dict where a JSON array .*{remedy}"):
        read_benchmarks(DecontaminateConfig(benchmarks=(folder,)))
    benchmark(tmp_path, "metrics.json", [{"accuracy": 0.5}])
    with pytest.raises(InputError, match=rf"benchmark b: no row of .*/metrics\.json has a prompt .*{remedy}"):
        read_benchmarks(DecontaminateConfig(benchmarks=(folder,)))
    named = folder.model_copy(update={"path": f"{tmp_path}/*.json.gz"})
    assert len(read_benchmarks(DecontaminateConfig(benchmarks=(named,)))) == 1


def test_the_examples_of_the_docs_read_the_published_folders(shared_data: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8").replace("/data/", f"{shared_data}/")
    listed = re.search(r"^  benchmarks: (\[.*?\])   # ", text, re.MULTILINE)
    single = re.search(r"`(\{path: .*rm_bench.*format: json.*\})`", text)
    assert listed
    assert single
    config = DecontaminateConfig.model_validate({"benchmarks": [*yaml.safe_load(listed[1]), yaml.safe_load(single[1])]})
    assert count_benchmark_items(config) == {
        "rm_bench_chat": {"read": 129, "skipped": 0},
        "judgebench": {"read": 620, "skipped": 0},
        "rm_bench": {"read": 798, "skipped": 0},
    }
    whole = DecontaminateConfig(benchmarks=(BenchmarkFile(path=f"{shared_data}/judgebench", name="judgebench"),))
    with pytest.raises(InputError, match=r"expected_metrics\.json; give each .*as in path=.*/judgebench/\*\.jsonl\.gz$"):
        read_benchmarks(whole)


def test_rm_bench_chat_shares_ten_prompts_with_real_pairs(shared_data: Path) -> None:
    """The positive control of the data's README: 10 equal user turns, all 10 found, and nothing else."""
    file = shared_data / "rm_bench" / "chat_filtered.json.gz"
    items = read_benchmarks(DecontaminateConfig(benchmarks=(BenchmarkFile(path=str(file), name="rm_bench"),)))
    assert len(items) == 129
    index = BenchmarkIndex(items)
    path = str(shared_data / "human_extra" / "train.parquet")
    found, equal = set(), set()
    prompts = {item.words: item.item for item in items}
    for chunk in read_pair_file(path, SourceConfig(name="human_extra", path=path)):
        for pair, matches in zip(chunk.pairs.to_pylist(), find_matches(chunk.pairs, index), strict=True):
            found |= {match.item for match in matches if match.kind is not MatchKind.CANDIDATE}
            equal |= {prompts[words] for turn in pair["prompt"] if (words := split_words(turn["content"])) in prompts}
    assert len(equal) == 10
    assert found == equal
