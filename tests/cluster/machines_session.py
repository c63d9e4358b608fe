"""Jobs on machines that share a file system and nothing else; run by `test_machines.py` in a network of its own.

Prints what happened as one line of JSON. Arguments: a new folder with `pairs.jsonl`, the reward model `model` and the backbone
`backbone` in it, and one for Ray's files.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from synpref_ray.tables.storage import Storage
from tests.cluster.machines import HEAD, Machines
from tests.pipeline.small_loop import REPOSITORY, environment
from tests.s3 import S3Server, server_program

FILES = 6
"""Source files: too many for ingest to read them in the driver."""
JOB_SECONDS = 900.0
TRAIN = {
    "learning_rate": 1e-3,
    "global_batch_pairs": 8,
    "max_tokens_per_microbatch": 1024,
    "precision": "float32",
    "save_dtype": "float32",
    "num_threads": 1,
    "num_workers": 3,
}


class Jobs:
    """Jobs of this checkout as a user of the cluster runs them."""

    def __init__(self, environment: dict[str, str]):
        self._environment = environment

    def start(self, job: str, *settings: str) -> "subprocess.Popen[str]":
        """Start a job."""
        command = [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *settings]
        return subprocess.Popen(command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)

    def end(self, started: "subprocess.Popen[str]") -> dict[str, Any]:
        """Wait for a job; return its exit code and the end of what it said."""
        out, said = started.communicate(timeout=JOB_SECONDS)
        return {"code": started.returncode, "said": said[-3000:], "out": out[-1000:]}

    def run(self, job: str, *settings: str) -> dict[str, Any]:
        """Run a job to its end."""
        return self.end(self.start(job, *settings))


def upload(storage: Storage, root: Path) -> None:
    """Put pairs, source files and the model into object storage."""
    lines = (root / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    storage.write_bytes("pairs.jsonl", b"".join(lines))
    for number in range(FILES):
        storage.write_bytes(f"sources/wild-{number}.jsonl", b"".join(line for line in lines[number::FILES] if len(line) < 10_000))
    for file in sorted((root / "model").iterdir()):
        storage.upload(file, f"model/{file.name}")


def fetched(machines: Machines, number: int) -> list[str]:
    """Return the names of the models in a machine's own cache."""
    return sorted(path.name for path in machines.see(number, machines.own / "cache" / "synpref_ray" / "fetched").glob("*"))


def main(root: Path, session: str) -> dict[str, Any]:
    """Return what happened."""
    program = server_program()
    assert program is not None
    happened: dict[str, Any] = {}
    with S3Server(program, HEAD) as server, patch.dict("os.environ", server.environment(server.url)):
        storage = Storage(f"{server.make_prefix()}/ws")
        upload(storage, root)
        with Machines(root / "machines", session, {**environment(), **server.environment(server.url)}) as machines:
            # Both scorers are there before the first shard is read, so that each has work, and none is read where it is scored.
            patient = {"RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": str(int(JOB_SECONDS))}
            jobs, sources = Jobs({**machines.driver, **patient}), f"data={storage.join('sources')}"
            # Nobody is there to be asked when this job begins; it waits for a machine to work on.
            waiting = jobs.start("ingest", sources, f"workspace={machines.own / 'ws'}")
            reader = machines.add(num_cpus=2)
            happened["came_later"] = jobs.end(waiting)
            scorers = [machines.add(num_cpus=1, num_gpus=1), machines.add(num_cpus=1, num_gpus=1, hides=True)]
            happened["hidden_from_one"] = jobs.run("ingest", sources, f"workspace={machines.hidden / 'ws'}")
            happened["shared"] = jobs.run("ingest", sources, f"workspace={root / 'ws'}")
            happened["probe_files"] = [str(path) for path in (root / "ws").glob("probe/*/*")]

            before = {number: machines.received_bytes(number) for number in scorers}
            where = [f"model={storage.join('model')}", f"pairs={storage.join('pairs.jsonl')}", f"out={storage.join('rewards.parquet')}"]
            one_each = ["pairs_per_shard=4", "score.num_workers=2", "score.num_gpus_per_worker=1", "score.max_length_tokens=200", "dtype=float32"]
            happened["score"] = jobs.run("score", f"workspace={storage.url}", *where, *one_each)
            happened["received"] = [machines.received_bytes(number) - before[number] for number in scorers]
            happened["fetched"] = {"reader": fetched(machines, reader), "scorers": [fetched(machines, number) for number in scorers]}
            if happened["score"]["code"] == 0:
                storage.download("rewards.parquet", root / "rewards.parquet")

            (root / "train.yaml").write_text(yaml.safe_dump({"train": {**TRAIN, "backbone": str(root / "backbone")}, "parity": {"vllm": False}}))
            training = ["--config", str(root / "train.yaml"), f"workspace={storage.url}", f"pairs={storage.join('sources/wild-0.jsonl')}"]
            happened["train"] = jobs.run("train", *training)
            happened["models"] = storage.list_folders("models")
    return happened


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))  # noqa: T201  # read by the test
