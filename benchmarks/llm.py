"""Tagging and judging on a CPU: our steps against bare vLLM and against Ray's own batch inference, interleaved in one run.

    python -m benchmarks.llm --threads 2 --out llm.json

Every side gets the same prompts (token ids), the same sampling and the same engine settings, in a process of its own that is begun anew in every
round; the model is SmolLM2-135M-Instruct. Timed is everything from the first request to the last durable row; starting up is reported apart.

Sides:
- step: `tag_pools` or `judge_pools` over a pool of many small shards: Ray Data, the workers with their engine, tokenising, journals, sidecars and
  their seal. The first request is when a worker first calls its engine; the end is the time of the seal;
- bare: `vllm.LLM.generate` with all token ids at once, in-process, from call to return; nothing is stored;
- ray.data.llm: `ray.data.llm.build_processor` over the same token ids in as many files as there are shards, written to Parquet. The first request is
  when its engine's stage gets its first batch; the end is the time of the last file. Batch size and concurrent batches are the best of a sweep.

Beside the time there are the CPU seconds of the process that holds the engine (nobody notes those of ray.data.llm's child process): on a machine that
others use too, they tell what a side costs. Replies are greedy; how many differ between the sides is reported (bfloat16 sums in other batches can
turn a near tie), not gated.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import SHARED_DATA, Gate, Measurement, Side, Stopwatch, finish, interleave, machine, parser, table
from benchmarks._llm import TASKS, Prompt, Setup, make_inputs, make_setup
from benchmarks._llm_sides import run_bare_side, run_ray_data_side, run_step_side
from synpref_ray.errors import SynprefError
from synpref_ray.llm.engine import engine_environment

STEP, BARE, RAY_DATA = "step", "bare", "ray.data.llm"
LEAST_OF_BARE = 0.9
LEAST_SHARDS = 20


def run_side(task: str, side: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """Run one side in a fresh process and return what it measured; `side` may carry ray.data.llm's settings ("ray.data.llm 32x8").

    Raises:
        SynprefError: the process failed; what it wrote to standard error is shown.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch) / "result.json", Path(scratch) / "log"
        command = [sys.executable, "-m", "benchmarks.llm", "--one", f"{task} {side}", "--inputs", str(folder), "--out", str(result)]
        with log.open("wb") as errors:
            environment = os.environ | engine_environment(setup.engine(task))
            done = subprocess.run(command, env=environment, stdout=errors, stderr=errors, check=False)
        if done.returncode != 0:
            print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
            raise SynprefError(f"{task}, {side}: the process ended with exit code {done.returncode}")
        measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return measured


def run_one(name: str, folder: Path, out: Path) -> None:
    """Run a side in this very process, which must have started in the engine's environment."""
    task, side, *variant = name.split(" ")
    setup = Setup.model_validate_json((folder / "setup.json").read_text(encoding="utf-8"))
    if side == RAY_DATA:
        batch_size, concurrent = (int(number) for number in variant[0].split("x"))
        measured = run_ray_data_side(task, folder, setup, batch_size, concurrent)
    else:
        measured = (run_step_side if side == STEP else run_bare_side)(task, folder, setup)
    out.write_text(json.dumps(measured), encoding="utf-8")


def measure(task: str, prompts: Sequence[Sequence[Prompt]], folder: Path, setup: Setup, arguments: Any) -> dict[str, Any]:
    """Sweep ray.data.llm, then time all sides on one task, and return the figures."""
    wanted = {prompt.key: len(prompt.tokens) for shard in prompts for prompt in shard}
    sweep: dict[str, float] = {}
    variants = [] if arguments.without_ray_data else arguments.sweep.split(",")
    for variant in variants if len(variants) > 1 else ():
        seen = run_side(task, f"{RAY_DATA} {variant}", folder, setup)
        sweep[variant] = seen["requests"] / seen["seconds"]
        print(f"{task}: sweep, {RAY_DATA} {variant}: {sweep[variant]:.2f} requests/s", flush=True)
    commands = {STEP: STEP, BARE: BARE} | ({RAY_DATA: f"{RAY_DATA} {max(variants, key=lambda name: sweep.get(name, 0.0))}"} if variants else {})
    replies: dict[str, dict[str, str]] = {}

    def running(side: str) -> Side:
        def run() -> Mapping[str, float]:
            seen = run_side(task, commands[side], folder, setup)
            replies[side] = seen.pop("replies")
            return seen

        return run

    sides = {side: running(side) for side in commands}
    rounds = interleave(sides, arguments.rounds, Stopwatch(), say=lambda line: print(f"{task}: {line}", flush=True))
    return {
        "num_shards": len(prompts),
        "num_requests": sum(len(shard) for shard in prompts),
        "prompt_tokens": sum(len(prompt.tokens) for shard in prompts for prompt in shard),
        "sweep_requests_per_second": sweep,
        "variants": commands,
        "missing_replies": {side: len(wanted.keys() - found.keys()) for side, found in replies.items()},
        "differing_replies": {side: count_differing(found, replies[BARE]) for side, found in replies.items() if side != BARE},
        "sides": figures(rounds),
    }


def count_differing(replies: Mapping[str, str], others: Mapping[str, str]) -> int:
    """Return how many requests that both answered got another text."""
    return sum(text != others[key] for key, text in replies.items() if key in others)


