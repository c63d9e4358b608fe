"""What the paper reports, for comparison beside our own numbers. Paper: arXiv:2507.01352v3, Tables 1, 14 and 19; values in percent as printed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperBenchmark:
    """A column of Table 1, and the metric of ours that means the same."""

    title: str
    benchmark: str
    metric: str
    remark: str = ""


SOURCE = "arXiv 2507.01352v3"
BENCHMARKS = (
    PaperBenchmark("RewardBench", "rewardbench", "overall"),
    PaperBenchmark("RewardBench 2", "rewardbench2", "overall"),
    PaperBenchmark("PPE Preference", "ppe_preference", "accuracy"),
    PaperBenchmark("PPE Correctness", "ppe_correctness", "accuracy", "the paper does not say which of PPE's metrics it shows"),
    PaperBenchmark("RMB", "rmb", "overall"),
    PaperBenchmark("RM-Bench", "rm_bench", "overall"),
    PaperBenchmark("JudgeBench", "judgebench", "macro", "the paper prints the mean of four groups; the official number pools all pairs (micro)"),
)
MODELS: Mapping[str, tuple[float, ...]] = {
    "Qwen3-0.6B": (85.2, 61.3, 65.3, 68.3, 74.5, 74.4, 67.6),
    "Qwen3-1.7B": (90.3, 68.3, 67.6, 70.5, 78.1, 78.7, 72.9),
    "Qwen3-4B": (93.4, 75.5, 69.5, 74.7, 80.6, 81.6, 69.5),
    "Qwen3-8B": (93.7, 78.2, 70.6, 75.1, 81.2, 82.6, 73.4),
    "Llama-3.2-1B": (89.9, 64.3, 66.6, 67.4, 76.7, 76.3, 65.0),
    "Llama-3.2-3B": (93.0, 74.7, 69.1, 72.1, 80.5, 81.1, 69.2),
    "Llama-3.1-8B": (96.4, 84.1, 77.3, 83.4, 86.4, 92.8, 80.0),
    "Llama-3.1-8B-40M": (97.8, 86.5, 79.8, 87.2, 89.3, 96.0, 83.4),
}
"""Rows of Table 1 in its order, columns as `BENCHMARKS`."""

JUDGE_AGREEMENT = {"LLM alone": (75, 63), "people without tools": (81, 76), "LLM and people": (87, 77), "LLM, people and retrieval": (93, 84)}
"""Table 14: agreement with gold in percent, on (objective, subjective) pairs."""
CURATION_AGREEMENT = (86, 92)
"""Table 19, best and gold RM together: how many (kept, flipped) pairs people agreed with, in percent."""


def paper_values(place: int) -> dict[str, float]:
    """Return what the eight models reached in column `place` of Table 1, as fractions."""
    return {name: values[place] / 100 for name, values in MODELS.items()}


def name_of_backbone(backbone: str) -> str:
    """Return a backbone's own name: of a folder, or of a hub's repository, whose owner and pinned commit are left out."""
    return re.sub("@[0-9a-f]{40}$", "", backbone).rstrip("/").rsplit("/", 1)[-1]


def paper_model_of(backbone: str) -> str | None:
    """Return the row of Table 1 whose backbone this is; None where the paper has none. The 40M model shares its backbone with another row."""
    name = name_of_backbone(backbone).removesuffix("-Instruct")
    return name if name in MODELS else None
