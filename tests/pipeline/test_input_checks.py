"""What `--dry-run` finds before any GPU is rented: everything at once, and steps whose GPUs or lengths do not fit."""

from pathlib import Path

import pytest

from jobs import stage2
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.llm.endpoint_config import EndpointConfig
from synpref_ray.llm.engine import EngineConfig
from synpref_ray.llm.judge import JudgeConfig
from synpref_ray.llm.tagger import TaggerConfig
from synpref_ray.pipeline.input_checks import check_each, check_gpus
from synpref_ray.pipeline.judge_steps import JudgeStepConfig
from synpref_ray.pipeline.tag_steps import TagStepConfig
from tests.pipeline.test_configs import CONFIGS


def refuse(text: str) -> None:
    raise InputError(text)


def test_all_that_is_wrong_is_told_in_one_line_and_the_same_only_once() -> None:
    checks = [lambda: refuse("no pool"), lambda: None, lambda: refuse("no model"), lambda: refuse("no pool")]
    with pytest.raises(InputError, match=r"^2 things are wrong: \(1\) no pool; \(2\) no model$"):
        check_each(*checks)
    with pytest.raises(InputError, match=r"^no pool$"):
        check_each(checks[0], checks[1], checks[3])
    check_each(checks[1])


def test_other_errors_are_not_caught() -> None:
    with pytest.raises(ZeroDivisionError):
        check_each(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("device", "gpus", "needed", "message"),
    [
        ("cuda", 0.0, 0.0, "no GPU"),
        ("cuda:0", 0.0, 0.0, "no GPU"),
        ("gpu", 2.0, 4.0, "tensor_parallel_size=4 needs num_gpus_per_worker=4, found 2"),
        ("cpu", 1.0, 1.0, "would idle"),
    ],
)
def test_gpus_that_ray_does_not_give_are_found(device: str, gpus: float, needed: float, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^score: .*{message}"):
        check_gpus("score", device, gpus, needed)


@pytest.mark.parametrize(("device", "gpus", "needed"), [("cpu", 0.0, 1.0), ("cuda", 0.5, 0.0), ("gpu", 0.5, 1.0), ("gpu", 4.0, 4.0)])
def test_gpus_that_fit_are_not_refused(device: str, gpus: float, needed: float) -> None:
    check_gpus("score", device, gpus, needed)


def test_requests_that_the_engine_cannot_hold_are_found(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    engine = EngineConfig(model=str(tmp_path), max_model_len_tokens=2048)
    JudgeStepConfig(engine=engine, judge=JudgeConfig(judge="a", max_input_tokens=2047)).check()
    TagStepConfig(engine=engine, tagger=TaggerConfig(max_input_tokens=1800, max_new_tokens=248)).check()
    with pytest.raises(ConfigError, match=r"max_model_len_tokens=2048 is less than .* 2049"):
        JudgeStepConfig(engine=engine, judge=JudgeConfig(judge="a", max_input_tokens=2048)).check()
    with pytest.raises(ConfigError, match="2049"):
        TagStepConfig(engine=engine, tagger=TaggerConfig(max_input_tokens=1800, max_new_tokens=249)).check()


def test_an_endpoints_context_that_is_shorter_than_what_steps_send_is_found() -> None:
    tagger = TaggerConfig(max_input_tokens=14_000, max_new_tokens=224)

    def check(max_context_tokens: int) -> None:
        engine = EndpointConfig(base_url="http://localhost:1/v1", model="m", max_context_tokens=max_context_tokens, extra_output_tokens=100)
        TagStepConfig(engine=engine, tagger=tagger).check()

    check(14_324)
    check(0)  # unknown
    with pytest.raises(ConfigError, match=r"max_context_tokens=1638 is less than .* 14324: "):
        check(1638)


def test_a_dry_run_tells_every_thing_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"workspace={tmp_path / 'none'}", "taggers.0.num_gpus_per_worker=2", "score.num_gpus_per_worker=0", "--dry-run"]
    assert stage2.main(["--config", str(CONFIGS / "stage2.yaml"), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in (
        "pool 'wild' does not exist",
        "Stage 1 has not finished",
        "tensor_parallel_size=4",
        "score: device=cuda",
        "no model Qwen/Qwen3-Embedding",
    ):
        assert part in line