def figures(rounds: Sequence[Mapping[str, Measurement]]) -> dict[str, Any]:
    """Return each side's figures: medians over the rounds; `step_ratio` is the median of the rounds' own ratios of requests/s."""

    def speed(one: Measurement) -> float:
        return one.counts["requests"] / one.seconds

    sides: dict[str, Any] = {}
    for side in rounds[0]:
        measured = [one[side] for one in rounds]
        ratios = [speed(one[STEP]) / speed(one[side]) for one in rounds]
        cached = [one.counts["cached_prompt_tokens"] / one.counts["prompt_tokens"] for one in measured if "cached_prompt_tokens" in one.counts]
        sides[side] = {
            "requests_per_second": statistics.median(map(speed, measured)),
            "output_tokens_per_second": statistics.median(one.counts["output_tokens"] / one.seconds for one in measured),
            "step_ratio": statistics.median(ratios),
            "step_ratios": ratios,
            "seconds": [one.seconds for one in measured],
            "startup_seconds": statistics.median(one.counts["startup_seconds"] for one in measured),
            "engine_start_seconds": statistics.median(one.counts["engine_start_seconds"] for one in measured),
            "engine_starts_per_worker": max(one.counts["engine_starts_per_worker"] for one in measured),
            "prefix_cache_hit_rate": statistics.median(cached) if cached else None,
            "requests": [one.counts["requests"] for one in measured],
            "prompt_tokens": [one.counts["prompt_tokens"] for one in measured],
        }
        for name in ("seconds_to_last_shard", "engine_cpu_seconds"):
            if name in measured[0].counts:
                sides[side][name] = [one.counts[name] for one in measured]
    return sides


def gates_of(task: str, result: Mapping[str, Any]) -> list[Gate]:
    """Return the gates of one task."""
    sides = result["sides"]
    gates = [Gate(f"{task}: step / bare", sides[BARE]["step_ratio"], LEAST_OF_BARE)]
    if RAY_DATA in sides:
        gates.append(Gate(f"{task}: step / ray.data.llm, best of the sweep", sides[RAY_DATA]["step_ratio"], 1.0))
    return [*gates, Gate(f"{task}: engine starts per worker", sides[STEP]["engine_starts_per_worker"], 1, most=True)]


def wrong_of(task: str, result: Mapping[str, Any]) -> list[str]:
    """Say where a side did other work than the one that all were given."""
    wrong = [f"{task}, {side}: {missing} replies are missing" for side, missing in result["missing_replies"].items() if missing]
    for side, one in result["sides"].items():
        for name, expected in (("requests", result["num_requests"]), ("prompt_tokens", result["prompt_tokens"])):
            if any(value != expected for value in one[name]):
                wrong.append(f"{task}, {side}: {name} {one[name]} where {expected} were given")
    return wrong


def report(task: str, result: Mapping[str, Any]) -> None:
    """Print the table of one task."""
    print(f"\n### {task}: {result['num_requests']} requests in {result['num_shards']} shards, {result['prompt_tokens']} prompt tokens\n")
    header = [
        "side",
        "requests/s",
        "output tokens/s",
        "step is … times as fast",
        "start-up s",
        "of which engine s",
        "CPU s of the engine's process",
        "prefix cache hits",
        "replies ≠ bare",
    ]
    rows = []
    for side, one in result["sides"].items():
        hits = one["prefix_cache_hit_rate"]
        rows.append(
            [
                result["variants"][side],
                f"{one['requests_per_second']:.2f}",
                f"{one['output_tokens_per_second']:.0f}",
                f"{one['step_ratio']:.3f}",
                f"{one['startup_seconds']:.1f}",
                f"{one['engine_start_seconds']:.1f}",
                f"{statistics.median(one['engine_cpu_seconds']):.1f}" if "engine_cpu_seconds" in one else "",
                "" if hits is None else f"{hits:.3f}",
                str(result["differing_replies"].get(side, "")),
            ]
        )
    print(table(header, rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; see the module's text."""
    made = parser(__doc__)
    made.add_argument("--data", type=Path, default=SHARED_DATA, help="folder that holds hh_rlhf/train.parquet")
    made.add_argument("--pairs", type=int, default=320)
    made.add_argument("--shards", type=int, default=20)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=2, help="of every engine")
    made.add_argument("--tasks", default=",".join(TASKS), help="tag, judge or both")
    made.add_argument("--sweep", default="16x8,32x8,64x4", help="ray.data.llm's batch sizes x concurrent batches, by comma")
    made.add_argument("--without-ray-data", action="store_true", help="leave ray.data.llm out")
    made.add_argument("--one", help="run one side in this process; what the benchmark runs for each")
    made.add_argument("--inputs", type=Path, help="with --one: the folder of prompts and tables")
    arguments = made.parse_args(argv)
    if arguments.one is not None:
        run_one(arguments.one, arguments.inputs, arguments.out)
        return 0
    if arguments.shards < LEAST_SHARDS or arguments.pairs < arguments.shards:
        made.error(f"--shards must be at least {LEAST_SHARDS}, and --pairs at least as many")
    described = machine()
    setup = make_setup(arguments.pairs / arguments.shards, arguments.threads)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            prompts = make_inputs(Path(scratch), arguments.data / "hh_rlhf" / "train.parquet", setup, arguments.pairs, arguments.shards)
            for task in arguments.tasks.split(","):
                results[task] = measure(task, prompts[task], Path(scratch), setup, arguments)
                report(task, results[task])
        except SynprefError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    gates = [gate for task, result in results.items() for gate in gates_of(task, result)]
    wrong = [line for task, result in results.items() for line in wrong_of(task, result)]
    for name in ("one", "inputs"):
        delattr(arguments, name)
    return finish("llm", {"machine": described, "setup": setup.model_dump(mode="json"), "tasks": results}, gates, wrong, arguments)


if __name__ == "__main__":
    sys.exit(main())
