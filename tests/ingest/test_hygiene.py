"""Language, lengths, cycles and near-duplicates: against brute force and by hand."""

from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpref_ray.ingest.hygiene import (
    BAND_COLUMNS,
    NUM_HASHES,
    TEXT_KEYS_SCHEMA,
    Clusters,
    Links,
    find_clusters,
    find_language,
    find_links,
    group_key,
    group_name,
    in_cycle,
    minhash,
    shared_buckets,
    shingles,
    text_keys,
)
from synpref_ray.schema import POOL_SCHEMA, comparison_id, pair_id, prompt_group

PARAGRAPH = "The committee met on a cold evening to settle how the money from the village fair should be spent in the coming year. " * 2


def keys(*values: int) -> Any:
    return np.array(values, np.uint64)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pair(prompt: list[dict[str, str]], chosen: str = "yes", rejected: str = "no") -> dict[str, Any]:
    names = {"pair_id": pair_id, "comparison_id": comparison_id}
    row = {name: make(prompt, chosen, rejected) for name, make in names.items()}
    row |= {"prompt_group": prompt_group(prompt), "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row | {"source": "s", "source_id": None, "contradicted": False}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the capital of France, and how many people live there?", "en"),
        ("Wie viele Menschen leben in der Hauptstadt von Frankreich, und warum?", "de"),
        ("¿Cuántas personas viven en la capital de Francia y por qué?", "es"),
        ("法国的首都是哪里,有多少人住在那里?", "zh"),
    ],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    found, probability = find_language(text)
    assert found == language
    assert probability is not None
    assert 0.5 < probability <= 1


