"""RM-Bench (THU-KEG/RM-Bench): three right and three wrong replies to a prompt, each concise, detailed and detailed with Markdown.

Official: `scripts/utils.py`, `compute_accuracy`. For every right style i and wrong style j, the share of items in which the right reply has the
strictly higher reward: a 3 x 3 matrix. hard is the mean of the three cells above its diagonal (a plainer right reply against a fancier wrong one),
normal the diagonal's, easy that of those below. Per domain (safety pools its two files); easy, normal and hard are the plain means over the four
domains, and the overall score the mean of the domains' own means, which is the same number.
Format: `chat_filtered.json`, `code_filtered.json`, `math_filtered.json`, `safety-refuse_filtered.json`, `safety-response_filtered.json`, or
`total_dataset.json`, whose rows name their `domain`; each row has `prompt`, `chosen` (3) and `rejected` (3).
Where domains are missing, `present_domains/…` are the same means over those that are there: not official.
"""

from collections.abc import Sequence

import numpy as np

from synpref_ray.errors import InputError
from synpref_ray.evaluation.benchmarks.core import (
    Benchmark,
    CellBuilder,
    Counted,
    Floats,
    HubPart,
    Item,
    Means,
    Measured,
    Outcome,
    Part,
    ReadItems,
    Row,
    Verified,
    mean_of,
    missing_cells,
)
from synpref_ray.evaluation.benchmarks.fields import one_of, read_name, read_prompt, read_text, read_texts

DOMAINS = ("chat", "math", "code", "safety")
NUM_ITEMS = {"chat": 129, "math": 529, "code": 228, "safety": 441}
STYLES = ("concise", "detailed", "markdown")
DIFFICULTIES = ("easy", "normal", "hard")
_TOTAL = "total_dataset"
_CELLS = [(right, wrong) for right in range(3) for wrong in range(3)]


def read_rm_bench(parts: Sequence[Part]) -> ReadItems:
    """Read the files of the domains, or the file of all of them alone where it is there.

    Raises:
        InputError: a row lacks a field or has not three replies of each kind, or its domain is unknown.
    """
    total = [part for part in parts if _TOTAL in part.name]
    items = []
    for part in total or parts:
        for number, row in enumerate(part.rows):
            where = f"{part.name}, row {number}"
            right, wrong = read_texts(row, "chosen", where), read_texts(row, "rejected", where)
            if (len(right), len(wrong)) != (3, 3):
                raise InputError(f"{where}: expected three chosen and three rejected replies, found {len(right)} and {len(wrong)}")
            domain = _domain(part, row, where)
            pairs = tuple((i, 3 + j) for i, j in _CELLS)
            name = f"{domain}/{read_name(row, ('id',), str(number))}"
            items.append(Item(name, read_prompt(row, "prompt", where), right + wrong, pairs, domain))
    return ReadItems(items)


def _domain(part: Part, row: Row, where: str) -> str:
    told = read_text(row, "domain", where) if "domain" in row else part.name.rsplit("/", 1)[-1]
    return one_of(
        next((domain for domain in DOMAINS if told.lower().startswith(domain)), told), DOMAINS, where, "domain (of the row or the file's name)"
    )


def measure_rm_bench(items: Sequence[Item], outcomes: Sequence[Outcome]) -> Measured:
    """Return easy, normal and hard of every domain, their means, and the matrix by style."""
    builder = CellBuilder()
    for item, outcome in zip(items, outcomes, strict=True):
        for (right, wrong), win in zip(_CELLS, outcome.wins, strict=True):
            builder.add(_cell(item.subset, right, wrong), float(win), item.prompt_key)
    cells = builder.finish()
    present = [domain for domain in DOMAINS if _cell(domain, 0, 0) in cells]
    reason = missing_cells({domain: cells[_cell(domain, 0, 0)] for domain in present}, DOMAINS)
    missing = dict.fromkeys(("overall", *DIFFICULTIES), reason) if reason else {}
    return Measured(cells, lambda means: _combine(means, present), missing)


def _cell(domain: str, right: int, wrong: int) -> str:
    return f"{domain}/matrix/{STYLES[right]}_over_{STYLES[wrong]}"


def difficulties(matrix: Floats) -> dict[str, Floats]:
    """Return easy, normal and hard of a 3 x 3 matrix, (3, 3, R): rows right styles, columns wrong ones.

    The sums are in the order in which numpy adds up the officials' triangles of nine numbers, so that the last digit is theirs too.
    """
    return {
        "easy": (matrix[1, 0] + (matrix[2, 0] + matrix[2, 1])) / 3,
        "normal": (matrix[0, 0] + matrix[1, 1] + matrix[2, 2]) / 3,
        "hard": (matrix[0, 1] + matrix[0, 2] + matrix[1, 2]) / 3,
    }


def _combine(means: Means, present: Sequence[str]) -> dict[str, Floats]:
    values: dict[str, Floats] = {}
    for domain in present:
        matrix = np.array([[means[_cell(domain, right, wrong)] for wrong in range(3)] for right in range(3)])
        levels = difficulties(matrix)
        values |= {f"{domain}/{level}": value for level, value in levels.items()}
        values[f"{domain}/mean"] = mean_of(levels, DIFFICULTIES)
    prefix = "" if len(present) == len(DOMAINS) else "present_domains/"
    levels = {level: mean_of(values, [f"{domain}/{level}" for domain in present]) for level in DIFFICULTIES}
    overall = {"overall": mean_of(levels, DIFFICULTIES), **levels}  # by domain or by difficulty: the same mean
    return {**{f"{prefix}{name}": value for name, value in overall.items()}, **values, **means}


RM_BENCH = Benchmark(
    name="rm_bench",
    read=read_rm_bench,
    measure=measure_rm_bench,
    verified=Verified.OFFICIAL_OUTPUT,
    verified_of={
        **dict.fromkeys(("overall", *DIFFICULTIES), Verified.HAND_WORKED),  # no official output with math was to be had
        **dict.fromkeys(("math", "present_domains"), Verified.HAND_WORKED),
    },
    headline=("overall", *DIFFICULTIES, "present_domains/overall", *(f"present_domains/{level}" for level in DIFFICULTIES)),
    num_items=1327,
    counted={domain: Counted(number, (domain,)) for domain, number in NUM_ITEMS.items()},
    folders=("rm_bench", "rm-bench", "RM-Bench"),
    is_part=lambda path: "_filtered" in path or _TOTAL in path,
    hub=(HubPart("THU-KEG/RM-Bench", "train"),),
)
