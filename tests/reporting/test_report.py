"""The report: one inert file, numbers that are those of the records, the same in JSON and CSV, and nothing in the workspace changed."""

import csv
import io
import json
import re
import shutil
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from jobs import report as job
from synpref_ray.config import Settings
from synpref_ray.evaluation.benchmarks import rm_bench
from synpref_ray.evaluation.label_quality import LabelEvidence, flip_detection, label_quality
from synpref_ray.pipeline.report_page import write_report
from synpref_ray.reporting.report import audits, paper
from synpref_ray.reporting.report.charts import Point, draw, forest_chart, range_chart
from synpref_ray.reporting.report.content import Chart, Note, Report, show, show_seconds
from synpref_ray.reporting.report.make import ReportOptions, make_report
from synpref_ray.reporting.report.models import thinned
from synpref_ray.reporting.report.page import render_html, report_csv, report_json
from synpref_ray.reporting.report.pairs import MAX_TEXT_CHARACTERS, cut
from synpref_ray.reporting.run import Run
from synpref_ray.tables.pools import open_pool
from synpref_ray.tables.storage import Storage
from tests.human.test_rendering import HOSTILE
from tests.reporting.small_workspace import SIZES, EvaluateSettings, make_workspace
from tests.reporting.test_status import snapshot

OPTIONS = ReportOptions(made=1_790_000_000.0)
EVIL = (*HOSTILE, '=HYPERLINK("https://example.org")', "$\\frac{1}{0}$", "\u202egnp.exe", "nul \x00 \x0b end", "--></svg><script>xss=1</script>")
HTML_TAGS = {*("html", "head", "meta", "title", "style", "body", "header", "footer", "nav", "main", "section", "article", "div", "p", "h1", "h2")}
HTML_TAGS |= {
    *("h3", "h4", "ol", "li", "a", "dl", "dt", "dd", "span", "b", "bdi", "code", "pre", "figure", "figcaption", "details", "summary", "table")
}
HTML_TAGS |= {"thead", "tbody", "tr", "th", "td"}
SVG_TAGS = {"svg", "g", "path", "text", "use", "defs", "clippath", "rect"}


