"""Plain-text tables for a job's last screen."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table: first column left, the others right, a rule under the header."""
    widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def format_share(part: float, whole: float) -> str:
    """Return `part / whole` in percent with one digit, or a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
