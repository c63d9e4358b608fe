"""Which rule should select the pairs that labels are spent on: similarity to errors, chance, or uncertainty, at equal budget.

Paper: Sec. 3.2, Step 2 has the first; App. F.4 names a choice by uncertainty as future work. Every rule runs Stage 1 over the same pools with the
same seeds, rounds, verified pairs and (unless `--num-pairs` is given) as many selected pairs as the errors on gold call for; that number depends on
the RM, so after the first round it may differ, and `--num-pairs` makes it equal. Then every rule's best RM is measured on held-out pairs, paired with
chance's. The comparison is left in the workspace as a run, so `python jobs/report.py html` shows it.

    python -m benchmarks.selection --workspace DIR --num-pairs 60                       # the demo's pool
    python -m benchmarks.selection --workspace DIR --data SLICE --num-pairs 40          # a slice made by examples/make_flipped_slice.py
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from benchmarks._common import machine
from benchmarks._jobs import ROOT, run_job, simulated
from synpref_ray.config import Settings
from synpref_ray.errors import SynprefError
from synpref_ray.evaluation.accuracy import Accuracy, Difference, bootstrap_accuracy, paired_bootstrap
from synpref_ray.reporting.run import Run
from synpref_ray.rules.query_selection import SelectionKind
from synpref_ray.tables.storage import Storage

BASELINE = SelectionKind.RANDOM.value
Flags = npt.NDArray[np.bool_]


class Comparison(Settings):
    """What was compared, for the run's record."""

    kinds: tuple[str, ...]
    seeds: tuple[int, ...]
    num_pairs: int
    rounds: int
    seed_gold: int
    round_gold: int
    gold_rm: bool
    config: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run Stage 1 under every rule and print the comparison."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--workspace", type=Path, required=True, help="a folder of its own; run again after a kill, it goes on")
    made.add_argument("--data", type=Path, default=ROOT / "examples" / "data", help="folder with pools/*.jsonl, truth.parquet and held_out.parquet")
    made.add_argument("--kinds", nargs="+", default=[kind.value for kind in SelectionKind], choices=[kind.value for kind in SelectionKind])
    made.add_argument("--num-pairs", type=int, default=0, help="pairs a round; 0: as many as the errors on gold call for")
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training and of chance; each is a Stage 1 of its own for every rule")
    made.add_argument("--seed-gold", type=int, default=70)
    made.add_argument("--round-gold", type=int, default=25)
    made.add_argument("--gold-rm", action="store_true", help="uncertainty: train a gold RM every round, and count disagreement")
    made.add_argument("--config", default="jobs/configs/laptop_stage1.yaml")
    made.add_argument("--out", type=Path)
    arguments = made.parse_args(argv)
    data, workspace = arguments.data.resolve(), f"workspace={arguments.workspace / 'ws'}"
    prompts = [json.dumps(prompt) for prompt in pq.read_table(data / "held_out.parquet", columns=["prompt"])["prompt"].to_pylist()]
    try:
        run_job("ingest", "--config", "jobs/configs/laptop_ingest.yaml", workspace, f"data={data / 'pools'}")
        runs = {kind: [_run_kind(kind, seed, data, workspace, arguments) for seed in arguments.seeds] for kind in arguments.kinds}
    except SynprefError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    margins = {kind: np.array([run.pop("margins") for run in found], dtype=float) for kind, found in runs.items()}
    scored = np.all([np.isfinite(of_seed) for found in margins.values() for of_seed in found], axis=0)
    flags = {kind: found[:, scored] > 0 for kind, found in margins.items()}
    prompts = [prompt for prompt, is_scored in zip(prompts, scored.tolist(), strict=True) if is_scored]
    accuracies = {kind: [bootstrap_accuracy(of_seed, groups=prompts) for of_seed in found] for kind, found in flags.items()}
    others = {kind: found for kind, found in flags.items() if BASELINE in flags and kind != BASELINE}
    beside = {kind: paired_bootstrap(found, flags[BASELINE], groups=prompts) for kind, found in others.items()}
    unscored = int((~scored).sum())
    print(compare(runs, accuracies, beside, arguments.seeds))
    if unscored:
        print(f"{unscored} held-out pairs that some model could not score are left out for all")
    asked = Comparison(**{name: getattr(arguments, name) for name in Comparison.model_fields})
    run = Run(Storage(str(arguments.workspace / "ws")), "selection", asked)
    run.metrics["selection"] = comparison_record(runs, accuracies, beside, unscored)
    run.finish()
    if arguments.out:
        figures = {kind: [vars(value) for value in values] for kind, values in accuracies.items()}
        found = {"held_out": figures, "minus_random": {kind: vars(value) for kind, value in beside.items()}, "runs": runs}
        about = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(arguments).items()}}
        arguments.out.write_text(json.dumps({**about, **found}, indent=2, default=str) + "\n")
    return 0


