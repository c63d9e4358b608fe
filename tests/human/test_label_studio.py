"""Tasks go out blind, annotations come back as verdicts under the same protocol; once, however often the file is read."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from synpref_ray.errors import ConfigError, InputError
from synpref_ray.human.label_studio import import_annotations, labelling_config, make_tasks
from synpref_ray.human.results import attribute_table, verdict_table
from tests.human.site import TAGS, SmallSite, log_in, make_item


def annotate(task: dict[str, Any], who: object, choice: str, minute: int = 0, **more: str) -> dict[str, Any]:
    """Return what Label Studio exports for an annotator's answer."""
    texts = ("rationale", "search_link", "code_run", "desired_attributes")
    values = {"verdict": choice, **more}
    result = [
        {"from_name": name, "to_name": "conversation", "type": "textarea", "value": {"text": [value]}}
        if name in texts
        else {"from_name": name, "to_name": "conversation", "type": "choices", "value": {"choices": [value]}}
        for name, value in values.items()
    ]
    about = {"completed_by": who, "was_cancelled": False, "lead_time": 12.5, "updated_at": f"2026-01-01T10:{minute:02d}:00.000000Z"}
    return {"id": 1, "data": task["data"], "annotations": [{**about, "result": result}]}


def number_of(task: dict[str, Any]) -> int:
    return int(task["data"]["reply_1"].split()[-1])


@pytest.fixture
def site(tmp_path: Path) -> SmallSite:
    site = SmallSite(tmp_path)
    coding = {**TAGS, "task_category": "coding_and_debugging"}
    site.queue.add([make_item(number, required=2 if number == 0 else 1, attributes=coding if number == 3 else TAGS) for number in range(5)])
    return site


def right(task: dict[str, Any]) -> str:
    return "1" if task["data"]["reply_1"].startswith("good") else "2"


def test_a_round_trip(site: SmallSite) -> None:
    tasks = make_tasks(site.database, lambda tags: f"guideline for {tags['task_category']}")
    assert [number_of(task) for task in tasks] == list(range(5))
    assert tasks[3]["data"]["guideline"].startswith("guideline for coding_and_debugging")
    assert "chosen" not in json.dumps(tasks)
    assert not any(f"{number:032x}" in json.dumps(tasks) for number in range(5))  # the pair's id tells which reply is the chosen one
    assert make_tasks(site.database, lambda tags: f"guideline for {tags['task_category']}") == tasks
    wrong = {"1": "2", "2": "1"}
    export = [
        annotate(tasks[0], 7, right(tasks[0])),
        annotate(tasks[0], {"id": 8, "email": "eve@example.org"}, wrong[right(tasks[0])]),
        annotate(tasks[1], 7, right(tasks[1]), strength="strongly", task_category="reasoning", rationale="it adds up"),
        annotate(tasks[2], 7, "undecidable"),
        annotate(tasks[3], 7, right(tasks[3])),  # code, and nothing was run
        annotate(tasks[4], 7, wrong[right(tasks[4])], help="An LLM helped me; the judgement is my own"),
        annotate({"data": {"synpref_task": "f" * 32}}, 7, "1"),
        annotate({"data": {**tasks[4]["data"], "reply_1": "something else"}}, 7, "1"),
        {
            **annotate(tasks[4], 9, "1"),
            "annotations": [{"completed_by": 9, "updated_at": "2026-01-01T10:00:00Z", "result": [{"type": "choices"}]}, {"was_cancelled": True}],
        },
    ]
    report = import_annotations(site.database, site.protocol, json.dumps(export))
    assert (report.num_annotations, report.num_new, report.num_unchanged) == (9, 5, 0)
    assert {k: v for k, v in report.refused.items() if "run" not in k} == {"unknown pair": 1, "other replies than the pair's": 1, "unreadable": 1}
    assert sum(report.refused.values()) == 4

    found = site.results.snapshot()
    said = {int(row["pair_id"], 16): row["verdict"] for row in verdict_table(found).to_pylist()}
    assert said == {0: "unsettled", 1: "chosen", 2: "undecidable", 4: "rejected"}
    assert found.to_adjudicate == [f"{0:032x}"]
    assert {worker.name for worker in found.workers} == {"ls-7", "ls-8"}
    assert {row["pair_id"]: row["changed"] for row in attribute_table(found).to_pylist()}[f"{1:032x}"] == ["task_category"]
    assert log_in(site.client(), "ls-7", "x" * 12).status_code == 401

    again = import_annotations(site.database, site.protocol, json.dumps(export))
    assert (again.num_new, again.num_unchanged) == (0, 5)
    export[2] = annotate(tasks[1], 7, wrong[right(tasks[1])], minute=1)
    assert import_annotations(site.database, site.protocol, json.dumps(export)).num_new == 1
    assert {int(row["pair_id"], 16): row["verdict"] for row in verdict_table(site.results.snapshot()).to_pylist()}[1] == "rejected"
    assert [number_of(task) for task in make_tasks(site.database, lambda _: "")] == [3]


