"""The catalogue: published preference sets as declared rows (YAML beside this file), each with what its columns are and who has shown that.

Paper: Sec. 3 and App. C (more than 40 public sets; the list is not published). Our choice: which sets. A row's route follows the paper: the 80K set
is the seed, originally human-labelled sets are unverified, everything else is wild. A row is `confirmed` only by a page or file that shows its
columns.
"""

from functools import lru_cache
from importlib.resources import files
from typing import Self

import yaml
from pydantic import Field, ValidationError, model_validator

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError
from synpref_ray.ingest.adapters import Adapter
from synpref_ray.ingest.source import FileFormat, HubDataset, LabelKind, PairColumns, Route, SourceConfig

GROUPS = ("human", "ai", "verifier")
"""The files, one for each kind of label."""


class CatalogueRow(Settings):
    """One published preference set."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    hub: HubDataset
    format: FileFormat = FileFormat.AUTO
    """How the published files are written."""
    adapter: Adapter
    where: dict[str, str] = Field(default={})
    """The rows that are meant, where a file holds more than one split."""
    source_id: tuple[str, ...] = ()
    """Paths that may hold an id of the set's own."""
    label_kind: LabelKind
    route: Route
    licence: str = Field(min_length=1)
    """As the publisher names it, `unknown` where no one says."""
    notes: str = ""
    confirmed: str = ""
    """The page or repository file that shows the columns; empty: from memory, not confirmed."""

    @model_validator(mode="after")
    def _follows_the_paper(self) -> Self:
        if self.label_kind is not LabelKind.HUMAN and self.route is Route.UNVERIFIED:
            raise ValueError(f"{self.name}: only originally human-labelled sets are routed to the pool unverified")
        return self


@lru_cache(maxsize=1)
def catalogue() -> dict[str, CatalogueRow]:
    """Return all rows by name, in the order of the files.

    Raises:
        ConfigError: a row is not valid, or two have one name.
    """
    rows: dict[str, CatalogueRow] = {}
    for group in GROUPS:
        for values in yaml.safe_load(files(__name__).joinpath(f"{group}.yaml").read_text(encoding="utf-8")):
            try:
                row = CatalogueRow.model_validate(values)
            except ValidationError as error:
                raise ConfigError(f"catalogue/{group}.yaml: {values.get('name')}: {' '.join(str(error).split())}") from None
            if row.name in rows:
                raise ConfigError(f"catalogue/{group}.yaml: two rows are called {row.name}")
            rows[row.name] = row
    return rows


def with_catalogue(source: SourceConfig) -> SourceConfig:
    """Fill what a source leaves open from the catalogue row it names with `catalogue`, or is called like.

    A name alone stands for a row where nothing else is said: a source with a `path`, `columns` or an `adapter` of its own is filled only from the row
    that it names with `catalogue`, since its files may have any form.

    Raises:
        ConfigError: the row that it names does not exist.
    """
    given = source.model_fields_set
    if not source.catalogue and (source.name not in catalogue() or source.path or given & {"columns", "adapter"}):
        return source
    row = catalogue().get(source.catalogue or source.name)
    if row is None:
        raise ConfigError(f"source {source.name!r}: the catalogue has no row {source.catalogue!r}; see docs/sources.md")
    filled = {
        "catalogue": row.name,
        "format": row.format,
        "adapter": row.adapter,
        "columns": PairColumns(source_id=row.source_id),
        "where": row.where,
        "hub": row.hub,
        "licence": row.licence,
        "label_kind": row.label_kind,
        "route": row.route,
    }
    return source.model_copy(update={name: value for name, value in filled.items() if name == "catalogue" or name not in given})


def sources_table() -> str:
    """Return the catalogue as a Markdown table, for docs/sources.md."""
    lines = ["| name | data set | rows become pairs by | labels | pool | licence | columns shown by |", "|---|---|---|---|---|---|---|"]
    for row in catalogue().values():
        hub = f"[{row.hub.dataset}](https://huggingface.co/datasets/{row.hub.dataset})"
        where = ", ".join(
            part for part in (row.hub.config, row.hub.split, row.hub.files, *(f"{column} = {value}" for column, value in row.where.items())) if part
        )
        confirmed = row.confirmed or "**not confirmed**"
        cells = (row.name, f"{hub} ({where})", row.adapter.kind, row.label_kind.value, row.route.value, row.licence, confirmed)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
