"""Rows through an adapter into chunks: proposals meet the structural filter, and every row ends in at least one pair or one reject."""

from collections.abc import Iterable, Iterator, Mapping

from synpref_ray.errors import InputError
from synpref_ray.ingest.adapters import PairAdapter, RatedRowsAdapter, RowAdapter, Span, label_text, propose_group, propose_pairs
from synpref_ray.ingest.chunk import Chunk, ChunkBuilder, row_to_json
from synpref_ray.ingest.fields import PromptFields, dig, read_prompt
from synpref_ray.ingest.pairing import Candidate, Refusal
from synpref_ray.ingest.rows import FileRow
from synpref_ray.ingest.source import SourceConfig
from synpref_ray.schema import DropReason


def adapt_rows(rows: Iterable[FileRow], source: SourceConfig, file: str, *, max_rows: int, max_bytes: int) -> Iterator[Chunk]:
    """Turn rows into chunks that follow each other in file order; the same rows always give the same chunks.

    Args:
        max_rows: a chunk ends with the row (or the prompt's rows) that reaches so many pairs and rejects.
        max_bytes: a chunk ends with the row that reaches this size.

    Raises:
        InputError: a source whose prompts' rows stand anywhere has more rows than its adapter may hold.
    """
    adapter = source.adapter or _columns_adapter(source)
    if source.where:
        rows = _rows_where(rows, source.where)
    if isinstance(adapter, RatedRowsAdapter):
        yield from _adapt_groups(rows, adapter, source, file, max_rows=max_rows, max_bytes=max_bytes)
        return
    collector = _Collector(source, file)
    for row in rows:
        collector.take_row(row, adapter)
        if collector.is_full(max_rows, max_bytes):
            yield collector.finish()
            collector.renew()
    if collector.num_rows_read:
        yield collector.finish()


def _rows_where(rows: Iterable[FileRow], where: Mapping[str, str]) -> Iterator[FileRow]:
    """Refuse the rows that have other values; a row without such a column at all lacks a field."""
    wanted = {path: value.strip().casefold() for path, value in where.items()}
    for row in rows:
        found = {path: label_text(dig(row.values, path)) for path in wanted} if row.reason is None else wanted
        if found == wanted:
            yield row
        else:
            reason = DropReason.MISSING_FIELD if None in found.values() else DropReason.NOT_IN_SPLIT
            yield FileRow(row.number, {}, reason, row_to_json(row.values))


def _columns_adapter(source: SourceConfig) -> PairAdapter:
    columns = source.columns
    return PairAdapter(prompt=PromptFields(fields=(columns.prompt,)), chosen=columns.chosen, rejected=columns.rejected)


def _adapt_groups(
    rows: Iterable[FileRow], adapter: RatedRowsAdapter, source: SourceConfig, file: str, *, max_rows: int, max_bytes: int
) -> Iterator[Chunk]:
    collector = _Collector(source, file)
    groups = _runs(rows, adapter, collector) if adapter.span is Span.RUN else _gathered(rows, adapter, collector, file)
    for group in groups:
        collector.take_group(group, adapter)
        if collector.is_full(max_rows, max_bytes):
            yield collector.finish()
            collector.renew()
    if collector.num_rows_read:
        yield collector.finish()


def _runs(rows: Iterable[FileRow], adapter: RatedRowsAdapter, collector: "_Collector") -> Iterator[list[FileRow]]:
    """Yield rows with an equal prompt that follow each other; an unreadable row between them does not part them."""
    group: list[FileRow] = []
    key = ""
    for row in rows:
        if row.reason is not None:
            collector.refuse_row(row)
            continue
        own = _group_key(row, adapter)
        if group and own != key:
            yield group
            group = []
        key = own
        group.append(row)
    if group:
        yield group


def _gathered(rows: Iterable[FileRow], adapter: RatedRowsAdapter, collector: "_Collector", file: str) -> Iterator[list[FileRow]]:
    """Yield all rows of a file with an equal prompt, prompts in the order of their first row."""
    groups: dict[str, list[FileRow]] = {}
    for count, row in enumerate(rows, start=1):
        if count > adapter.max_rows:
            raise InputError(f"{file} has more than {adapter.max_rows} rows, too many to be grouped by prompt in memory; sort it and say span: run")
        if row.reason is not None:
            collector.refuse_row(row)
        else:
            groups.setdefault(_group_key(row, adapter), []).append(row)
    yield from groups.values()


def _group_key(row: FileRow, adapter: RatedRowsAdapter) -> str:
    return row_to_json({"prompt": read_prompt(row.values, adapter.prompt)})


class _Collector:
    """Fills one chunk after the other, and counts the rows."""

    def __init__(self, source: SourceConfig, file: str):
        self._source = source
        self._file = file
        self.renew()

    def renew(self) -> None:
        """Begin the next chunk."""
        self._builder = ChunkBuilder(self._source, self._file)
        self.num_rows_read = 0

    def is_full(self, max_rows: int, max_bytes: int) -> bool:
        """Whether the chunk has reached a ceiling."""
        return self._builder.num_rows >= max_rows or self._builder.num_bytes >= max_bytes

    def finish(self) -> Chunk:
        """Return the chunk."""
        return self._builder.finish(self.num_rows_read)

    def refuse_row(self, row: FileRow) -> None:
        """Take a row that could not be read."""
        assert row.reason is not None, "a readable row goes through its adapter"
        self.num_rows_read += 1
        self._builder.reject(row.number, row.reason, row.text)

    def take_row(self, row: FileRow, adapter: RowAdapter) -> None:
        """Take a row that stands for itself."""
        if row.reason is not None:
            self.refuse_row(row)
            return
        self.num_rows_read += 1
        for proposal in propose_pairs(row.values, adapter):
            if isinstance(proposal, Refusal):
                item = row.values if proposal.item is None else {"refused": proposal.item}
                self._builder.reject(row.number, proposal.reason, row_to_json(item))
            else:
                self._propose(row, proposal)

    def take_group(self, group: list[FileRow], adapter: RatedRowsAdapter) -> None:
        """Take the rows of one prompt."""
        self.num_rows_read += len(group)
        candidates, reasons = propose_group([row.values for row in group], adapter)
        for row, reason in zip(group, reasons, strict=True):
            if reason is not None:
                self._builder.reject(row.number, reason, row_to_json(row.values))
        for candidate in candidates:
            self._propose(group[int(candidate.mark.partition(">")[0])], candidate)

    def _propose(self, row: FileRow, candidate: Candidate) -> None:
        own = next((value for name in self._source.columns.source_id if (value := dig(row.values, name)) is not None), None)
        if own is not None and candidate.mark:
            own = f"{own}#{candidate.mark}"
        reason = self._builder.add(row.number, candidate.prompt, candidate.chosen, candidate.rejected, source_id=own)
        if reason is not None:
            whole = row.values if not candidate.mark else {"pair": candidate.mark, "row": dict(row.values)}
            self._builder.reject(row.number, reason, row_to_json(whole))