def test_the_newest_word_of_a_person_counts_however_often_and_in_whatever_order_it_comes(site: SmallSite) -> None:
    task = make_tasks(site.database, lambda _: "")[1]
    good = right(task)
    bad = {"1": "2", "2": "1"}[good]
    older, newer = annotate(task, 7, bad, minute=1), annotate(task, {"id": 7, "email": "a+b@x.org"}, good, minute=5)

    def load(*export: dict[str, Any]) -> tuple[int, int, dict[str, int]]:
        report = import_annotations(site.database, site.protocol, json.dumps(export))
        return report.num_new, report.num_unchanged, report.refused

    replaced = {"older than another of the same person": 1}
    assert load(newer, older) == (1, 0, replaced)
    for again in ((newer, older), (older, newer)):
        assert load(*again) == (0, 1, replaced)
    assert load(older) == (0, 1, {})
    assert verdict_table(site.results.snapshot())["verdict"].to_pylist() == ["chosen"]
    assert load(annotate(task, {"id": 8, "email": "a-b@x.org"}, bad)) == (1, 0, {})
    assert [worker.name for worker in site.results.snapshot().workers] == ["ls-7", "ls-8"]


def test_an_annotation_without_person_time_or_sound_seconds_is_counted(site: SmallSite) -> None:
    task = make_tasks(site.database, lambda _: "")[1]
    changes: list[dict[str, object]] = [{"completed_by": who} for who in (None, {}, {"email": "x@y.z"}, True, "7", 0, 2**63)]
    changes += [{"updated_at": time} for time in (None, "yesterday", 5)]
    changes += [{"lead_time": seconds} for seconds in (float("nan"), float("inf"), -1, "12", True, [])]
    export = []
    for change in changes:
        entry = annotate(task, 7, "1")
        entry["annotations"][0].update(change)
        export.append(entry)
    report = import_annotations(site.database, site.protocol, json.dumps(export))
    assert report.num_new == 0
    assert sorted(report.refused.values()) == [3, 6, 7]
    assert import_annotations(site.database, site.protocol, json.dumps([annotate(task, 7, "1")])).num_new == 1


@pytest.mark.parametrize("name", ["ls-7", "LS-7", "ls-"])
def test_names_of_label_studio_are_reserved(site: SmallSite, name: str) -> None:
    with pytest.raises(ConfigError, match="Label Studio"):
        site.user(name)


def test_the_labelling_config_names_what_the_tasks_have(site: SmallSite) -> None:
    view = ElementTree.fromstring(labelling_config())
    wanted = {element.get("value", "")[1:] for element in view if element.get("value", "").startswith("$")}
    task = make_tasks(site.database, lambda _: "g")[0]
    assert wanted <= set(task["data"])
    names = [element.get("name") for element in view if element.get("toName")]
    assert len(names) == len(set(names)) == 11
    assert {element.get("toName") for element in view if element.get("toName")} == {"conversation"}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"data": {}}]', '{"a": [', "null", '[{"data": {}, "annotations": [1]}]'])
def test_what_is_no_export_is_refused(site: SmallSite, text: str) -> None:
    if text == "{}":  # an empty mapping holds no tasks
        assert import_annotations(site.database, site.protocol, text).num_annotations == 0
        return
    with pytest.raises(InputError, match="Label Studio"):
        import_annotations(site.database, site.protocol, text)