@pytest.mark.parametrize("text", ["", " ", "12 + 30 = ?", "🙂🙂", "___"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert find_language(text) == (None, None)


def test_facts_of_pairs() -> None:
    system = [{"role": "system", "content": "Sei kurz."}, *user("What is the weather like in the mountains today?")]
    pairs = pa.Table.from_pylist([pair(system, "Sunny.", "I do not know"), pair(user("?!"), "a", "b")], schema=POOL_SCHEMA)
    table = text_keys(pairs)
    assert table.schema.equals(TEXT_KEYS_SCHEMA)
    first, second = table.to_pylist()
    assert (first["language"], first["prompt_characters"], first["chosen_characters"], first["rejected_characters"]) == ("en", 57, 6, 13)
    assert group_name(first["group_key"]) == pairs["prompt_group"][0].as_py()[:16]
    assert len(first["signature"]) == NUM_HASHES
    assert second["language"] is None
    assert second["signature"] is None
    assert all(second[name] is None and first[name] is not None for name in BAND_COLUMNS)
    assert text_keys(pairs.slice(0, 0)).num_rows == 0


def test_shingles_leave_the_system_s_turn_out_and_span_no_turns() -> None:
    prompt = [{"role": "system", "content": "be nice to all"}, *user("One two, THREE four"), {"role": "assistant", "content": "yes"}]
    assert shingles(prompt) == {"one two three", "two three four", "yes"}
    assert shingles(user("!?")) == set()
    assert minhash(set()) is None


def test_similarity_is_estimated_and_does_not_depend_on_order() -> None:
    words = [f"w{number}" for number in range(500)]
    hashes = [minhash({*words[:start], *(f"other {number}" for number in range(start, 500))}) for start in (500, 400, 0)]
    similar = [float((hashes[0] == other).mean()) for other in hashes if other is not None]  # type: ignore[union-attr]
    assert similar[0] == 1.0
    assert abs(similar[1] - 400 / 600) < 0.15
    assert similar[2] < 0.05
    again = minhash(set(reversed(words)))
    assert again is not None
    assert hashes[0] is not None
    assert (again == hashes[0]).all()


def test_cycles_by_hand() -> None:
    #        a>b  b>c  c>a  c>d  e>f  f>e   and a>b in another group
    groups = keys(1, 1, 1, 1, 1, 1, 2)
    chosen = keys(10, 11, 12, 12, 14, 15, 10)
    rejected = keys(11, 12, 10, 13, 15, 14, 11)
    assert in_cycle(groups, chosen, rejected).tolist() == [True, True, True, False, True, True, False]
    assert in_cycle(keys(), keys(), keys()).tolist() == []
    assert in_cycle(keys(1), keys(2**64 - 1), keys(2**64 - 2)).tolist() == [False]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_a_pair_is_in_a_cycle_if_a_path_leads_back(edges: list[tuple[int, int, int]]) -> None:
    graph = nx.DiGraph([((group, a), (group, b)) for group, a, b in edges])
    expected = [nx.has_path(graph, (group, b), (group, a)) for group, a, b in edges]
    columns = [np.array([edge[place] for edge in edges], np.uint64) for place in range(3)]
    assert in_cycle(*columns).tolist() == expected


def test_buckets_of_one_group_are_left_out() -> None:
    bands, groups = keys(5, 5, 6, 6, 6, 7), keys(1, 1, 2, 3, 2, 4)
    assert sorted(shared_buckets(bands, groups).tolist()) == [2, 3]
    assert shared_buckets(keys(), keys()).tolist() == []


def test_links_and_clusters() -> None:
    signatures = np.zeros((6, NUM_HASHES), np.uint8)
    signatures[2:4] = 7  # groups 3 and 4 are alike, unlike 1 and 2
    signatures[4, :20] = 9  # five sixths of 1
    signatures[5, :40] = 8  # two thirds of 1
    bands, groups = keys(1, 1, 1, 1, 1, 1), keys(1, 2, 3, 4, 5, 6)
    links = find_links(bands, groups, signatures, 0.8)
    assert list(zip(links.first.tolist(), links.second.tolist(), strict=True)) == [(1, 2), (1, 5), (3, 4)]
    assert len(find_links(keys(), keys(), np.zeros((0, NUM_HASHES), np.uint8), 0.8).first) == 0
    clusters = find_clusters(Links(keys(9, 5, 2**64 - 1), keys(5, 4, 2**64 - 2)))
    assert clusters.name_groups(keys(9, 1, 4, 2**64 - 1, 5, 7)).tolist() == [4, 1, 4, 2**64 - 2, 4, 7]
    nothing = find_clusters(Links(keys(), keys()))
    assert nothing.name_groups(keys(3)).tolist() == [3]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_clusters_are_the_connected_parts(edges: list[tuple[int, int]]) -> None:
    clusters: Clusters = find_clusters(Links(np.array([a for a, _ in edges], np.uint64), np.array([b for _, b in edges], np.uint64)))
    graph = nx.Graph(edges)
    graph.add_nodes_from(range(13))
    expected = {node: min(part) for part in nx.connected_components(graph) for node in part}
    assert clusters.name_groups(np.arange(13, dtype=np.uint64)).tolist() == [expected[node] for node in range(13)]


def test_near_duplicate_prompts_meet_in_some_band() -> None:
    near = PARAGRAPH + "Nobody was happy with the plan that the mayor had made before."
    texts = [near, near.replace("happy", "pleased"), near.upper() + "!", "How do I boil an egg so that the yolk stays soft and the white is firm?"]
    table = text_keys(pa.Table.from_pylist([pair(user(text)) for text in texts], schema=POOL_SCHEMA))
    groups = table["group_key"].to_numpy()
    linked = set()
    for name in BAND_COLUMNS:
        places = shared_buckets(table[name].to_numpy(), groups)
        signatures = np.frombuffer(b"".join(table["signature"].take(places).to_pylist()), np.uint8).reshape(-1, NUM_HASHES)
        found = find_links(table[name].to_numpy()[places], groups[places], signatures, 0.8)
        linked |= set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert groups[0] == groups[2] == group_key(prompt_group(user(near)))
    assert linked == {(min(groups[0], groups[1]), max(groups[0], groups[1]))}