def _run_kind(kind: str, seed: int, data: Path, workspace: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run Stage 1 under one rule; return what its rounds spent and its best RM's margin on each held-out pair (None: it was not scored)."""
    selection = [f"selection.kind={kind}", f"selection.num_pairs={arguments.num_pairs}", f"selection.seed={seed}"]
    selection += ["selection.gold_rm=true"] if kind == SelectionKind.UNCERTAINTY and arguments.gold_rm else []
    seeds = [f"train.seed={seed}", f"gold_train.seed={seed}", f"stop.max_rounds={arguments.rounds}"]
    annotator = simulated(data, seed_pairs=arguments.seed_gold, round_pairs=arguments.round_gold)
    stage1 = run_job("stage1", "--config", arguments.config, workspace, *annotator, *seeds, *selection)
    best = Path(workspace.removeprefix("workspace=")) / "models" / stage1["stage1"]["best_rm"]["name"]
    out = arguments.workspace / f"held-out-{kind}-{seed}.parquet"
    run_job("score", workspace, f"model={best}", f"pairs={data / 'held_out.parquet'}", f"out={out}")
    margins = pq.read_table(out, columns=["margin"])["margin"].to_pylist()
    rounds = stage1["rounds"]
    return {
        "margins": margins,
        "seed": seed,
        "selected": [entry["selected_pairs"] for entry in rounds],
        "called_for": [entry["selection"].get("called_for") for entry in rounds],
        "sets": rounds[-1]["set_sizes"],
        "working_gold": [entry["best_rm_on_working_gold"] for entry in rounds],
        "audit_gold": stage1["stage1"]["audit_gold_accuracy"]["best"],
        "best_rm": stage1["stage1"]["best_rm"]["name"],
        "gold_rms": sum(bool(entry["gold_rm"]) for entry in rounds),
    }


def unequal_budgets(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return, for every seed, in what the rules did not spend the same: selected pairs, verified pairs, trainings of a gold RM."""
    lines = []
    for of_seed in zip(*runs.values(), strict=True):
        spent = {
            "selected pairs": [sum(run["selected"]) for run in of_seed],
            "verified pairs": [run["sets"]["gold-working"] + run["sets"]["gold-audit"] for run in of_seed],
            "trainings of a gold RM in rounds": [run["gold_rms"] for run in of_seed],
        }
        for name, numbers in spent.items():
            if len(set(numbers)) > 1:
                told = ", ".join(f"{kind} {number}" for kind, number in zip(runs, numbers, strict=True))
                lines.append(f"seed {of_seed[0]['seed']}, {name}: {told}")
    return lines


def comparison_record(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    accuracies: Mapping[str, Sequence[Accuracy]],
    beside: Mapping[str, Difference],
    unscored: int,
) -> dict[str, Any]:
    """Return what the report of the workspace reads: every Stage 1 with what it spent and how right its best RM is, and differences to chance."""
    spent = [
        {
            **{name: run[name] for name in ("seed", "selected", "called_for", "audit_gold")},
            "kind": kind,
            "silver": run["sets"]["silver"],
            "gold": run["sets"]["gold-working"] + run["sets"]["gold-audit"],
            "held_out": asdict(accuracy),
        }
        for kind, found in runs.items()
        for run, accuracy in zip(found, accuracies[kind], strict=True)
    ]
    differences = {kind: asdict(value) for kind, value in beside.items()}
    return {"baseline": BASELINE, "runs": spent, "minus_baseline": differences, "unequal": unequal_budgets(runs), "unscored": unscored}


def compare(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    accuracies: Mapping[str, Sequence[Accuracy]],
    beside: Mapping[str, Difference],
    seeds: Sequence[int],
) -> str:
    """Return a Markdown table, a line for each rule and seed, and a line for each rule beside chance."""
    lines = ["| selected by | seed | pairs selected | silver | gold | best RM on held-out pairs | 95 % interval |", "|---|---|---|---|---|---|---|"]
    for kind, found in runs.items():
        for run, accuracy, seed in zip(found, accuracies[kind], seeds, strict=True):
            sizes = run["sets"]
            gold = sizes["gold-working"] + sizes["gold-audit"]
            measured = f"{100 * accuracy.accuracy:.1f} % of {accuracy.num_pairs} | {100 * accuracy.low:.1f} to {100 * accuracy.high:.1f}"
            lines.append(f"| {kind} | {seed} | {sum(run['selected'])} | {sizes['silver']} | {gold} | {measured} |")
    for kind, value in beside.items():
        interval = f"{100 * value.low:+.1f} to {100 * value.high:+.1f}"
        over = f"{value.num_pairs} pairs and {value.num_seeds} seeds; the interval is over other prompts, for these very models"
        lines.append(f"\n{kind} minus random: {100 * value.difference:+.1f} points ({interval}), over {over}")
    lines += [f"\nWARNING: the rules did not spend the same: {line}" for line in unequal_budgets(runs)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
