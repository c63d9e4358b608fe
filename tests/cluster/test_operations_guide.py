"""The operator's guide: its commands name what there is, and its tables say what the code and the configs say."""

import re
import shlex
from pathlib import Path

import pytest

from synpref_ray.config import load_config
from synpref_ray.pipeline.job import JobConfig, parse_arguments
from synpref_ray.pipeline.report import VERBS, ReportConfig
from synpref_ray.reporting.metrics import METRICS
from tests.pipeline.test_configs import FAMILY, JOBS, family_config

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
CODE = [line for block in re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
SIZES = re.findall(r"^\| ([a-z0-9.-]+) \| ([\d.]+) \| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", GUIDE, re.MULTILINE)


def test_the_sizes_are_those_of_the_eight_configs() -> None:
    assert [name for name, *_ in SIZES] == [*FAMILY]
    for name, billions, gpus, nodes, gigabytes, stored in SIZES:
        assert int(gpus) == family_config(name).train.num_workers
        assert int(nodes) == -(-int(gpus) // 8)
        parameters = float(billions)
        assert float(gigabytes) == pytest.approx(8 * parameters + 8 * parameters / int(gpus), abs=0.1)
        assert float(stored) == pytest.approx(2 * parameters, abs=0.1)


def test_every_file_that_a_command_names_is_there() -> None:
    named = {word for line in CODE for word in re.findall(r"(?:cluster|jobs|requirements|docs)/[\w./-]+\.\w+", line)}
    named |= {*re.findall(r"`((?:cluster|jobs|requirements)/[\w./-]+\.\w+)`", GUIDE)}
    assert len(named) > 12
    assert not [name for name in named if not (ROOT / name).exists()]


def test_every_job_command_has_valid_settings() -> None:
    commands = [line.partition("python jobs/")[2] for line in CODE if "python jobs/" in line]
    assert len(commands) >= 4
    for command in commands:
        script, *words = shlex.split(command.partition("#")[0])
        job = script.removesuffix(".py")
        parsed = parse_arguments(words, [*VERBS] if job == "report" else ())
        config = str(ROOT / parsed.config) if parsed.config else None
        load_config(ReportConfig if job == "report" else JOBS[job], config, parsed.overrides)


def test_every_make_target_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {line.split()[1] for line in CODE if line.startswith("make ")} <= targets


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    told = {
        (name.removesuffix("_total"), kind, tags)
        for names, kind, tags in re.findall(r"^\| (`synpref_.*?`) \| (\w+) \| (.*?) \|$", GUIDE, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    assert {(name, kind, tuple(re.sub(r" \([^)]*\)", "", tags).split(", "))) for name, kind, tags in told} == {
        (metric.name, metric.kind, metric.tags) for metric in METRICS
    }


def test_workspaces_in_the_checkout_are_neither_tracked_nor_uploaded() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {JobConfig().workspace, *re.findall(r"workspace=(\w+)(?= |$)", readme, re.MULTILINE)}
    assert len(named) > 1
    for file in (".gitignore", ".dockerignore"):  # `ray job submit --working-dir .` leaves out what the first one names
        assert named <= {line.rstrip("/") for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}, file
