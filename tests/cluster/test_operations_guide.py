"""The operator's guide: its commands name what there is, and its tables say what the code and the configs say."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import ray
import yaml
from ray._private.authentication.authentication_token_setup import generate_and_save_token
from ray.autoscaler._private.docker import validate_docker_config
from ray.scripts.scripts import cli

from synpref_ray.config import load_config
from synpref_ray.pipeline.job import JobConfig, parse_arguments
from synpref_ray.pipeline.report import VERBS, ReportConfig
from synpref_ray.reporting.metrics import METRICS
from tests.pipeline.test_configs import FAMILY, JOBS, family_config

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
CODE = [line for block in re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", GUIDE, re.MULTILINE | re.DOTALL))
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


def block(section: str, number: int = 0) -> str:
    """Return a block of commands of a section."""
    return re.findall(r"```\n(.*?)```", SECTIONS[section], re.DOTALL)[number]


def calls(commands: str, folder: Path) -> list[str]:
    """Run commands in a shell where `aws`, `gcloud` and `ray` only write down how they are called; return that."""
    (folder / "bin").mkdir()
    for tool in ("aws", "gcloud", "ray"):
        (folder / "bin" / tool).write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {folder}/calls\n')
        (folder / "bin" / tool).chmod(0o755)
    subprocess.run(["bash", "-ec", commands], cwd=ROOT, env={**os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}"}, check=True)
    return (folder / "calls").read_text().splitlines()


def node_types(launcher: str) -> list[dict[str, object]]:
    return [kind["node_config"] for kind in yaml.safe_load((ROOT / "cluster" / f"{launcher}.yaml").read_text())["available_node_types"].values()]


def test_every_ray_command_is_one_of_ray_s() -> None:
    commands = [shlex.split(line[line.index("ray ") :], comments=True)[1:] for line in CODE if re.match(r"(\w+=\S+ )*ray ", line)]
    assert len(commands) > 10
    for words in commands:
        command: click.Command = cli
        while isinstance(command, click.Group):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(command.name, [*words])  # parses, and does not run it


def test_spot_nodes_have_the_role_that_the_account_must_have_for_them(tmp_path: Path) -> None:
    assert any("InstanceMarketOptions" in kind for kind in node_types("aws"))
    assert "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com" in calls(block("AWS"), tmp_path)


def test_every_account_of_google_s_nodes_may_pull_the_image_before_the_cluster_starts(tmp_path: Path) -> None:
    accounts = {account["email"].partition("@")[0] for kind in node_types("gcp") for account in kind.get("serviceAccounts", [])}  # type: ignore[attr-defined]
    ours = (Path(ray.__file__).parent / "autoscaler" / "_private" / "gcp" / "config.py").read_text()  # needs Google's client to be imported
    [prefix], [kind] = re.findall(r'^RAY = "(.*)"$', ours, re.MULTILINE), re.findall(r'^VERSION = "(.*)"$', ours, re.MULTILINE)
    assert 'DEFAULT_SERVICE_ACCOUNT_ID = RAY + "-sa-" + VERSION' in ours
    accounts |= {f"{prefix}-sa-{kind}"}  # the head's
    done = calls(block("Google Cloud"), tmp_path)
    up = done.index("ray up cluster/gcp.yaml")
    for account in accounts:
        made = done.index(f"gcloud iam service-accounts create {account}")
        [bound] = [number for number, call in enumerate(done) if f"serviceAccount:{account}@" in call and "roles/artifactregistry.reader" in call]
        assert made < bound < up


def test_the_accounts_of_pods_are_made() -> None:
    spec = yaml.safe_load((ROOT / "cluster" / "kuberay" / "raycluster.yaml").read_text())["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    made = set(re.findall(r"^kubectl create serviceaccount (\S+)", block("Kubernetes"), re.MULTILINE))
    assert {group["template"]["spec"]["serviceAccountName"] for group in groups} == made


def test_the_token_that_the_guide_makes_is_in_a_folder_that_the_launchers_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    generate_and_save_token()  # what `ray get-auth-token --generate` does
    assert "ray get-auth-token --generate" in calls(block("Tokens"), tmp_path)
    for launcher in ("aws", "gcp"):
        config = yaml.safe_load((ROOT / "cluster" / f"{launcher}.yaml").read_text())
        mounts = {remote: str(Path(local).expanduser()) for remote, local in config["file_mounts"].items()}
        validate_docker_config({**config, "file_mounts": mounts})
        assert "refers to a file" not in "".join(capsys.readouterr()), "a container would keep the old one"
        token = Path(mounts["~/.ray"]) / "auth_token"  # where Ray looks for it
        assert token.read_text() == (tmp_path / ".ray" / "auth_token").read_text()
        assert token.stat().st_mode & 0o004, "on nodes its owner may be another user than the container's"
    assert not (tmp_path / ".ray").stat().st_mode & 0o077


def test_an_upgrade_takes_the_containers_down() -> None:
    for commands in re.findall(r"`ray (?:down|up) cluster/aws.yaml`.*", SECTIONS["Upgrades"]):
        assert commands.startswith("`ray down cluster/aws.yaml` and `ray up cluster/aws.yaml`")
    assert "`ray down`, then `ray up`" in SECTIONS["Tokens"]
