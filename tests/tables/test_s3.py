"""Storage on a real S3 server, behind a proxy that makes calls fail: what tables rely on holds under every kind of failure, or the error is clear."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from synpref_ray.errors import ConfigError, InputError, RunConflictError, StorageError
from synpref_ray.ingest.readers import digest_file, open_binary
from synpref_ray.ingest.source import SourceConfig, list_source_files
from synpref_ray.pipeline.benchmark_files import find_benchmark
from synpref_ray.pipeline.cluster import probe_workspace
from synpref_ray.pipeline.ingest_sources import IngestConfig, resolve_sources
from synpref_ray.tables import leases, objects, s3_requests
from synpref_ray.tables.files import file_size, is_file, is_folder
from synpref_ray.tables.leases import Lease
from synpref_ray.tables.models import model_folder
from synpref_ray.tables.objects import S3Objects
from synpref_ray.tables.row_file import read_rows
from synpref_ray.tables.storage import Storage
from tests.s3 import S3Server
from tests.s3_proxy import FAULTS, Call, Fault, FaultProxy, first_of_each, share_of

MIB = 2**20
PART = 5 * MIB  # the smallest that S3 takes, but for the last one
LARGE = random.Random(0).randbytes(2 * PART + 12_345)
pytestmark = pytest.mark.engine
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.address) as running:
        yield running


@pytest.fixture
def storage(s3_server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A workspace of its own behind the proxy; short pauses, small parts and small pages, and a second of silence is a failure."""
    s3_server.use(monkeypatch, proxy.url)
    monkeypatch.setattr(s3_requests, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(s3_requests, "MAX_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(s3_requests, "READ_SECONDS", 1.0)
    for module in (s3_requests, objects):
        monkeypatch.setattr(module, "PART_BYTES", PART)
    monkeypatch.setattr(objects, "PAGE_KEYS", 3)
    yield Storage(f"{s3_server.make_prefix()}/ws")
    proxy.reset()


def every_operation(storage: Storage, folder: Path) -> None:
    """Do each thing that tables do to storage, and check what comes of it."""
    names = [f"many/{number}.txt" for number in range(5)]
    for name in names:
        storage.write_bytes(name, name.encode())
    storage.write_bytes("many/below/deep.txt", b"deep")
    storage.write_bytes("empty", b"")
    storage.write_bytes("large.bin", LARGE)
    assert storage.list_files("many") == ["many/0.txt", "many/1.txt", "many/2.txt", "many/3.txt", "many/4.txt", "many/below/deep.txt"]
    assert storage.list_files("many", deep=False) == names
    assert storage.list_folders("many") == ["below"]
    assert storage.list_files("nothing") == storage.list_folders("nothing") == []
    assert storage.exists("many")
    assert storage.exists("many/0.txt")
    assert not storage.exists("many/0")
    assert [storage.read_bytes(name) for name in names] == [name.encode() for name in names]
    assert storage.read_bytes("empty") == b""
    assert storage.read_bytes("large.bin") == LARGE
    assert storage.read_range("large.bin", PART - 5, 10) == LARGE[PART - 5 : PART + 5]
    with pytest.raises(InputError, match="does not exist"):
        storage.read_bytes("many/9.txt")
    with pytest.raises(InputError, match="cut off"):
        storage.read_range("large.bin", len(LARGE) - 5, 10)
    table = pa.table({"x": list(range(1000))})
    data = storage.write_table("t/shard-00000.parquet", table)
    assert storage.read_bytes("t/shard-00000.parquet") == data
    assert storage.read_table("t/shard-00000.parquet").equals(table)
    assert storage.create_exclusive("lease.json", b"mine")
    assert not storage.create_exclusive("lease.json", b"mine")
    storage.download("large.bin", folder / "local.bin")
    storage.upload(folder / "local.bin", "copy.bin")
    assert storage.read_bytes("copy.bin") == LARGE
    storage.delete("empty")
    storage.delete("empty")
    storage.delete_folder("many")
    storage.delete_folder("many")
    assert storage.list_files("") == ["copy.bin", "large.bin", "lease.json", "t/shard-00000.parquet"]


@pytest.mark.parametrize("kind", [kind for kind in FAULTS if kind != "stall"])
def test_every_operation_works_when_each_call_fails_once(storage: Storage, proxy: FaultProxy, tmp_path: Path, kind: Fault) -> None:
    proxy.reset(first_of_each(kind))
    every_operation(storage, tmp_path)
    assert proxy.faults[kind] > 40


def test_every_operation_works_when_a_read_a_write_a_listing_and_a_part_stall(storage: Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    stalled = first_of_each("stall", lambda call: call.kind)
    kinds = ("GET ", "PUT ", "GET delimiter", "PUT partNumber")
    proxy.reset(lambda call: stalled(call) if call.kind in kinds or call.kind.startswith(kinds[2:]) else None)
    every_operation(storage, tmp_path)
    assert proxy.faults["stall"] >= 4


def test_every_operation_works_when_calls_fail_by_chance(storage: Storage, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.reset(share_of(0.3, 7, [kind for kind in FAULTS if kind != "stall"]))
    every_operation(storage, tmp_path)
    assert len(proxy.faults) == len(FAULTS) - 1


@pytest.mark.parametrize("kind", ["500", "503", "reset", "cut"])
def test_a_failure_that_lasts_is_one_error_after_a_bounded_number_of_calls(storage: Storage, proxy: FaultProxy, kind: Fault) -> None:
    storage.write_bytes("a/b.txt", b"x" * 1000)
    proxy.reset(lambda _: kind)
    for action in (
        lambda: storage.read_bytes("a/b.txt"),
        lambda: storage.write_bytes("a/b.txt", b"y"),
        lambda: storage.list_files("a", deep=False),
        lambda: storage.list_files(""),
        lambda: storage.exists("a/b.txt"),
        lambda: storage.create_exclusive("a/c.txt", b"y"),
    ):
        before = len(proxy.calls)
        with pytest.raises(StorageError, match=r"S3: .* failed 10 times in \d+ s, last with"):
            action()
        assert s3_requests.MAX_ATTEMPTS <= len(proxy.calls) - before <= 2 * s3_requests.MAX_ATTEMPTS  # the HTTP client may mend a lost connection
    proxy.reset()
    assert storage.read_bytes("a/b.txt") in (b"x" * 1000, b"y")  # a cut answer to a write says nothing about the write


def test_a_refusal_is_not_tried_again(storage: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        Storage("s3://not-there-at-all/ws").list_files("")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    proxy.reset()
    with pytest.raises(StorageError, match=r"was refused: .*credentials come from the environment"):
        storage.write_bytes("a.txt", b"a")
    assert len(proxy.calls) == 1


def test_credentials_come_from_the_environment_alone(storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the workspace holds a credential in its URL") as refused:
        Storage("s3://AKIDEXAMPLE:wJalrXUtnFEMI@bucket/ws")
    assert "wJalr" not in str(refused.value)
    keys = tmp_path / "credentials"
    keys.write_text(f"[team]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_PROFILE", "team")
    storage.write_bytes("a.txt", b"a")
    assert storage.read_bytes("a.txt") == b"a"


def test_a_shard_is_invisible_until_its_upload_is_complete(storage: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes("t/old.parquet", b"old")
    waiting, looked = threading.Event(), threading.Event()

    def hold_completions(call: Call) -> None:
        if call.method == "POST" and "uploadId" in call.query:
            waiting.set()
            looked.wait(60)

    monkeypatch.setattr(proxy, "hold", hold_completions)
    monkeypatch.setattr(s3_requests, "READ_SECONDS", 60.0)
    writers = [threading.Thread(target=storage.write_bytes, args=(name, LARGE)) for name in ("t/old.parquet", "t/new.parquet")]
    for writer in writers:
        writer.start()
    try:
        assert waiting.wait(60)
        assert storage.list_files("t") == ["t/old.parquet"]
        assert storage.read_bytes("t/old.parquet") == b"old"
        assert not storage.exists("t/new.parquet")
    finally:
        looked.set()
        for writer in writers:
            writer.join()
    assert storage.read_bytes("t/old.parquet") == storage.read_bytes("t/new.parquet") == LARGE


WRITE = """
import sys
sys.path.insert(0, {root!r})
from synpref_ray.tables import objects
from synpref_ray.tables.storage import Storage
objects.PART_BYTES = {part}
Storage({url!r}).write_bytes("t/large.bin", bytes({size}))
"""


def test_of_a_killed_writer_nothing_is_visible(storage: Storage, proxy: FaultProxy, s3_server: S3Server) -> None:
    under_way = threading.Event()

    def stall_the_second_part(call: Call) -> Fault | None:
        if "partNumber=2" not in call.query:
            return None
        under_way.set()
        return "stall"

    proxy.reset(stall_the_second_part)
    script = WRITE.format(root=ROOT, part=PART, url=storage.url, size=3 * PART)
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert under_way.wait(60)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    proxy.reset()
    assert not storage.exists("t/large.bin")
    assert storage.list_files("") == []
    with pytest.raises(InputError, match="does not exist"):
        storage.read_bytes("t/large.bin")
    there = S3Objects.at(storage.url)
    left = s3_requests.s3_requests().call_s3("list_multipart_uploads", Bucket=there.bucket)["Uploads"]
    assert f"{there.prefix}/t/large.bin" in [upload["Key"] for upload in left]
    storage.write_bytes("t/large.bin", LARGE)
    assert storage.read_bytes("t/large.bin") == LARGE


def test_an_object_that_is_replaced_while_it_is_read_is_an_error_and_never_a_mixture(storage: Storage, proxy: FaultProxy) -> None:
    storage.write_bytes("large.bin", LARGE)
    with open_binary(storage.join("large.bin")) as stream:
        assert stream.read(100) == LARGE[:100]
        stream.seek(0)
        storage.write_bytes("large.bin", LARGE[::-1])
        with pytest.raises(InputError, match="was replaced while it was being read"):
            stream.read()


def test_creation_has_one_winner_among_many(storage: Storage, proxy: FaultProxy) -> None:
    proxy.reset(share_of(0.3, 3, ("lost", "500", "reset")))
    for turn in range(3):
        wins: list[int] = []

        def create(number: int, turn: int = turn, wins: list[int] = wins) -> None:
            if storage.create_exclusive(f"lease-{turn}", b"the same content"):
                wins.append(number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1


def test_replacement_needs_the_old_content(storage: Storage, proxy: FaultProxy) -> None:
    storage.write_bytes("a.txt", b"1")
    proxy.reset(first_of_each("lost"))
    assert storage.replace("a.txt", b"1", b"2")
    assert not storage.replace("a.txt", b"1", b"3")
    assert not storage.replace("b.txt", b"1", b"3")
    proxy.reset()

    def overtake(call: Call) -> None:
        if call.method == "PUT" and not overtaken:
            overtaken.append(call)
            Storage(storage.url).write_bytes("a.txt", b"rival")

    overtaken: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "hold", overtake)
        assert not storage.replace("a.txt", b"2", b"3")
    assert storage.read_bytes("a.txt") == b"rival"


def test_leases_refuse_the_living_and_replace_the_dead(storage: Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE_SECONDS", 0.0)
    proxy.reset(first_of_each("lost"))
    with Lease(storage, "t/lease.json") as lease:
        lease.check()
        with pytest.raises(RunConflictError, match="is held by process"), Lease(storage, "t/lease.json"):
            pass
    assert not storage.exists("t/lease.json")
    storage.write_json("t/lease.json", {"owner": "x", "host": "elsewhere", "pid": 1, "process_started": 0.0, "renewed": time.time() - 61})
    with Lease(storage, "t/lease.json") as lease:
        lease.check()
    assert S3Objects.at(storage.url).list_files("") == [], "no claim is left"


def test_listings_are_fresh_paged_and_without_placeholders(storage: Storage, proxy: FaultProxy) -> None:
    other = Storage(storage.url)
    assert storage.list_files("t") == []
    for number in range(7):
        other.write_bytes(f"t/{number}.txt", b"")
        assert len(storage.list_files("t")) == number + 1
    there = S3Objects.at(storage.url)
    s3_requests.s3_requests().call_s3("put_object", Bucket=there.bucket, Key=f"{there.prefix}/t/sub/", Body=b"")
    proxy.reset()
    assert storage.list_files("t") == [f"t/{number}.txt" for number in range(7)]
    assert sum("list-type=2" in call.query for call in proxy.calls) == 3, "eight objects, three a page"
    other.delete("t/0.txt")
    assert storage.list_files("t")[0] == "t/1.txt"
    storage.write_bytes("pools/a/journal/1.txt", b"")
    storage.write_bytes("pools/b/journal/1.txt", b"")
    proxy.reset()
    assert storage.list_folders("pools") == ["a", "b"]
    assert len(proxy.calls) == 1, "what is in the folders is not listed"


def test_sources_are_found_and_read_whole(storage: Storage, proxy: FaultProxy) -> None:
    text = b'{"pair_id": "a", "verdict": "chosen"}\n' * 20_000
    for name in ("data/a.jsonl", "data/b/c.jsonl", "data/_hidden/d.jsonl", "data/.e.jsonl", "data/notes.txt"):
        storage.write_bytes(name, text)
    proxy.reset(first_of_each("cut"))

    def found(path: str) -> list[str]:
        return [file.removeprefix(f"{storage.url}/") for file in list_source_files(SourceConfig(name="x", path=storage.join(path)))]

    assert found("data") == ["data/a.jsonl", "data/b/c.jsonl"]
    assert found("data/*.jsonl") == ["data/.e.jsonl", "data/a.jsonl"]  # a pattern means what it says, on every file system
    assert found("data/*/*.jsonl") == ["data/_hidden/d.jsonl", "data/b/c.jsonl"]
    assert found("data/**/c.jsonl") == ["data/b/c.jsonl"]
    assert found("data/notes.txt") == ["data/notes.txt"]
    with pytest.raises(InputError, match="found no file"):
        found("nothing")
    with open_binary(storage.join("data/a.jsonl")) as stream:
        assert stream.read() == text
    storage.write_bytes("data/copy.jsonl", text)
    assert digest_file(storage.join("data/a.jsonl")) == digest_file(storage.join("data/copy.jsonl"))
    assert sum(1 for _ in read_rows(storage.join("data/a.jsonl"), what="verdict file", required=["pair_id"])) == 20_000
    with pytest.raises(InputError, match="there is no file"), open_binary(storage.join("data/z.jsonl")):
        pass


FLAKY: tuple[Fault, ...] = ("500", "503", "reset", "cut")


def place_sources(storage: Storage) -> tuple[IngestConfig, IngestConfig, dict[str, str]]:
    """Write a folder of data, a copy of a published set and a benchmark; return two configs of ingest, and where the sources should be found."""
    for name in ("data/seed-a.jsonl", "data/unverified/b.jsonl", "copies/helpsteer3/preference/train.jsonl.gz", "bench/rm_bench/chat_filtered.json"):
        storage.write_bytes(name, b"{}\n")
    storage.write_bytes("bench/held_out.jsonl", b"{}\n")
    part = {"name": "part", "catalogue": "helpsteer3", "path": storage.join("copies/helpsteer3/preference")}
    copies = {"sources": [{"name": "helpsteer3"}, part], "copies": storage.join("copies")}
    train = storage.join("copies/helpsteer3/preference/train.jsonl.gz")
    return IngestConfig(data=storage.join("data")), IngestConfig.model_validate(copies), {"helpsteer3": train, "part": train}


@pytest.mark.parametrize("kind", FLAKY)
def test_where_sources_and_benchmarks_lie_does_not_depend_on_failing_calls(storage: Storage, proxy: FaultProxy, kind: Fault) -> None:
    data, copies, wanted = place_sources(storage)
    proxy.reset(first_of_each(kind))
    found = {source.name: source.path for source in resolve_sources(data)}
    assert found == {name: storage.join(f"data/{name}") for name in ("seed-a.jsonl", "unverified/b.jsonl")}
    assert {source.name: list_source_files(source) for source in resolve_sources(copies)} == {name: (file,) for name, file in wanted.items()}
    assert find_benchmark("rm_bench", storage.join("bench")).files == (storage.join("bench/rm_bench/chat_filtered.json"),)
    assert find_benchmark("held_out", storage.join("bench")).files == (storage.join("bench/held_out.jsonl"),), "and no other ending is taken unseen"
    assert proxy.faults[kind] > 10


@pytest.mark.parametrize("kind", FLAKY)
def test_an_outage_is_never_taken_for_a_missing_source(storage: Storage, proxy: FaultProxy, kind: Fault) -> None:
    data, copies, _ = place_sources(storage)
    proxy.reset(lambda _: kind)
    for look in (
        lambda: resolve_sources(data),
        lambda: resolve_sources(copies),
        lambda: is_file(storage.join("data/seed-a.jsonl")),
        lambda: is_folder(storage.join("data")),
        lambda: file_size(storage.join("data/seed-a.jsonl")),
        lambda: find_benchmark("rm_bench", storage.join("bench")),
        lambda: find_benchmark("held_out", storage.join("bench")),
    ):
        with pytest.raises((StorageError, InputError), match=r"failed 10 times in \d+ s, last with"):
            look()
    proxy.reset()
    assert is_file(storage.join("data/seed-a.jsonl"))
    assert not is_file(storage.join("data"))
    assert is_folder(storage.join("data/"))
    assert not is_folder(storage.join("dat"))
    assert file_size(storage.join("data/seed-a.jsonl")) == 3


def test_a_model_folder_is_fetched_once_per_content(storage: Storage, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.write_bytes("models/m/config.json", b"{}")
    storage.write_bytes("models/m/model.safetensors", LARGE)
    proxy.reset(first_of_each("cut"))
    folder = Path(model_folder(storage.join("models/m")))
    assert (folder / "model.safetensors").read_bytes() == LARGE
    proxy.reset()
    assert model_folder(storage.join("models/m")) == str(folder)
    assert [call.kind for call in proxy.calls if "list-type" not in call.query] == []
    storage.write_bytes("models/m/config.json", b"{ }")
    assert (Path(model_folder(storage.join("models/m"))) / "config.json").read_bytes() == b"{ }"
    with pytest.raises(InputError, match=r"no config\.json"):
        model_folder(storage.join("models"))


def test_a_storage_that_ignores_conditions_is_no_workspace(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    probe_workspace(storage)
    assert storage.list_files("") == []
    call: Callable[..., object] = s3_requests.S3Requests.call_s3

    def without_conditions(self: object, method: str, **keywords: object) -> object:
        keywords.pop("IfNoneMatch", None)
        return call(self, method, **keywords)

    monkeypatch.setattr(s3_requests.S3Requests, "call_s3", without_conditions)
    with pytest.raises(InputError, match="ignores conditional writes"):
        probe_workspace(storage)
