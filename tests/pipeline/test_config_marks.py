"""Every value of a config at the paper's scale says where it is from: the paper (Sec., App., Fig.) or ours; what needs a GPU has a twin without."""

import re
from pathlib import Path
from typing import Any

import pytest

from synpref_ray.config import load_config
from tests.pipeline.test_configs import CONFIGS, JOBS

PAPER_SCALE = sorted(
    file for file in [*CONFIGS.glob("*.yaml"), *(CONFIGS / "family").glob("*.yaml")] if not file.name.startswith(("laptop_", "demo"))
)
MARK = re.compile(r"#.*(\b(Sec|App|Fig)\. ?[A-H\d]|\b[Oo]urs\b)")
GPU = re.compile(r"^[^#]*(use_gpu: true|device: (gpu|cuda))", re.MULTILINE)


def unmarked(text: str) -> list[str]:
    """Return the lines with a value that no mark covers: on the line, on a block's first line around it, or in a comment right above one of these.

    The comment at the head of the file covers nothing.
    """
    found: list[str] = []
    blocks: list[tuple[int, bool]] = []  # of those around the line: indentation of their first line, and whether they are marked
    above, in_head = False, True
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#") or not stripped:
            above = not in_head and (above or bool(MARK.search(line)))
            continue
        in_head = False
        indentation = len(line) - len(line.lstrip())
        while blocks and blocks[-1][0] >= indentation:
            blocks.pop()
        marked = above or bool(MARK.search(line)) or any(mark for _, mark in blocks)
        value = re.sub(r"\s*#.*$", "", stripped)
        if value.startswith("- ") and not value.startswith("- {"):  # a list's entry: its other keys are indented further
            blocks.append((indentation, marked and not MARK.search(line)))
            value = value[2:]
        if re.fullmatch(r"[\w.-]+:( &\w+)?", value):
            blocks.append((indentation, marked))
        elif not marked:
            found.append(stripped)
        above = False
    return found


def test_what_covers_a_value() -> None:
    assert unmarked("# Sec. 3: of the file\na: 1\nb: 2  # ours: so\n") == ["a: 1"]
    assert unmarked("a:  # Sec. 3.1\n  b: 1\n  c:\n    d: 2\ne: 3\n") == ["e: 3"]
    assert unmarked("a:\n  # Ours: both of\n  # them.\n  b: {c: 1}\n  d: 2\n") == ["d: 2"]
    assert unmarked("a:\n  - b: 1  # ours\n    c: 2\n  - {d: 3}\n") == ["c: 2", "- {d: 3}"]


@pytest.mark.parametrize("file", PAPER_SCALE, ids=lambda file: file.stem)
def test_every_value_names_its_source(file: Path) -> None:
    assert unmarked(file.read_text(encoding="utf-8")) == []


def test_what_needs_a_gpu_names_a_twin_that_does_not() -> None:
    with_gpu = [file for file in PAPER_SCALE if GPU.search(file.read_text(encoding="utf-8"))]
    assert len(with_gpu) >= 7
    for file in with_gpu:
        twin = re.search(r"^# .*twin for a CPU: (laptop_(\w+)\.yaml)\.$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert twin, file
        text = (CONFIGS / twin[1]).read_text(encoding="utf-8")
        assert not GPU.search(text)
        config: Any = load_config(JOBS[twin[2]], str(CONFIGS / twin[1]), [])
        assert file.parent.name == "family" or isinstance(config, JOBS[file.stem])
