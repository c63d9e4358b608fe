"""The simulated annotator answers the asked pairs, no others, says that it is simulated; nothing else opens a truth file."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import synpref_ray
from synpref_ray.errors import InputError, SchemaError
from synpref_ray.human.simulated import SimulatedAnnotator, TruthLookup, read_truth
from synpref_ray.schema import HUMAN_SCHEMA

SHARD = pa.table({"pair_id": ["a", "b", "c", "d"], "chosen": ["1", "2", "3", "4"]})


def truth_file(folder: Path, verdicts: dict[str, Any]) -> str:
    path = folder / "truth.parquet"
    pq.write_table(pa.table({"pair_id": list(verdicts), "verdict": list(verdicts.values())}), path)
    return str(path)


def test_selected_pairs_only(tmp_path: Path) -> None:
    annotator = SimulatedAnnotator(truth_file(tmp_path, {"d": "chosen", "a": "rejected", "b": "chosen"}))
    verdicts = annotator.verify(SHARD, {"a", "c", "d", "elsewhere"})
    assert verdicts.schema == HUMAN_SCHEMA
    nobody = {"human_verdict": None, "annotator": None, "simulated": None, "gold_split": None}
    simulated = {"annotator": "simulated", "simulated": True, "gold_split": None}
    assert verdicts.to_pylist() == [
        {"pair_id": "a", "human_verdict": "rejected", **simulated, "drop_reason": None},
        {"pair_id": "b", **nobody, "drop_reason": "not_selected"},
        {"pair_id": "c", "human_verdict": "abstain", **simulated, "drop_reason": "undecidable"},  # the truth file does not know it
        {"pair_id": "d", "human_verdict": "chosen", **simulated, "drop_reason": None},
    ]


def test_nothing_selected_needs_no_truth(tmp_path: Path) -> None:
    verdicts = SimulatedAnnotator(str(tmp_path / "absent.parquet")).verify(SHARD, [])
    assert verdicts["drop_reason"].to_pylist() == ["not_selected"] * 4
    assert SimulatedAnnotator("absent").verify(SHARD.slice(0, 0), ["a"]).schema == HUMAN_SCHEMA


def test_bad_truth_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no truth file"):
        read_truth(str(tmp_path / "absent.parquet"), ["a"])
    with pytest.raises(InputError, match="gives 'maybe' for pair a; expected chosen or rejected"):
        read_truth(truth_file(tmp_path, {"a": "maybe"}), ["a"])
    path = tmp_path / "both.parquet"
    pq.write_table(pa.table({"pair_id": ["a", "a"], "verdict": ["chosen", "rejected"]}), path)
    with pytest.raises(InputError, match="gives both verdicts for pair a"):
        read_truth(str(path), ["a"])
    pq.write_table(pa.table({"pair_id": ["a"], "label": ["chosen"]}), path)
    with pytest.raises(SchemaError, match="lacks the column verdict"):
        read_truth(str(path), ["a"])
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="is not a complete Parquet file"):
        read_truth(str(path), ["a"])
    with pytest.raises(SchemaError, match="needs the column pair_id"):
        SimulatedAnnotator(str(path)).verify(pa.table({"id": ["a"]}), ["a"])


def test_a_lookup_says_what_reading_says(tmp_path: Path) -> None:
    path = tmp_path / "truth.parquet"
    rows = [("b", "rejected"), ("a", "chosen"), ("b", "rejected"), ("two", "chosen"), ("two", "rejected"), ("bad", "maybe"), ("none", None)]
    pq.write_table(pa.table({"pair_id": [name for name, _ in rows], "verdict": [verdict for _, verdict in rows]}), path)
    truth = TruthLookup(str(path))
    asked = ["absent", "a", "b", "a", "a longer name than any"]
    assert truth.verdicts(pa.array(asked)).to_pylist() == [None, "chosen", "rejected", "chosen", None]
    assert {name: verdict for name, verdict in zip(asked, truth.verdicts(pa.array(asked)).to_pylist(), strict=True) if verdict} == read_truth(
        str(path), asked
    )
    assert truth.verdicts(pa.array([], pa.string())).to_pylist() == []
    for name in ("two", "bad", "none"):
        with pytest.raises(InputError) as looked_up:
            truth.verdicts(pa.array(["a", name]))
        with pytest.raises(InputError) as read:
            read_truth(str(path), [name])
        assert str(looked_up.value) == str(read.value)


TRUTH_MODULE = "human/simulated.py"
FINAL_REPORT = ("reporting/", "pipeline/demo", "pipeline/label_report")  # may use READERS, never open the file itself
READERS = {"read_truth", "TruthLookup"}
OPENERS = {
    "open",
    "open_binary",
    "read_table",
    "read_parquet",
    "ParquetFile",
    "ParquetDataset",
    "dataset",
    "read_bytes",
    "read_text",
    "read_pair_file",
}


def truth_breaches(package: Path) -> Iterator[str]:
    """Name every line outside the truth module that opens something called truth, and every use of its readers outside the final report."""
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).as_posix()
        if module == TRUTH_MODULE:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in OPENERS and "truth" in ast.unparse(node).lower():
                yield f"{module}:{node.lineno} opens a truth file"
            used = _name(node) in READERS or (isinstance(node, ast.alias) and node.name in READERS)
            if used and not module.startswith(FINAL_REPORT):
                yield f"{module} reads the truth"


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_no_other_module_opens_a_truth_file() -> None:
    assert list(truth_breaches(Path(synpref_ray.__file__).parent)) == []


@pytest.mark.parametrize(
    ("module", "line", "caught"),
    [
        ("pipeline/stage1.py", "pq.read_table(config.truth_path)", True),
        ("pipeline/stage1.py", "from synpref_ray.human.simulated import read_truth", True),
        ("rules/gate.py", "from synpref_ray.human.simulated import TruthLookup", True),
        ("pipeline/label_report.py", "known = TruthLookup(truth)", False),
        ("llm/judge.py", "open(folder / 'truth.parquet')", True),
        ("reporting/final.py", "truth = read_truth(path, ids)", False),
        ("reporting/final.py", "pq.read_table('truth.parquet')", True),
        ("pipeline/stage1.py", "annotator = SimulatedAnnotator(config.truth_path)", False),
        ("rules/gate.py", "TRUTH_TABLE = ()", False),
    ],
)
def test_the_check_catches_breaches(tmp_path: Path, module: str, line: str, caught: bool) -> None:
    path = tmp_path / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert bool(list(truth_breaches(tmp_path))) is caught


def test_the_annotator_travels_to_workers(tmp_path: Path) -> None:
    annotator = SimulatedAnnotator(truth_file(tmp_path, {"a": "chosen"}))
    assert pickle.loads(pickle.dumps(annotator)) == annotator
