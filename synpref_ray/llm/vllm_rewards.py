"""Rewards from vLLM's pooling runner, for the parity gate: token ids in, raw logits out, in a process of its own.

Our choice: a child process, because an engine never gives all of its memory back, and a crash inside it must end as one clear line. Inside the
child the engine runs in process, so there are no grandchildren. The child's standard input is a pipe that nothing is ever written to: when the
parent is gone, however it died, the pipe ends and the child with it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import PositiveFloat, PositiveInt

import synpref_ray
from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError, SynprefError
from synpref_ray.llm.engine import EngineConfig, engine_environment

REQUEST, REPLY, LOG = "request.json", "reply.json", "log.txt"
_ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b.*")


class ClassifierConfig(Settings):
    """How the child runs vLLM."""

    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: PositiveInt = 2  # CPU only
    kv_cache_bytes: PositiveInt = 1 << 29  # CPU only
    gpu_memory_share: PositiveFloat = 0.8  # GPU only
    timeout_seconds: PositiveFloat = 900.0


def classify_tokens(
    folder: str, sequences: Sequence[npt.NDArray[np.int32]], dtypes: Sequence[str], config: ClassifierConfig
) -> dict[str, list[float]]:
    """Return for each dtype the raw logit of every token sequence, in order.

    Raises:
        ConfigError: vLLM is not installed, or is the build for another device.
        SynprefError: vLLM did not load the model, died, or took longer than `timeout_seconds`.
    """
    if find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here: install it (README, Setup), or leave vLLM out of the check (parity.vllm=false)")
    # On a GPU every dtype gets a process of its own: the first engine's memory would be missing for the second. On a CPU a second engine takes 3 s.
    groups = [[dtype] for dtype in dtypes] if config.device == "cuda" else [list(dtypes)]
    rewards: dict[str, list[float]] = {}
    for group in groups:
        rewards |= _run_child(folder, {"sequences": [sequence.tolist() for sequence in sequences], "dtypes": group}, config)
    return rewards


def _run_child(folder: str, request: Mapping[str, Any], config: ClassifierConfig) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory(prefix="synpref_ray-vllm-") as scratch:
        (Path(scratch) / REQUEST).write_text(json.dumps({**request, "folder": folder, "config": config.model_dump()}), encoding="utf-8")
        with (Path(scratch) / LOG).open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "synpref_ray.llm.vllm_rewards", scratch],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_environment(config),
            )
            try:
                code = child.wait(timeout=config.timeout_seconds)
            except subprocess.TimeoutExpired:
                raise SynprefError(f"vLLM did not score {folder} within {config.timeout_seconds:.0f} s (parity.vllm_timeout_seconds)") from None
            finally:
                child.kill()
                child.communicate()
        if code != 0:
            raise SynprefError(f"vLLM cannot score {folder}: {_why(code, Path(scratch) / LOG)}")
        reply = json.loads((Path(scratch) / REPLY).read_text(encoding="utf-8"))
    if "error" in reply:
        raise ConfigError(reply["error"])
    rewards: dict[str, list[float]] = reply["rewards"]
    return rewards


def _environment(config: ClassifierConfig) -> dict[str, str]:
    engine = EngineConfig(model="-", device="gpu" if config.device == "cuda" else "cpu", num_threads=config.num_threads)
    ours = str(Path(synpref_ray.__file__).parents[1])
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    return {**os.environ, **engine_environment(engine), "PYTHONPATH": path}


def _why(code: int, log: Path) -> str:
    """Return in one line how the child ended: its last error, or the signal that took it."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name} (out of memory?)"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return (errors or lines or [f"exit code {code}"])[-1][:300]


def main(scratch: str) -> None:
    """Be the child: read the request, score, write the reply, end."""
    threading.Thread(target=_end_with_the_parent, name="lifeline", daemon=True).start()
    folder = Path(scratch)
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    config = ClassifierConfig.model_validate(request["config"])
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != (config.device == "cpu"):
        error = f"parity.device={config.device}, but the installed vLLM runs on {current_platform.device_type}: install the other build"
        (folder / REPLY).write_text(json.dumps({"error": error}), encoding="utf-8")
        return
    rewards = {dtype: _classify(request["folder"], request["sequences"], dtype, config) for dtype in request["dtypes"]}
    (folder / REPLY).write_text(json.dumps({"rewards": rewards}), encoding="utf-8")


def _end_with_the_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # not sys.stdin.read: a thread inside a buffered read aborts the interpreter's own end
    os._exit(1)


def _classify(folder: str, sequences: list[list[int]], dtype: str, config: ClassifierConfig) -> list[float]:
    """Score as `vllm serve DIR --runner pooling` does: its defaults but for the activation, which would squash a logit to a probability."""
    import torch
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.inputs import TokensPrompt

    arguments: dict[str, Any] = {"dtype": dtype}
    if config.device == "cpu":
        torch.set_num_threads(config.num_threads)
        arguments["kv_cache_memory_bytes"] = config.kv_cache_bytes
    else:
        arguments["gpu_memory_utilization"] = config.gpu_memory_share
    engine = LLM(
        model=folder,
        runner="pooling",
        max_model_len=max(map(len, sequences)),
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        pooler_config=PoolerConfig(use_activation=False),
        **arguments,
    )
    outputs = engine.classify([TokensPrompt(prompt_token_ids=sequence) for sequence in sequences], use_tqdm=False)
    return [float(output.outputs.probs[0]) for output in outputs]


if __name__ == "__main__":
    main(sys.argv[1])
