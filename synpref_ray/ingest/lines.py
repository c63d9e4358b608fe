"""Lines of a text file, plain or gzip, streamed and numbered."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from typing import IO, cast

from synpref_ray.errors import InputError

MAX_LINE_BYTES = 256 * 2**20  # ours: a longer line is some other format, and would not fit the memory of a small worker
GZIP_MAGIC = b"\x1f\x8b"
JSON_WHITE_SPACE = b" \t\r\n"


def numbered_lines(stream: IO[bytes], file: str) -> Iterator[tuple[int, bytes]]:
    """Yield every line without its line break, numbered from 0; gzip is recognised by its first bytes, whatever the name."""
    is_gzip = stream.read(2) == GZIP_MAGIC
    stream.seek(0)
    lines = cast(IO[bytes], gzip.GzipFile(fileobj=stream)) if is_gzip else stream
    number = 0
    while True:
        try:
            line = lines.readline(MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:
            found = " ".join(str(error).split())
            raise InputError(f"{file} is truncated or damaged after line {number}: {found}; fetch it again") from None
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"{file}: line {number + 1} is longer than {MAX_LINE_BYTES >> 20} MiB; expected one JSON object per line")
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, line.removesuffix(b"\n")
        number += 1
