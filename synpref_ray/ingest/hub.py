"""Rows streamed from the Hugging Face hub, where there is one: the same adapters, nothing stored but the chunks."""

import os
import zlib
from collections.abc import Iterator

import pyarrow as pa

from synpref_ray.credentials import redact
from synpref_ray.errors import InputError
from synpref_ray.ingest.adapt import adapt_rows
from synpref_ray.ingest.chunk import Chunk
from synpref_ray.ingest.rows import FileRow, plain_rows
from synpref_ray.ingest.source import HubDataset, SourceConfig


def hub_address(hub: HubDataset) -> str:
    """Return what stands for a data set in place of a file's path."""
    parts = [part for part in (hub.config, hub.split, hub.files) if part]
    return f"hf://datasets/{hub.dataset}@{hub.revision or 'main'}#{','.join(parts)}"


def pin_revision(hub: HubDataset) -> HubDataset:
    """Return the data set at the commit that its revision (or the main branch) is at now, so that the record says what was read.

    Raises:
        InputError: the hub cannot be reached, or has no such data set.
    """
    if os.path.isdir(hub.dataset):
        raise InputError(f"{hub.dataset} is a folder, not a data set of the hub; give it as the source's path")
    from huggingface_hub import HfApi  # here and below: a worker that reads files should not pay for these imports

    try:
        commit = HfApi().dataset_info(hub.dataset, revision=hub.revision or None).sha
    except _hub_faults() as error:
        raise InputError(f"cannot read the data set {hub.dataset} from the hub: {_one_line(error)}; give a local copy as its path") from None
    return hub.model_copy(update={"revision": commit or hub.revision})


def read_hub_chunks(source: SourceConfig, *, max_rows: int, max_bytes: int) -> Iterator[Chunk]:
    """Stream a source's data set as chunks; `readers.read_pair_file` states the contract. A local folder in the hub's layout reads the same.

    Raises:
        InputError: there is no such data set, configuration or split, or the hub cannot be reached.
    """
    yield from adapt_rows(read_hub_rows(source.hub), source, hub_address(source.hub), max_rows=max_rows, max_bytes=max_bytes)


def read_hub_rows(hub: HubDataset) -> Iterator[FileRow]:
    """Stream a data set's rows as they are.

    Raises:
        InputError: as `read_hub_chunks` says.
    """
    yield from plain_rows(_stream(hub))


def _stream(hub: HubDataset) -> Iterator[object]:
    from datasets import load_dataset

    faults = _hub_faults()
    try:
        dataset = load_dataset(
            hub.dataset,
            hub.config or None,
            split=hub.split,
            revision=hub.revision or None,
            data_files={hub.split: hub.files} if hub.files else None,
            streaming=True,
        )
        yield from dataset
    except faults as error:
        raise InputError(f"cannot read {hub_address(hub)}: {_one_line(error) or type(error).__name__}") from None


def _hub_faults() -> tuple[type[Exception], ...]:
    """Return what the hub's clients raise for a net, a file or a data set that is not as it should be, while it is opened and while it is read."""
    import httpx2
    from datasets.exceptions import DatasetsError

    return (httpx2.HTTPError, httpx2.StreamError, DatasetsError, OSError, EOFError, ValueError, pa.ArrowException, zlib.error)


def _one_line(error: BaseException) -> str:
    return redact(" ".join(str(error).split()))  # the hub's clients name the signed URLs of its storage
