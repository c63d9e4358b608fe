"""Makes the demo's data: prompts, sampled replies, checkers, pairs, noise.

Paper: arXiv:2507.01352 curates public preference data, which this project may not ship; this script makes a small stand-in, truth known.

In:  the bundled SmolLM2-135M-Instruct (only for prompts that the samples file lacks).
Out: DIR/pools/{seed,unverified,wild}.jsonl, DIR/held_out.parquet (labels true), DIR/truth.parquet (pair_id, verdict, kind, pool), the samples.

    python examples/make_pool.py --output examples/data                             # from the committed samples: 2 seconds, no model
    python examples/make_pool.py --output DIR --samples DIR/samples.jsonl.gz        # samples everything anew
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # works without an installed package

from examples.demo_tasks.assembly import AssemblyConfig, DemoPair, assemble, pass_rates  # noqa: E402
from examples.demo_tasks.files import write_demo  # noqa: E402
from examples.demo_tasks.kinds import Task, build_tasks  # noqa: E402
from examples.demo_tasks.sampling import SamplingConfig, read_samples, sample_replies, usable, write_samples  # noqa: E402
from synpref_ray.errors import SynprefError  # noqa: E402
from synpref_ray.schema import Verdict  # noqa: E402

NUM_POOL_PROMPTS = 42  # of every kind
NUM_HELD_OUT_PROMPTS = 17
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(argv: Sequence[str]) -> int:
    """Sample what is missing, assemble, write, and print what was made."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = AssemblyConfig(seed_noise=arguments.seed_noise, unverified_noise=arguments.unverified_noise, wild_noise=arguments.wild_noise)
        tasks = build_tasks(NUM_POOL_PROMPTS, NUM_HELD_OUT_PROMPTS)
        samples = _complete_samples(tasks, arguments.samples, arguments.model)
        pools = assemble(tasks, samples, config)
    except SynprefError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    paths = write_demo(arguments.output, pools)
    print(summary(tasks, samples, pools, paths))  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    defaults = AssemblyConfig()
    parser = argparse.ArgumentParser(description="Make the demo's pair files and their truth.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pair files and truth.parquet")
    parser.add_argument(
        "--samples",
        type=Path,
        default=REPOSITORY / "examples" / "data" / "samples.jsonl.gz",
        help="raw replies; missing ones are sampled and added",
    )
    parser.add_argument("--model", default=MODEL, help="folder or name of the model that is sampled")
    parser.add_argument("--seed-noise", type=float, default=defaults.seed_noise, help="share of wrong labels in seed")
    parser.add_argument("--unverified-noise", type=float, default=defaults.unverified_noise, help="share of wrong labels in unverified")
    parser.add_argument("--wild-noise", type=float, default=defaults.wild_noise, help="share of wrong labels in wild")
    return parser


def _complete_samples(tasks: Sequence[Task], path: Path, model: str) -> dict[str, list[str]]:
    """Return replies to every prompt, sampling those that the file lacks; each part is stored as it comes."""
    samples = read_samples(path)
    missing = [task.text for task in tasks if task.text not in samples]
    if missing:
        from synpref_ray.bundled import resolve_model

        for part in sample_replies(missing, resolve_model(model), SamplingConfig()):
            samples |= part
            write_samples(path, samples)
    return {prompt: [reply for reply in replies if usable(reply)] for prompt, replies in samples.items()}


def summary(tasks: Sequence[Task], samples: dict[str, list[str]], pools: dict[str, list[DemoPair]], paths: Sequence[Path]) -> str:
    """Describe the result: pass rate and pairs by kind, size, label accuracy and length baseline by pool."""
    rates = pass_rates(tasks, samples)
    lines = ["kind                  pass rate  " + "  ".join(f"{name:>10s}" for name in pools)]
    for kind, rate in rates.items():
        counts = [sum(pair.kind == kind for pair in pairs) for pairs in pools.values()]
        lines.append(f"{kind:20s}  {rate:9.2f}  " + "  ".join(f"{count:10d}" for count in counts))
    for name, pairs in pools.items():
        right = sum(pair.verdict is Verdict.CHOSEN for pair in pairs) / len(pairs)
        lines.append(f"{name}: {len(pairs)} pairs, {right:.3f} of labels right, the shorter reply is better in {_shorter_is_better(pairs):.3f}")
    return "\n".join([*lines, *(f"wrote {path} ({path.stat().st_size} bytes)" for path in paths)])


def _shorter_is_better(pairs: Sequence[DemoPair]) -> float:
    """Share of pairs whose better reply has fewer characters (equal lengths count half)."""
    points = 0.0
    for pair in pairs:
        better, worse = (pair.chosen, pair.rejected) if pair.verdict is Verdict.CHOSEN else (pair.rejected, pair.chosen)
        points += 0.5 if len(better) == len(worse) else float(len(better) < len(worse))
    return points / len(pairs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
