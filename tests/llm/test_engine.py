"""Request keys, engine settings and the environment they ask for."""

import dataclasses

import pytest
from pydantic import ValidationError

from synpref_ray.llm.engine import EngineConfig, Request, engine_environment

BASE = {"prompt": "p", "prompt_version": "v1", "max_new_tokens": 4}


def test_key_is_stable_across_processes() -> None:
    assert Request.of(**BASE).key == "3661250218b3f10e1ad880a9600c2886"  # a change loses every journal


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "q"},
        {"prompt_version": "v2"},
        {"max_new_tokens": 5},
        {"choices": ("1", "2")},
        {"json_schema": {"type": "string"}},
        {"temperature": 0.5},
        {"chat": True},
        {"reply_start": "p"},
        {"sample": 1},
    ],
)
def test_key_names_everything_that_shapes_the_reply(change: dict) -> None:
    assert Request.of(**{**BASE, **change}).key != Request.of(**BASE).key


def test_requests_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request.of(**BASE).prompt = "other"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed_requests": True}, "needs device=gpu"),
        ({"tensor_parallel_size": 2}, "in_process=false"),
        ({"max_num_seqs": 0}, "greater than 0"),
        ({"typo": 1}, "not permitted"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngineConfig(model="m", **settings)


def test_environment_follows_the_device() -> None:
    on_cpu = engine_environment(EngineConfig(model="m", num_threads=3))
    assert on_cpu["OMP_NUM_THREADS"] == "3"
    assert on_cpu["OMP_WAIT_POLICY"] == "PASSIVE"
    assert on_cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    on_gpu = engine_environment(EngineConfig(model="m", device="gpu", in_process=False))
    assert "OMP_NUM_THREADS" not in on_gpu
    assert on_gpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1"
