"""Exemplars by hand in the plane, and clean by the checks of rules/gold.py."""

import pyarrow as pa
import pytest

from synpref_ray.errors import SchemaError
from synpref_ray.retrieval.exemplars import EXEMPLARS_SCHEMA, ExemplarConfig, add_exemplars
from synpref_ray.rules.gold import check_exemplars
from tests.retrieval.brute_force import BruteForceSearch
from tests.retrieval.builders import embedded, unit

GOLD = embedded(["g00", "g10", "g20", "g30"], ["A", "B", "B", "C"], unit(0, 10, 20, 30))
TARGETS = embedded(["t1", "t2", "t3"], ["X", "B", "Y"], [unit(14)[0], unit(14)[0], None], drop_reason=pa.array([None, None, "too_long"]))


def test_by_hand():
    table = add_exemplars(TARGETS, BruteForceSearch(GOLD), ExemplarConfig(max_exemplars=3))
    assert table.schema.equals(EXEMPLARS_SCHEMA)
    assert table["pair_id"].to_pylist() == ["t1", "t2", "t3"]
    assert table["exemplar_ids"].to_pylist() == [["g10", "g20", "g00"], ["g00", "g30"], None]  # t2 may not see its own prompt group B
    assert table["drop_reason"].to_pylist() == [None, None, "too_long"]
    assert table["exemplar_scores"][0].as_py() == pytest.approx([0.99756, 0.99452, 0.97030], abs=1e-5)  # cos of 4, 6, 14 degrees
    assert table["exemplar_scores"][2].as_py() is None


def test_gold_targets_are_leave_one_out():
    table = add_exemplars(GOLD, BruteForceSearch(GOLD), ExemplarConfig())
    assert table["exemplar_ids"].to_pylist() == [["g10", "g20", "g30"], ["g00", "g30"], ["g30", "g00"], ["g20", "g10", "g00"]]
    gold = GOLD.append_column("gold_split", pa.array(["working"] * 4))
    check_exemplars(table.append_column("prompt_group", GOLD["prompt_group"]), gold)


def test_nothing_to_show():
    none = add_exemplars(TARGETS, BruteForceSearch(GOLD.slice(0, 0)), ExemplarConfig())
    assert none["exemplar_ids"].to_pylist() == [[], [], None]
    assert add_exemplars(TARGETS.slice(0, 0), BruteForceSearch(GOLD), ExemplarConfig()).schema.equals(EXEMPLARS_SCHEMA)
    assert add_exemplars(TARGETS.slice(2), BruteForceSearch(GOLD), ExemplarConfig())["exemplar_ids"].to_pylist() == [None]
    bare = add_exemplars(TARGETS.drop_columns(["drop_reason"]), BruteForceSearch(GOLD), ExemplarConfig())
    assert bare["drop_reason"].to_pylist() == [None, None, "no_attributes"]
    with pytest.raises(SchemaError, match="prompt_group"):
        add_exemplars(TARGETS.drop_columns(["prompt_group"]), BruteForceSearch(GOLD), ExemplarConfig())
