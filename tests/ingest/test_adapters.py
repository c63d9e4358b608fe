"""Rows become pairs by their kind: the stated rules, ties, and rows that are broken in every way."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from synpref_ray.errors import InputError
from synpref_ray.ingest.adapt import adapt_rows
from synpref_ray.ingest.adapters import Adapter, RatedRowsAdapter, propose_group, propose_pairs
from synpref_ray.ingest.chunk import Chunk
from synpref_ray.ingest.pairing import Better, Candidate, PairRule, Refusal, pair_up
from synpref_ray.ingest.rows import FileRow, plain_rows
from synpref_ray.ingest.source import SourceConfig
from synpref_ray.schema import DropReason


def adapter(**values: Any) -> Any:
    return TypeAdapter(Adapter).validate_python(values)


def one(row: dict[str, Any], **values: Any) -> Any:
    (proposal,) = propose_pairs(row, adapter(**values))
    return proposal.reason if isinstance(proposal, Refusal) else (proposal.prompt, proposal.chosen, proposal.rejected)


def marks(proposals: list[Any]) -> list[str]:
    return [proposal.mark for proposal in proposals]


LABEL = {"by": "label", "label": "winner", "a": ["A", "1"], "b": ["B", "2"], "tie": ["tie"]}


@pytest.mark.parametrize(
    ("winner", "expected"),
    [
        ("A", "x"),
        (" a ", "x"),
        (1, "x"),
        (1.0, "x"),
        ("B", "y"),
        (2, "y"),
        ("TIE", DropReason.TIED),
        ("C", DropReason.UNKNOWN_LABEL),
        ("", DropReason.UNKNOWN_LABEL),
        (True, DropReason.UNKNOWN_LABEL),
        ([], DropReason.UNKNOWN_LABEL),
        (None, DropReason.MISSING_FIELD),
    ],
)
def test_labels(winner: Any, expected: Any) -> None:
    found = one({"prompt": "q", "a": "x", "b": "y", "winner": winner}, kind="comparison", a="a", b="b", verdict=LABEL)
    assert found == expected if isinstance(expected, DropReason) else found[1] == expected


@pytest.mark.parametrize(
    ("strength", "expected"),
    [(-3, "x"), (2, "y"), ("-1", "x"), (0, DropReason.TIED), (None, DropReason.MISSING_SCORE), ("strong", DropReason.MISSING_SCORE)],
)
def test_signed_strengths(strength: Any, expected: Any) -> None:
    row = {"prompt": "q", "a": "x", "b": "y", "s": strength}
    found = one(row, kind="comparison", a="a", b="b", verdict={"by": "strength", "strength": "s"})
    assert found == expected if isinstance(expected, DropReason) else found[1] == expected


def test_scores_and_flags() -> None:
    scores = {"kind": "comparison", "a": "a", "b": "b", "verdict": {"by": "scores", "score_a": "s.0", "score_b": "s.1"}}
    assert one({"prompt": "q", "a": "x", "b": "y", "s": [0.5, -0.5]}, **scores) == ("q", "x", "y")
    assert one({"prompt": "q", "a": "x", "b": "y", "s": [0, 1]}, **scores) == ("q", "y", "x")
    assert one({"prompt": "q", "a": "x", "b": "y", "s": [1, 1.0]}, **scores) is DropReason.TIED
    assert one({"prompt": "q", "a": "x", "b": "y", "s": [1]}, **scores) is DropReason.MISSING_SCORE
    flags = {"kind": "comparison", "a": "a", "b": "b", "verdict": {"by": "flags", "a": "wa", "b": "wb", "tie": "t"}}
    for given_flags, expected in [((1, 0, 0), ("q", "x", "y")), (("0", "1", "0"), ("q", "y", "x"))]:
        assert one({"prompt": "q", "a": "x", "b": "y", **dict(zip(("wa", "wb", "t"), given_flags, strict=True))}, **flags) == expected
    for given_flags, reason in [((0, 0, 1), DropReason.TIED), ((1, 1, 0), DropReason.UNKNOWN_LABEL), ((0, 0, None), DropReason.UNKNOWN_LABEL)]:
        assert one({"prompt": "q", "a": "x", "b": "y", **dict(zip(("wa", "wb", "t"), given_flags, strict=True))}, **flags) is reason


def test_turn_lists_are_woven() -> None:
    kind = {"kind": "comparison", "a": "a", "b": "b", "replies": "json_turns", "verdict": {"by": "strength", "strength": "s"}}
    prompt, chosen, rejected = one({"prompt": '["p", "q"]', "a": '["x", "y"]', "b": ["x", "z"], "s": 1}, **kind)
    assert prompt is None
    assert [message["content"] for message in chosen] == ["p", "x", "q", "z"]
    assert [message["role"] for message in rejected] == ["user", "assistant"] * 2
    assert one({"prompt": '["p"]', "a": "[]", "b": '["x"]', "s": 1}, **kind) is DropReason.BAD_ROLE_ORDER
    assert one({"prompt": "[", "a": "[]", "b": "[]", "s": 1}, **kind) is DropReason.INVALID_JSON
    assert one({"prompt": '["p"]', "a": '["x"]', "s": 1}, **kind) is DropReason.MISSING_FIELD


def test_pairs_of_columns() -> None:
    row = {"q": "ask", "good": " yes ", "bad": "no", "lead": "So: ", "chat": {"from": "gpt", "value": "hm"}}
    fields = {"fields": ["q"]}
    assert one(row, kind="pair", prompt=fields, chosen="good", rejected="bad") == ("ask", " yes ", "no")
    assert one(row, kind="pair", prompt=fields, chosen="good", rejected="bad", strip=True) == ("ask", "yes", "no")
    assert one(row, kind="pair", prompt=fields, chosen="good", rejected="bad", lead="lead") == ("ask", "So:  yes ", "So: no")
    assert one({**row, "bad": " "}, kind="pair", prompt=fields, chosen="good", rejected="bad", lead="lead")[2] == " "  # a lead hides no blank reply
    assert one(row, kind="pair", prompt=fields, chosen="chat", rejected="chat", replies="chat")[1] == [{"role": "assistant", "content": "hm"}]
    assert one(row, kind="pair", prompt=fields, chosen="good", rejected="bad", replies="chat") is DropReason.WRONG_TYPE
    assert one(row, kind="pair", prompt={"fields": ["lead", "chat"]}, chosen="good", rejected="bad") is DropReason.WRONG_TYPE


def test_scores_and_labels_that_speak_against_a_pair() -> None:
    kind = {"kind": "pair", "scores": {"chosen": "s.0", "rejected": "s.1"}, "tie": {"status": "Tie"}}
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "s": [2, "1"]}
    assert one(row, **kind) == ("q", "a", "b")
    assert one({**row, "status": "tie"}, **kind) is DropReason.TIED
    assert one({**row, "s": [1, 1.0]}, **kind) is DropReason.TIED
    assert one({**row, "s": [1, 2]}, **kind) is DropReason.REVERSED_SCORE  # refused, not exchanged
    assert one({**row, "s": [1]}, **kind) is DropReason.MISSING_SCORE


def test_which_pairs_ratings_make() -> None:
    scored = [(0, "a", 1.0), (1, "b", 3.0), (2, "c", 3.0), (3, "d", 2.0)]
    assert marks(pair_up("q", scored, PairRule())) == ["1>0", "2>0", "1>3", "2>3", "3>0"]  # widest first, then by places
    assert marks(pair_up("q", scored, PairRule(margin=2.0))) == ["1>0", "2>0"]
    assert marks(pair_up("q", scored, PairRule(max_pairs=3))) == ["1>0", "2>0", "1>3"]
    assert marks(pair_up("q", scored, PairRule(better=Better.LOWER, max_pairs=2))) == ["0>1", "0>2"]
    assert pair_up("q", scored[1:3], PairRule()) == [Refusal(DropReason.TIED)]
    assert pair_up("q", scored[:2], PairRule(margin=2.5)) == [Refusal(DropReason.TIED)]
    assert pair_up("q", scored[:1], PairRule()) == [Refusal(DropReason.NO_COMPARISON)]
    assert pair_up("q", [], PairRule()) == [Refusal(DropReason.NO_COMPARISON)]


def test_capped_pairs_are_spread_over_the_replies() -> None:
    scored = [(place, str(place), float(place < 3)) for place in range(6)]  # three good, three bad
    assert marks(pair_up("q", scored, PairRule(max_pairs=4))) == ["0>3", "1>4", "2>5", "0>4"]
    assert sorted(marks(pair_up("q", scored, PairRule(max_pairs=9)))) == [f"{good}>{bad}" for good in range(3) for bad in range(3, 6)]
    many = [(place, str(place), float(place % 2)) for place in range(300)]
    assert len(pair_up("q", many, PairRule(max_pairs=30_000))) == 150 * 150


@given(st.lists(st.integers(0, 4), max_size=7), st.integers(1, 30), st.floats(0, 3), st.sampled_from(Better))
def test_pairs_of_ratings_follow_the_scores(scores: list[int], max_pairs: int, margin: float, better: Better) -> None:
    rule = PairRule(better=better, margin=margin, max_pairs=max_pairs)
    proposals = pair_up("q", [(place, str(place), float(score)) for place, score in enumerate(scores)], rule)
    sign = 1 if better is Better.HIGHER else -1
    wanted = sum(1 for x in scores for y in scores if sign * (x - y) > 0 and sign * (x - y) >= margin)
    if wanted == 0:
        assert isinstance(proposals[0], Refusal)
        return
    assert len(proposals) == min(wanted, max_pairs) == len(set(marks(proposals)))
    for proposal in proposals:
        assert isinstance(proposal, Candidate)
        assert sign * (scores[int(str(proposal.chosen))] - scores[int(str(proposal.rejected))]) >= max(margin, 1)


RATINGS = {"kind": "ratings", "replies": "answers", "text": "text", "scores": ["x", "y"]}


def test_rated_replies_that_cannot_be_read_are_refused_one_by_one() -> None:
    answers: list[Any] = [
        {"text": "a", "x": 1, "y": 1},
        {"text": None, "x": 1, "y": 1},
        {"text": "c", "x": "N/A", "y": 3},
        "no mapping",
        {"text": "e", "x": 2, "y": "3"},
    ]
    proposals = propose_pairs({"prompt": "q", "answers": answers}, adapter(**RATINGS))
    refusals = [proposal for proposal in proposals if isinstance(proposal, Refusal)]
    assert [(refusal.reason.value, refusal.item) for refusal in refusals] == [
        ("missing_field", answers[1]),
        ("missing_score", answers[2]),
        ("missing_field", answers[3]),
    ]
    assert marks(proposals[3:]) == ["4>0"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, DropReason.MISSING_FIELD),
        ({"prompt": "q"}, DropReason.MISSING_FIELD),
        ({"answers": []}, DropReason.MISSING_FIELD),
        ({"prompt": "q", "answers": "text"}, DropReason.WRONG_TYPE),
        ({"prompt": "q", "answers": {}}, DropReason.WRONG_TYPE),
        ({"prompt": "q", "answers": []}, DropReason.NO_COMPARISON),
        ({"prompt": "q", "answers": [{"text": "a", "x": 1, "y": 2}]}, DropReason.NO_COMPARISON),
        ({"prompt": "q", "answers": [{"text": "a", "x": 1, "y": 2}, {"text": "b", "x": 2, "y": 1}]}, DropReason.TIED),
    ],
)
def test_rows_without_a_rated_pair(row: dict[str, Any], reason: DropReason) -> None:
    assert propose_pairs(row, adapter(**RATINGS)) == [Refusal(reason)]


def message(text: Any, role: Any, rank: Any = None, *replies: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "rank": rank, "replies": list(replies)}


def test_trees() -> None:
    deep = message(
        "more?", "prompter", None, message("deep good", "assistant", 0), message("deep bad", "assistant", 1), message("unranked", "assistant")
    )
    tree = message("q", "prompter", None, message("bad", "assistant", 2), message("good", "assistant", 0, deep), message("fair", "assistant", 1))
    proposals = propose_pairs({"prompt": tree}, adapter(kind="tree"))
    assert marks(proposals) == ["/1>0", "/1>2", "/2>0", "/1/0/0>1"]
    assert [turn["content"] for turn in proposals[3].prompt] == ["q", "good", "more?"]
    assert (proposals[3].chosen, proposals[3].rejected) == ("deep good", "deep bad")


@pytest.mark.parametrize(
    ("tree", "reasons"),
    [
        (None, ["missing_field"]),
        ("text", ["wrong_type"]),
        (message(None, "prompter"), ["wrong_type"]),
        (message("q", "robot"), ["wrong_type"]),
        (message("q", "prompter"), ["no_comparison"]),
        ({**message("q", "prompter"), "replies": 3}, ["wrong_type"]),
        (message("q", "prompter", None, message("a", "assistant", 0), "text"), ["wrong_type"]),
        (message("q", "prompter", None, message("a", "assistant", 1), message("b", "assistant", 1)), ["tied"]),
        (message("q", "prompter", None, message("a", "assistant", 0), message("b", "prompter", 1)), ["no_comparison"]),
    ],
)
def test_broken_trees(tree: Any, reasons: list[str]) -> None:
    proposals = propose_pairs({"prompt": tree}, adapter(kind="tree"))
    assert [proposal.reason.value for proposal in proposals if isinstance(proposal, Refusal)] == reasons
    assert len(proposals) == len(reasons)


def test_a_tree_may_be_deep() -> None:
    node = message("end", "prompter", None, message("x", "assistant", 0), message("y", "assistant", 1))
    for depth in range(2000):
        node = message(str(depth), "assistant" if depth % 2 == 0 else "prompter", 0, node)
    (proposal,) = propose_pairs({"prompt": node}, adapter(kind="tree"))
    assert isinstance(proposal, Candidate)


ROWS = RatedRowsAdapter(reply="r", scores=("s",))
SOURCE = SourceConfig(name="mine", path="nowhere")


def chunks_of(rows: list[Any], *, limit: int = 1000, **values: Any) -> list[Chunk]:
    source = SOURCE.model_copy(update={"adapter": adapter(**values)})
    return list(adapt_rows(plain_rows(rows), source, "f", max_rows=limit, max_bytes=1 << 20))


def rated(prompt: Any, reply: Any, score: Any) -> dict[str, Any]:
    return {"prompt": prompt, "r": reply, "s": score, "id": f"{reply}"}


def test_rows_of_one_prompt() -> None:
    candidates, reasons = propose_group([rated("q", "a", 1), rated("q", None, 3), rated("q", "c", "?"), rated("q", "d", 2)], ROWS)
    assert marks(candidates) == ["3>0"]
    assert reasons == [None, DropReason.NO_COMPARISON, DropReason.MISSING_SCORE, None]
    assert propose_group([{"prompt": "q", "s": 1}, {"prompt": "q", "s": 2}], ROWS) == ([], [DropReason.MISSING_FIELD] * 2)
    capped = ROWS.model_copy(update={"pairs": PairRule(max_pairs=1)})
    candidates, reasons = propose_group([rated("q", "a", 1), rated("q", "b", 3), rated("q", "c", 2)], capped)
    assert (marks(candidates), reasons) == (["1>0"], [None, None, DropReason.BEYOND_MAX_PAIRS])
    wide = ROWS.model_copy(update={"pairs": PairRule(margin=3)})
    assert propose_group([rated("q", "a", 1), rated("q", "b", 4), rated("q", "c", 2)], wide)[1] == [None, None, DropReason.TIED]
    assert propose_group([rated("q", "a", 1), rated("q", "b", 1)], ROWS) == ([], [DropReason.TIED] * 2)
    assert propose_group([rated("q", "a", 1)], ROWS) == ([], [DropReason.NO_COMPARISON])
    assert propose_group([rated(None, "a", 1), rated(None, "b", 2)], ROWS) == ([], [DropReason.MISSING_FIELD] * 2)


@pytest.mark.parametrize("max_rows", [1, 2, 1000])
@pytest.mark.parametrize(("span", "expected"), [("run", ["b>a", "e>d"]), ("file", ["b>a", "e>d", "e>c", "d>c"])])
def test_runs_and_files_of_rows(span: str, expected: list[str], max_rows: int) -> None:
    rows = [rated("p", "a", 1), 7, rated("p", "b", 2), rated("q", "c", 1), rated("z", "only", 1), rated("q", "d", 2), rated("q", "e", 3)]
    chunks = chunks_of(rows, kind="rated_rows", reply="r", scores=["s"], span=span, limit=max_rows)
    pairs = [pair for chunk in chunks for pair in chunk.pairs.to_pylist()]
    assert sorted(f"{pair['chosen']}>{pair['rejected']}" for pair in pairs) == sorted(expected)
    assert sum(chunk.num_rows_read for chunk in chunks) == len(rows)
    reasons = [reason for chunk in chunks for reason in chunk.rejects["reason"].to_pylist()]
    assert sorted(reasons) == sorted(["wrong_type", "no_comparison"] + (["no_comparison"] if span == "run" else []))


def test_too_many_rows_to_group_are_an_error() -> None:
    with pytest.raises(InputError, match="f has more than 2 rows"):
        chunks_of([rated("p", "a", 1)] * 3, kind="rated_rows", reply="r", scores=["s"], span="file", max_rows=2)


KINDS: list[dict[str, Any]] = [
    {"kind": "pair", "prompt": {"fields": ["prompt"], "system": "x"}},
    {"kind": "pair", "prompt": None, "replies": "transcript"},
    {"kind": "pair", "prompt": {"fields": ["prompt"], "form": "chat"}, "replies": "chat"},
    {"kind": "comparison", "a": "a", "b": "b", "verdict": {"by": "label", "label": "x", "a": ["1"], "b": ["2"], "tie": ["a"]}},
    {"kind": "comparison", "a": "a", "b": "b", "replies": "json_turns", "verdict": {"by": "strength", "strength": "x"}},
    {"kind": "ratings", "replies": "a", "text": "r", "scores": ["x"], "pairs": {"max_pairs": 2}},
    {"kind": "rated_rows", "reply": "a", "scores": ["x"]},
    {"kind": "rated_rows", "reply": "a", "scores": ["x"], "span": "file", "values": {"a": 1, "b": 2}},
    {"kind": "tree"},
]
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.sampled_from(["", " ", "a", "b", "1", "\ud800", "\n\nHuman: q\n\nAssistant: a"])
)
KEYS = st.sampled_from(["prompt", "chosen", "rejected", "a", "b", "x", "r", "text", "role", "rank", "replies", "from", "value", "content", "id"])
ANY = st.recursive(SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)), max_leaves=14)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.dictionaries(KEYS, ANY, max_size=8), SCALAR), max_size=10), st.sampled_from(KINDS), st.integers(1, 4))
def test_every_row_of_any_shape_ends_in_a_pair_or_a_reject(rows: list[Any], kind: dict[str, Any], max_rows: int) -> None:
    chunks = chunks_of(rows, **kind, limit=max_rows)
    assert sum(chunk.num_rows_read for chunk in chunks) == len(rows)
    seen = {number for chunk in chunks for table in (chunk.pairs, chunk.rejects) for number in table["row"].to_pylist()}
    if kind["kind"] == "rated_rows":  # a row may take part as the worse reply alone
        assert seen <= set(range(len(rows)))
    else:
        assert seen == set(range(len(rows)))
    for chunk in chunks:
        chunk.pairs.validate(full=True)
        chunk.rejects.validate(full=True)
        for reject in chunk.rejects.to_pylist():
            json.loads(reject["row_json"])


def test_rows_of_another_split_are_counted_as_such() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    source = SOURCE.model_copy(update={"where": {"split": "train"}})
    rows = [{**row, "split": "train"}, {**row, "split": "Train "}, {**row, "split": "val"}, row, 3]
    (chunk,) = adapt_rows(plain_rows(rows), source, "f", max_rows=9, max_bytes=1 << 20)
    assert (chunk.pairs.num_rows, chunk.num_rows_read) == (2, 5)
    assert chunk.rejects["reason"].to_pylist() == ["not_in_split", "missing_field", "wrong_type"]
    assert json.loads(chunk.rejects["row_json"][0].as_py())["split"] == "val"


def test_unreadable_rows_pass_through_with_their_text() -> None:
    row = FileRow(4, {}, DropReason.INVALID_JSON, "{broken")
    (chunk,) = adapt_rows([row], SOURCE, "f", max_rows=9, max_bytes=1 << 20)
    assert (chunk.num_rows_read, chunk.rejects.to_pylist()[0]["row_json"]) == (1, "{broken")
