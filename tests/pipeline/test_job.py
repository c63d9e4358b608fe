"""The command line that every job shares, and the one clear line with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from jobs import attack_judges, demo, evaluate, ingest, preverify, score, stage1, stage2, train
from synpref_ray.errors import ConfigError
from synpref_ray.pipeline.job import JobConfig, parse_arguments, run_job
from tests.pipeline.small_loop import REPOSITORY, environment

ENGINE = "{model: HuggingFaceTB/SmolLM2-135M-Instruct}"


def run(capsys: pytest.CaptureFixture[str], main: object, *argv: str) -> tuple[int, str]:
    """Return the exit code and standard error, which must be one line where the code is 2."""
    code = main(list(argv))  # type: ignore[operator]
    error = capsys.readouterr().err
    if code == 2:
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
    return code, error


def test_the_command_line_is_read() -> None:
    arguments = parse_arguments(["serve", "--config", "c.yaml", "a.b=1", "--dry-run"], verbs=("serve", "export"))
    assert (arguments.verb, arguments.config, arguments.overrides, arguments.dry_run) == ("serve", "c.yaml", ("a.b=1",), True)


@pytest.mark.parametrize("argv", [["--fast"], ["word"], ["--config"]])
def test_anything_else_on_the_command_line_is_refused(argv: list[str]) -> None:
    with pytest.raises(ConfigError):
        parse_arguments(argv)


def test_a_verb_is_needed_where_a_job_has_verbs() -> None:
    with pytest.raises(ConfigError, match="serve, export"):
        parse_arguments(["a=1"], verbs=("serve", "export"))


@pytest.mark.parametrize(
    "main", [ingest.main, stage1.main, stage2.main, train.main, score.main, evaluate.main, attack_judges.main, preverify.main, demo.main]
)
def test_help_says_how_to_call_a_job(capsys: pytest.CaptureFixture[str], main: object) -> None:
    assert main(["--help"]) == 0  # type: ignore[operator]
    assert "Laptop:" in capsys.readouterr().out


def test_an_unknown_key_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, error = run(capsys, ingest.main, f"data={tmp_path}", "shards=3")
    assert (code, error) == (2, "ingest: bad settings: shards: unknown key\n")


def test_a_missing_config_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, ingest.main, "--config", "nowhere.yaml")
    assert code == 2
    assert "cannot read the config file nowhere.yaml" in error


def test_missing_data_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, error = run(capsys, ingest.main, f"data={tmp_path / 'none'}", f"workspace={tmp_path / 'ws'}")
    assert code == 2
    assert "found no file" in error


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}) + "\n")
    code, error = run(capsys, score.main, f"model={tmp_path / 'model'}", f"pairs={pairs}", f"out={tmp_path / 'out.parquet'}")
    assert code == 2
    assert "model" in error


def test_stages_need_what_comes_before_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    judge = f"judges=[{{engine: {ENGINE}, judge: {{judge: small}}}}]"
    common = [f"workspace={tmp_path}", f"taggers=[{{engine: {ENGINE}}}]", judge]
    code, error = run(capsys, stage1.main, *common, "train.backbone=b", "gold_train.backbone=b")
    assert code == 2
    assert "pool 'seed' does not exist" in error
    code, error = run(capsys, stage2.main, *common)
    assert code == 2
    assert "pool 'wild' does not exist" in error


def test_a_dry_run_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.jsonl").write_text(json.dumps({"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}) + "\n")
    code, _ = run(capsys, ingest.main, f"data={tmp_path / 'data'}", f"workspace={tmp_path / 'ws'}", "--dry-run")
    assert code == 0
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("place", ["file/ws", "file", "/proc/ws"])
def test_a_workspace_that_cannot_be_written_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "seed.jsonl").write_text(json.dumps({"prompt": "Hi?", "chosen": "Hi.", "rejected": "No."}) + "\n")
    code, error = run(capsys, ingest.main, f"data={tmp_path / 'data'}", f"workspace={tmp_path / place}")
    assert code == 2
    assert f"cannot write to the workspace {tmp_path / place}: " in error


def test_object_storage_without_credentials_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    def check(config: JobConfig) -> None:
        raise NoCredentialsError

    assert run_job("demo", ["--dry-run"], JobConfig, lambda config, run: "", check=check) == 2
    assert capsys.readouterr().err == "demo: object storage: Unable to locate credentials\n"


CONNECT = """
import sys
from synpref_ray.pipeline.job import JobConfig, run_job
sys.exit(run_job("job", [f"workspace={sys.argv[1]}"], JobConfig, lambda config, run: "done"))
"""


@pytest.mark.ray
def test_a_cluster_s_token_that_is_not_there_is_one_line_and_exit_2(tmp_path: Path) -> None:
    """Ray raises its AuthenticationError then; of a wrong token it says that it cannot connect."""
    plain = {name: value for name, value in environment().items() if not name.startswith("RAY_")}
    asked = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}
    command = [sys.executable, "-c", CONNECT, str(tmp_path / "workspace")]
    done = subprocess.run(command, cwd=REPOSITORY, env={**plain, **asked}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr.splitlines()[-1]
