"""The one check every rule over a table starts with. Rules know no tables, so they bring their own."""

import pyarrow as pa

from synpref_ray.errors import SchemaError


def require_columns(table: pa.Table, columns: tuple[str, ...], *, rule: str) -> None:
    """Raise `SchemaError` naming the rule and the columns that the table lacks."""
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise SchemaError(f"rule {rule!r} needs the column {', '.join(missing)}; the table has {', '.join(table.column_names)}")
