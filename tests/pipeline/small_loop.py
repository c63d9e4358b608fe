"""The whole loop made small: a slice of the demo's pairs, real engines on a two-layer random model, the real jobs as subprocesses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from synpref_ray.bundled import resolve_model
from synpref_ray.tables.storage import Storage

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
SIZES = {"seed": 24, "unverified": 32, "wild": 48}


class SmallLoop:
    """Paths and commands of one small loop; several workspaces share the data and the backbone."""

    def __init__(self, root: Path):
        self.root = root
        self.data = root / "data"
        self.truth = REPOSITORY / "examples" / "data" / "truth.parquet"
        self.data.mkdir(parents=True)
        for name, size in SIZES.items():
            lines = (REPOSITORY / "examples" / "data" / "pools" / f"{name}.jsonl").read_text().splitlines()
            few = lines[:: len(lines) // size][:size]  # not the first ones: those are of a handful of prompts
            (self.data / f"{name}.jsonl").write_text("\n".join(few) + "\n")
        self.backbone = make_backbone(root / "backbone")
        self.config = write_configs(root, self.backbone, self.truth)

    def command(self, job: str, workspace: Path | str, *more: str) -> list[str]:
        """Return the command line of a job, with its verb behind its name if it has verbs."""
        config = ["--config", str(self.config[job])] if job in self.config else []
        if job == "ingest":
            config = [f"data={self.data}", "max_pairs_per_shard=8"]
        name, *verb = job.split()
        return [sys.executable, str(REPOSITORY / "jobs" / f"{name}.py"), *verb, *config, f"workspace={workspace}", *more]

    def run(self, job: str, workspace: Path | str, *more: str) -> dict[str, Any]:
        """Run a job to its end and return its metrics, with its events under `events`."""
        done = subprocess.run(self.command(job, workspace, *more), capture_output=True, text=True, cwd=self.root, env=environment(), check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        folder = Storage(done.stdout.strip().splitlines()[-1].removeprefix("run: "))
        metrics: dict[str, Any] = folder.read_json("metrics.json")
        metrics["events"] = [json.loads(line) for line in folder.read_bytes("events.jsonl").decode().splitlines()]
        return metrics


def finished_shards(workspace: Path) -> dict[Path, tuple[int, int]]:
    """Return every shard that is written, with its time and inode: a recomputed shard is another file."""
    found = sorted(workspace.glob("pools/*/*/*/shard-*.parquet"))
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def environment() -> dict[str, str]:
    """Return this process's environment, off the hub and off any cluster."""
    return {**{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


def make_backbone(folder: Path) -> Path:
    """Write a two-layer random Llama with the bundled tokenizer: backbone of the reward models, and LLM (what it says is noise, as schemas allow)."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(TOKENIZER))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,  # heads of 32: the smallest that vLLM's attention takes on a CPU
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # far from ties, so that a greedy reply does not hang on the batch that it was computed in
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_configs(root: Path, backbone: Path, truth: Path) -> dict[str, Path]:
    """Write the configs of both stages."""
    engine = {"model": str(backbone), "dtype": "float32", "max_model_len_tokens": 1024, "kv_cache_bytes": 256 << 20}
    step = {"engine": engine, "concurrent_shards": 1}
    common = {
        "taggers": [{**step, "tagger": {"max_attributes_chars": 30, "max_guideline_chars": 40, "max_input_tokens": 900, "max_new_tokens": 80}}],
        "judges": [{**step, "judge": {"judge": "small", "max_exemplars": 1, "max_input_tokens": 800}}],
        "score": {"dtype": "float32"},
        "gathered_shard_pairs": 8,
        "parity": {"vllm": False},  # an engine's start a model; tests/pipeline/test_parity_gate.py has a real one
    }
    train = {
        "backbone": str(backbone),
        "learning_rate": 1e-3,
        "global_batch_pairs": 16,
        "max_tokens_per_microbatch": 1024,
        "precision": "float32",
        "save_dtype": "float32",
        "evaluations_per_epoch": 1,
        "num_threads": 1,
    }
    annotator = {"kind": "simulated", "path": str(truth), "seed_pairs": 10, "round_pairs": 4}
    stage1 = {**common, "stop": {"max_rounds": 1}, "train": train, "gold_train": train, "annotator": annotator}
    paths = {}
    for name, values in (("stage1", stage1), ("stage2", common), ("train", {"train": train, "parity": common["parity"]})):
        paths[name] = root / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump(values))
    return paths