class Tags(HTMLParser):
    """Collects every tag with its attributes, as a browser would read them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return make_workspace(tmp_path_factory.mktemp("plain") / "ws")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(make_workspace(tmp_path_factory.mktemp("hostile") / "ws", hostile=EVIL), OPTIONS)


@pytest.fixture(scope="module")
def report(plain: Storage) -> Report:
    return make_report(plain, OPTIONS)


def evaluate_metrics(storage: Storage) -> dict[str, Any]:
    path = next(path for path in storage.list_files("runs") if "evaluate" in path and path.endswith("metrics.json"))
    metrics: dict[str, Any] = storage.read_json(path)
    return metrics


def tables(report: Report) -> dict[str, list[dict[str, object]]]:
    sections = json.loads(report_json(report))["sections"]
    return {name: rows for section in sections.values() for name, rows in section["tables"].items()}


def test_a_page_of_hostile_pairs_runs_and_loads_nothing(hostile: Report) -> None:
    page = render_html(hostile)
    tags = Tags()
    tags.feed(page)
    assert {tag for tag, _ in tags.seen} <= HTML_TAGS | SVG_TAGS
    for tag, attributes in tags.seen:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action", "xlink:href")], (tag, attributes)
        assert (attributes.get("href") or "#").startswith("#"), (tag, attributes)
        assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", (attributes.get("style") or "") + (attributes.get("clip-path") or ""))
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    policy = next(attributes["content"] for tag, attributes in tags.seen if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_what_is_pointed_at_is_there(report: Report) -> None:
    tags = Tags()
    tags.feed(render_html(report))
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {str(attributes["href"])[1:] for _, attributes in tags.seen if "href" in attributes}
    clips = {found for _, attributes in tags.seen for found in re.findall(r"url\(#([^)]+)\)", attributes.get("clip-path") or "")}
    assert targets | clips <= {str(name) for name in ids}


def test_charts_are_well_formed_in_the_colours_of_the_page(report: Report) -> None:
    charts = [block for section in report.sections for block in section.blocks if isinstance(block, Chart)]
    assert len(charts) >= 12
    for chart in charts:
        ElementTree.fromstring(chart.svg)
        assert set(re.findall(r"#[0-9a-f]{6}\b", chart.svg)) == set(), chart.name
        assert "var(--" in chart.svg


def test_names_in_charts_are_text() -> None:
    rows = [(evil, Point(0.5, 0.4, 0.6), "#010211") for evil in EVIL]
    chart = draw("evil", "t", lambda figure: forest_chart(figure, "<b>&", rows), height=5)
    texts = [element.text for element in ElementTree.fromstring(chart.svg).iter() if element.tag.endswith("text")]
    assert "<script>alert(1)</script>" in texts
    assert "$\\frac{1}{0}$" in texts


def test_the_numbers_are_those_of_the_records(report: Report, plain: Storage) -> None:
    found = tables(report)
    last = plain.read_json("rounds/02/round.json")
    assert found["rounds"][-1]["right on audit gold"] == last["best_rm_on_audit_gold"]["accuracy"]
    assert found["rounds"][-1]["95 % interval, audit"] == [last["best_rm_on_audit_gold"][end] for end in ("low", "high")]
    judge = next(row for row in found["judges"] if row["judge"] == "judge-b" and row["gold"] == "audit")
    assert judge["position bias"] == last["judge_report"]["audit"]["judges"]["judge-b"]["position_bias"]["value"]
    decisions = plain.read_json("rounds/stage2.json")
    assert sum(int(str(row["pairs"])) for row in found["decisions"]) == SIZES["wild"] == sum(decisions["decisions"].values())
    assert {row["pool"]: row["pairs"] for row in found["pools"]} == SIZES
    rm_bench = next(row for row in found["benchmarks"] if row["benchmark"] == "RM-Bench")
    measured = evaluate_metrics(plain)["rm_bench/overall"]
    assert (rm_bench["value"], rm_bench["items"], rm_bench["paper, same backbone"]) == (measured, 1327, 0.763)  # Llama-3.2-1B, Table 1
    assert [row["time"] for row in found["steps"] if row["step"] == "judge (judge-a)"] == [183.0]


def test_audits_of_an_evaluation_are_in_the_report(report: Report, plain: Storage) -> None:
    found = tables(report)
    metrics = evaluate_metrics(plain)
    [calibration] = found["calibration"]
    prefix = "audit/calibration/judgebench"
    assert (calibration["ECE"], calibration["pairs"]) == (metrics[f"{prefix}/ece"], 300)
    assert calibration["95 % interval, ECE"] == [metrics[f"{prefix}/ece/low"], metrics[f"{prefix}/ece/high"]]
    assert sum(int(str(row["pairs"])) for row in found["calibration_bins"]) == 300
    length = next(row for row in found["biases"] if row["feature"] == "length")
    assert length["right where more"] == metrics["audit/bias/judgebench/length/accuracy_more/accuracy"]
    assert {row["hack"]: row["beats better"] for row in found["hacks"]} == {
        kind: metrics[f"audit/attacks/corpus/{kind}/beats_better"] for kind in ("flattery", "gibberish")
    }


def test_the_style_matrix_has_every_cell_that_was_measured(report: Report, plain: Storage) -> None:
    assert audits.STYLES == rm_bench.STYLES
    rows = tables(report)["style_matrix"]
    assert len(rows) == len(rm_bench.DOMAINS) * 9
    metrics = evaluate_metrics(plain)
    for row in rows:
        assert row["right wins"] == metrics[f"rm_bench/{row['domain']}/matrix/{row['right reply']}_over_{row['wrong reply']}"]
    chart = next(block for section in report.sections for block in section.blocks if isinstance(block, Chart) and block.name == "style-0")
    shown = [element.text for element in ElementTree.fromstring(chart.svg).iter() if element.tag.endswith("text")]
    assert len([text for text in shown if text and text.isdecimal()]) == 36


def test_charts_that_leave_something_out_say_so_and_name_the_scorers(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for model in ("one", "two"):
        run = Run(storage, "evaluate", EvaluateSettings(model=model, benchmarks=("held",)))
        run.metrics["benchmarks"] = {"held": {"items": 30}}
        for number in range(7):
            for side in ("more", "less"):
                run.metrics[f"audit/bias/held/f{number}/accuracy_{side}/accuracy"] = 0.6
            run.metrics[f"audit/bias/held/f{number}/pressure"] = 0.1
        for size in (1, 2, 3):
            run.metrics |= {f"held/s{part}/best_of/{size}/model": 0.5 for part in range(10)}
            run.metrics |= {f"held/s{part}/best_of/{size}/model/verified": "hand-worked" for part in range(10)}
        run.finish()
    page = render_html(make_report(storage, OPTIONS))
    assert "4 of 28 shares are in the table, not in the chart." in page
    assert "1 of 10 curves are in the table, not in the chart." in page
    assert "held: more f0, one" in page
    assert "Values of the curves" in page  # 60 rows: folded, not hidden


def test_many_scorers_stay_in_their_rows() -> None:
    ours = [(f"model {number}", Point(0.5, 0.4, 0.6)) for number in range(9)]
    rows = [("RM-Bench", [0.7, 0.9], ours), ("RMB", [0.7, 0.9], ours)]
    figure = Figure()
    range_chart(figure, "", rows, "the paper's")
    marks = [line for line in figure.axes[0].lines if line.get_marker() in "osD^v" and len(line.get_ydata())]
    places = [float(line.get_ydata()[0]) for line in marks]
    assert len(places) == 18
    assert max(places[:9]) < 0.4 < 0.6 < min(places[9:])
    looks = {(line.get_marker(), line.get_color()) for line in marks}
    assert len(looks) == 9


def test_what_goes_into_a_node_comes_out_of_it(report: Report) -> None:
    flows = [(str(row["from"]), str(row["to"]), int(str(row["pairs"]))) for row in tables(report)["flows"]]
    for node in ("seed", "unverified", "wild", "Stage 1", "Stage 2"):
        assert sum(count for _, end, count in flows if end == node) == sum(count for start, _, count in flows if start == node)


def test_csv_and_json_hold_the_same(report: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(report_csv(report))))
    found = {(line["table"], int(line["row"]), line["column"]): line["value"] for line in lines}
    wanted = {}
    for name, rows in tables(report).items():
        for number, row in enumerate(rows, start=1):
            for column, value in row.items():
                cells = {f"{column}, low": value[0], f"{column}, high": value[1]} if isinstance(value, list) else {column: value}
                wanted |= {(name, number, key): str(cell) for key, cell in cells.items() if cell is not None}
    assert found == wanted


def test_no_cell_is_a_formula(hostile: Report) -> None:
    cells = [row[-1] for row in csv.reader(io.StringIO(report_csv(hostile)))]
    assert any(cell.startswith("'=HYPERLINK") for cell in cells)
    assert not [cell for cell in cells if cell[:1] in "=@" and cell]


def test_a_run_s_own_report_holds_its_own_numbers(plain: Storage, tmp_path: Path) -> None:
    storage = Storage(str(shutil.copytree(plain.url, tmp_path / "ws")))
    run = Run(storage, "demo", Settings())
    demo = json.loads(
        json.dumps(storage.read_json(next(path for path in storage.list_files("runs") if "demo" in path and path.endswith("metrics.json"))))
    )
    demo["demo"]["labels"]["kept"]["accuracy"] = 0.125
    files = write_report(storage, storage.join(f"{run.folder}/report.html"), current={run.folder: demo})
    assert [file.rsplit("/", 1)[-1] for file in files] == ["report.html", "report.json", "report.csv"]
    rows = storage.read_json(f"{run.folder}/report.json")["sections"]["truth"]["tables"]["label_quality"]
    assert next(row for row in rows if row["pairs of the wild pool"] == "kept")["labels right"] == 0.125


def test_the_job_writes_three_files_and_changes_nothing(plain: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(Path(plain.url))
    assert job.main(["html", f"workspace={plain.url}", f"out={tmp_path / 'r.html'}", "num_examples=0"]) == 0
    assert snapshot(Path(plain.url)) == before
    assert capsys.readouterr().out.split() == [word for end in ("html", "json", "csv") for word in ("report:", str(tmp_path / f"r.{end}"))]
    assert "Here are some uses" not in (tmp_path / "r.html").read_text()
    assert job.main(["html", f"workspace={plain.url}", f"out={tmp_path / 'r.pdf'}"]) == 2
    assert job.main(["html", f"workspace={tmp_path / 'none'}", f"out={tmp_path / 'r.html'}"]) == 2
    assert "ends in .html" in capsys.readouterr().err


def test_with_a_known_truth_the_page_has_labels_and_flips_by_source(plain: Storage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = Storage(str(shutil.copytree(plain.url, tmp_path / "ws")))
    (tmp_path / "ws" / "rounds" / "stage1.json").unlink()  # its record names no sets
    ids = open_pool(storage, "wild").read_all()["pair_id"].to_pylist()
    truth = tmp_path / "truth.parquet"
    pq.write_table(pa.table({"pair_id": ids[:-5], "verdict": ["rejected" if number % 3 == 0 else "chosen" for number in range(len(ids) - 5)]}), truth)
    before = snapshot(Path(storage.url))
    arguments = [f"workspace={storage.url}", f"truth={truth}"]
    assert job.main(["html", *arguments, f"out={tmp_path / 'r.html'}"]) == 0
    assert snapshot(Path(storage.url)) == before
    capsys.readouterr()
    assert job.main(["labels", *arguments, "format=json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    found = json.loads((tmp_path / "r.json").read_text())["sections"]["labels"]["tables"]
    assert [row["source"] for row in found["label_quality_by_source"]] == ["all sources", "wild-a", "wild-b"]
    assert found["label_quality_by_source"][0]["truth not known"] == 5
    for entry, quality, flips in zip(printed, found["label_quality_by_source"], found["flip_detection"], strict=True):
        assert quality["right before"] == entry["quality"]["raw"]["accuracy"]
        assert quality["right after"] == entry["quality"]["kept_and_flipped"]["accuracy"]
        assert (flips["precision"], flips["recall"]) == tuple(entry["flips"][name]["accuracy"] for name in ("precision", "recall"))
    assert "Labels and flips by source" in (tmp_path / "r.html").read_text()
    pq.write_table(pa.table({"pair_id": ["0" * 32], "verdict": ["chosen"]}), truth)
    assert job.main(["html", *arguments, f"out={tmp_path / 'r.html'}"]) == 2
    assert "knows none of the labelled pairs" in capsys.readouterr().err


def test_every_stage_is_drawn_however_many_sources_there_are(tmp_path: Path) -> None:
    def entry(stage: str, source: str, count: int) -> dict[str, Any]:
        decisions, better = ["keep", "flip", "drop"] * count, ["chosen", "rejected", "rejected"] * count
        return asdict(LabelEvidence(stage, source, label_quality(decisions, better), flip_detection(decisions, better), source == "all sources"))

    names = [f"{number:02d}-a-source-with-a-long-name-that-is-cut" for number in range(40)]
    labels = [entry(stage, source, place + 1) for stage in ("Stage 1, silver", "Stage 2") for place, source in enumerate(["all sources", *names])]
    report = make_report(make_workspace(tmp_path / "ws"), OPTIONS, labels=labels)
    section = next(section for section in report.sections if section.name == "labels")
    charts = [block for block in section.blocks if isinstance(block, Chart)]
    assert [chart.title.rsplit(", ", 1)[-1] for chart in charts] == ["silver", "Stage 2"]
    for chart in charts:
        assert chart.svg.count("before: ") >= 12
        assert "before: all sources" in chart.svg
        drawn = set(re.findall(r"before: (\d\d)-a-source", chart.svg))
        assert drawn == {f"{number:02d}" for number in range(28, 40)}, "the largest"
    assert [block.text for block in section.blocks if isinstance(block, Note)] == ["28 of 40 sources are in the table, not in the chart."] * 2
    assert len(tables(report)["flip_detection"]) == len(labels)


def test_a_workspace_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    Run(storage, "ingest", Settings())
    report = make_report(storage, OPTIONS)
    assert [section.name for section in report.sections] == ["workspace", "costs", "runs"]
    assert "Curation report" in render_html(report)


def test_the_averages_of_the_paper_s_rows_are_those_that_it_prints() -> None:
    printed = dict(zip(paper.MODELS, (70.9, 75.2, 77.8, 79.3, 72.3, 77.1, 85.8, 88.6), strict=True))
    assert {name: round(fmean(values), 1) for name, values in paper.MODELS.items()} == pytest.approx(printed, abs=0.051)
    assert paper.paper_model_of("meta-llama/Llama-3.1-8B-Instruct") == "Llama-3.1-8B"
    assert paper.paper_model_of(f"meta-llama/Llama-3.1-8B-Instruct@{'0123456789' * 4}") == "Llama-3.1-8B", "pinned, as trainings record it"
    assert paper.paper_model_of("HuggingFaceTB/SmolLM2-135M-Instruct") is None


def test_long_curves_are_averaged_and_short_ones_are_not() -> None:
    steps = [{"step": step, "loss": float(step % 2)} for step in range(1, 1001)]
    curve = thinned(steps, ("step", "loss"))
    assert len(curve["loss"]) == 200
    assert curve["step"][0] == fmean([1, 2, 3, 4, 5])
    assert thinned(steps[:7], ("step", "loss"))["loss"] == [1, 0, 1, 0, 1, 0, 1]
    assert thinned([], ("step", "loss")) == {"step": [], "loss": []}


def test_cells_are_shown_by_their_kind() -> None:
    assert show(0.8125, "share") == "81.2 %"
    assert show(-0.06, "points") == "-6.0"
    assert show((0.5, 0.25), "interval") == "50.0 to 25.0"
    assert show(None, "count") == show(float("nan"), "share") == "\u2013"
    assert show(12345, "count") == "12\u2009345"
    assert [show_seconds(value) for value in (4.25, 59.6, 3599.6, 7260)] == ["4.2 s", "1 min 00 s", "1 h 00 min", "2 h 01 min"]
    assert cut("x" * (MAX_TEXT_CHARACTERS + 3)).endswith("x … (3 more characters)")
