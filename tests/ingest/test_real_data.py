"""Real human pairs come through whole: counts pinned, ids and duplicates checked against plain Python."""

from pathlib import Path

import pytest

from synpref_ray import schema
from synpref_ray.ingest import (
    Comparison,
    IdWriter,
    Layout,
    PairFile,
    Route,
    SourceConfig,
    chunk_marks,
    list_source_files,
    make_plan,
    pairs_path,
    read_pair_file,
    read_staged,
    take_part,
    write_staged,
)
from synpref_ray.ingest.chunk import Chunk
from synpref_ray.tables.storage import Storage


def read(path: Path, route: Route = Route.WILD) -> tuple[SourceConfig, list[Chunk]]:
    source = SourceConfig(name=path.parent.name, path=str(path), route=route)
    return source, [chunk for file in list_source_files(source) for chunk in read_pair_file(file, source)]


@pytest.mark.parametrize(("file", "num_pairs"), [("hh_rlhf/train.parquet", 1456), ("hh_rlhf/test.parquet", 269), ("human_extra/train.parquet", 3376)])
def test_every_row_is_a_pair_and_none_contradicts_another(shared_data: Path, file: str, num_pairs: int) -> None:
    _, chunks = read(shared_data / file)
    assert (sum(chunk.pairs.num_rows for chunk in chunks), sum(chunk.rejects.num_rows for chunk in chunks)) == (num_pairs, 0)
    labels = {(repr(row["prompt"]), row["chosen"], row["rejected"]) for chunk in chunks for row in chunk.pairs.to_pylist()}
    assert len(labels) == num_pairs
    assert not any((prompt, rejected, chosen) in labels for prompt, chosen, rejected in labels)
    row = chunks[0].pairs.to_pylist()[0]
    assert row["pair_id"] == schema.pair_id(row["prompt"], row["chosen"], row["rejected"])
    assert len(row["source_id"]) == 20


def test_two_sources_make_two_pools(shared_data: Path, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    files = []
    # the wild source repeats the seed's file, so that all its pairs are duplicates
    for file, route in [("hh_rlhf/t*.parquet", Route.WILD), ("human_extra", Route.UNVERIFIED), ("hh_rlhf/train.parquet", Route.SEED)]:
        source, chunks = read(shared_data / file, route)
        folder = f"file-{len(files):05d}"
        ids = IdWriter(storage, folder)
        for number, chunk in enumerate(chunks):
            write_staged(storage, pairs_path(folder, number), chunk.pairs)
            ids.add(chunk.pairs)
        ids.flush()
        files.append(PairFile(route, route.value, source.path, folder, tuple(map(tuple, ids.pieces))))
    comparison = Comparison.of(storage, "compared", Layout.of(files), pairs_per_part=1000)
    for part in range(comparison.num_parts):
        comparison.decide_part(part)
    gathered = [comparison.gather_piece(piece) for piece in range(len(comparison.layout.pieces))]
    plan = make_plan(comparison, gathered, max_pairs_per_shard=dict.fromkeys(Route, 500))
    assert plan.kept == {"seed": 1456, "unverified": 3376, "wild": 269}
    assert plan.duplicates == {"seed": 0, "unverified": 0, "wild": 1456}
    assert plan.contradicted == dict.fromkeys(Route, 0)
    last = [part for task in plan.tasks if task.route is Route.UNVERIFIED for part in task.parts][-1]
    assert (last.shard, last.end - last.start) == (6, 3376 - 6 * 500)
    assert take_part(last, read_staged(storage, last.chunk.path), chunk_marks(comparison, last.chunk)).num_rows == 376
