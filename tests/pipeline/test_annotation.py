"""From a pool to gold through the annotation job: Stage 1 waits and says for what, people judge over HTTP, and a rerun goes on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from jobs import annotate
from synpref_ray.config import load_config
from synpref_ray.errors import ConfigError, InputError, SynprefError, WaitingError
from synpref_ray.human.accounts import Accounts
from synpref_ray.human.assignments import AnnotationQueue
from synpref_ray.human.consensus import ConsensusConfig
from synpref_ray.human.database import Assignment, Database, Item, Refused, Role
from synpref_ray.human.protocol import ProtocolConfig
from synpref_ray.human.results import Results
from synpref_ray.human.serving import ServeConfig
from synpref_ray.human.web import Site, create_app
from synpref_ray.llm.guidelines import guideline_for
from synpref_ray.pipeline import verification
from synpref_ray.pipeline.annotation import AnnotateConfig
from synpref_ray.pipeline.gathering import gather_pool
from synpref_ray.pipeline.ingest_sources import IngestConfig
from synpref_ray.pipeline.job import EXIT_WAITING, JobConfig, run_verb
from synpref_ray.pipeline.retrieval import pieces_of
from synpref_ray.pipeline.steps import StepResult, run_step
from synpref_ray.pipeline.verification import AnnotatorConfig, queue_path, verify_pool
from synpref_ray.reporting.run import Run
from synpref_ray.rules.gold import GoldConfig
from synpref_ray.schema import ATTRIBUTES_SCHEMA
from synpref_ray.tables.pools import Pool, commit_pool, write_pool_shard
from synpref_ray.tables.sidecars import Sidecar
from synpref_ray.tables.storage import Storage
from tests.builders import make_pairs
from tests.human.live import REPOSITORY
from tests.human.site import QUICK_HASHER, SECRET, judge, log_in, take


@pytest.fixture
def seed(tmp_path: Path) -> tuple[Pool, Sidecar]:
    storage = Storage(str(tmp_path / "ws"))
    pairs = make_pairs(8)
    pool = commit_pool(storage, "seed", "seed", [write_pool_shard(storage, "seed", 0, pairs)], {})
    attributes = Sidecar(pool, "attributes", "a" * 32)
    values = {"task_category": "math", "objectivity": "objective", "controversiality": "low"}
    rows = [{"pair_id": pair_id, **values} for pair_id in pairs["pair_id"].to_pylist()]
    attributes.write(0, ATTRIBUTES_SCHEMA.empty_table().from_pylist(rows, schema=ATTRIBUTES_SCHEMA))
    storage.write_json(f"{attributes.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": attributes.fingerprint})
    return pool, attributes


def job(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = annotate.main(list(argv))
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.strip().splitlines()[-1].startswith("run: ")
    return said.out


def browser(config: AnnotateConfig, name: str) -> TestClient:
    """Sign a person in to an app over the job's own database."""
    database = config.open_database()
    accounts = Accounts(database, config.serve.login, QUICK_HASHER)
    accounts.save_user(name, Role.ANNOTATOR, SECRET)
    queue, results = AnnotationQueue(database, ProtocolConfig()), Results(database, ConsensusConfig())
    client = TestClient(create_app(Site(database, accounts, queue, results, ProtocolConfig(), guideline_for)), follow_redirects=False)
    assert log_in(client, name, SECRET).status_code == 303
    return client


def test_a_round_waits_for_people_and_goes_on_with_what_they_said(seed: tuple[Pool, Sidecar], capsys: pytest.CaptureFixture[str]) -> None:
    pool, attributes = seed
    workspace = pool.storage.url
    run = Run(pool.storage, "stage1", IngestConfig())
    config, loose = AnnotatorConfig(kind="queue"), AnnotatorConfig(kind="queue", wait=False)

    def verify(annotator: AnnotatorConfig) -> list[object]:
        human = verify_pool(run, "verify", pool, attributes, 0, annotator, GoldConfig()).sidecars[0][0]
        return [human.read_all()[name].to_pylist() for name in ("human_verdict", "drop_reason", "annotator")]

    with pytest.raises(WaitingError, match=r"annotate\.py queue .*pool=seed attributes=aaaaaaaa"):
        verify(loose)
    said = job(capsys, "queue", f"workspace={workspace}", "queue.repeat_share=0")
    assert "seed" in said
    assert len(said.splitlines()) == 4
    for annotator in (config, loose):
        with pytest.raises(WaitingError, match=r"4 of 4 queued pairs.*export"):
            verify(annotator)

    client = browser(AnnotateConfig(workspace=workspace), "ann")
    for choice in ("1", "undecidable"):
        judge(client, take(client), choice=choice)
    job(capsys, "export", f"workspace={workspace}")
    with pytest.raises(WaitingError, match="2 of 4 queued pairs"):
        verify(config)
    assert sum(verdict is not None for verdict in verify(loose)[0]) == 2  # type: ignore[attr-defined]
    for choice in ("2", "1"):
        judge(client, take(client), choice=choice)
    job(capsys, "export", f"workspace={workspace}")
    verdicts, reasons, people = verify(config)
    assert sorted(map(str, reasons)) == ["None"] * 3 + ["not_selected"] * 4 + ["undecidable"]  # type: ignore[call-overload]
    assert {verdict for verdict in verdicts} <= {"chosen", "rejected", "abstain", None}  # type: ignore[attr-defined]
    assert {person for person in people} == {"ann", None}  # type: ignore[attr-defined]
    assert pq.read_table(Path(workspace) / "annotation" / "attributes.parquet").num_rows == 4
    assert json.loads((Path(workspace) / "annotation" / "agreement.json").read_text())["all"]["num_votes"] == 4
    assert "settled" in job(capsys, "status", f"workspace={workspace}")


def test_a_queue_made_again_forgets_nobody_and_a_disputed_pair_is_undecidable(seed: tuple[Pool, Sidecar], capsys: pytest.CaptureFixture[str]) -> None:
    pool, attributes = seed
    workspace = f"workspace={pool.storage.url}"
    job(capsys, "queue", workspace, "queue.repeat_share=1")
    first = pool.storage.read_table(queue_path("seed"))
    clients = [browser(AnnotateConfig(workspace=pool.storage.url), name) for name in ("ann", "bob")]
    said = [judge(client, take(client), choice=choice).status_code for client, choice in zip(clients, ("undecidable", "1"), strict=True)]
    assert said == [303, 303]
    job(capsys, "queue", workspace, "queue.max_pairs=1", "queue.seed=5")
    again = pool.storage.read_table(queue_path("seed"))
    assert set(first["pair_id"].to_pylist()) <= set(again["pair_id"].to_pylist())
    assert [row for row in again.to_pylist() if row["pair_id"] in first["pair_id"].to_pylist()] == first.to_pylist()
    job(capsys, "export", workspace)
    run = Run(pool.storage, "stage1", IngestConfig())
    with pytest.raises(WaitingError, match="have no verdict"):
        verify_pool(run, "verify", pool, attributes, 0, AnnotatorConfig(kind="queue"), GoldConfig())
    result = verify_pool(run, "verify", pool, attributes, 0, AnnotatorConfig(kind="queue", wait=False), GoldConfig())
    human = result.sidecars[0][0]
    rows = [(row["human_verdict"], row["drop_reason"]) for row in human.read_all().to_pylist()]
    assert rows.count(("abstain", "undecidable")) == 1
    assert rows.count((None, "not_selected")) == 7
    assert result.rows_computed == 8
    path = pool.storage.join("annotation/verdicts.parquet")
    exported = pq.read_table(path)
    names = pa.array(["eve, mallory"] * exported.num_rows)
    for kind, computed in (("queue", 0), ("file", 8)):  # who said it is no part of the queue's fingerprint
        config = AnnotatorConfig(kind=kind, wait=False, path=path)
        verify_pool(run, "verify", pool, attributes, 0, config, GoldConfig())
        pq.write_table(exported.set_column(exported.column_names.index("annotator"), "annotator", names), path)
        assert verify_pool(run, "verify", pool, attributes, 0, config, GoldConfig()).rows_computed == computed
        pq.write_table(exported, path)


def test_a_run_that_died_before_the_database_is_made_good_and_pairs_ask_for_enough_people(
    seed: tuple[Pool, Sidecar], capsys: pytest.CaptureFixture[str]
) -> None:
    pool, _ = seed
    workspace = f"workspace={pool.storage.url}"
    job(capsys, "queue", workspace, "queue.repeat_share=0")
    asked = pool.storage.read_table(queue_path("seed"))["pair_id"].to_pylist()
    for file in (Path(pool.storage.url) / "annotation").glob("annotations.db*"):
        file.unlink()
    job(capsys, "queue", workspace, "queue.repeat_share=0", "queue.max_pairs=1", "consensus.min_verdicts=2")
    database = AnnotateConfig(workspace=pool.storage.url).open_database()
    with database.read() as session:
        rows = [tuple(row) for row in session.execute(select(Item.pair_id, Item.required))]
    database.close()
    assert sorted(rows) == sorted((pair_id, 2) for pair_id in asked)


def test_verdicts_are_read_once_whatever_is_exported_meanwhile(seed: tuple[Pool, Sidecar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, attributes = seed
    first, second = pool.read(0)["pair_id"].to_pylist()[:2]
    path = tmp_path / "verdicts.jsonl"

    def write(verdict: str) -> None:
        rows = ({"pair_id": name, "verdict": verdict, "annotator": "ann"} for name in (first, second))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def exported_meanwhile(*args: Any) -> StepResult:
        write("rejected")
        return run_step(*args)

    write("chosen")
    monkeypatch.setattr(verification, "run_step", exported_meanwhile)
    run = Run(pool.storage, "stage1", IngestConfig())
    human = verify_pool(run, "verify", pool, attributes, 0, AnnotatorConfig(path=str(path)), GoldConfig()).sidecars[0][0]
    assert human.read_all()["human_verdict"].drop_null().to_pylist() == ["chosen", "chosen"]


@pytest.mark.parametrize("folder", ["..", "../x", "a/..", "/tmp/x", "a//b", "", ".hidden"])
def test_an_export_stays_in_the_workspace(folder: str) -> None:
    with pytest.raises(ConfigError, match="export_folder"):
        load_config(AnnotateConfig, None, [f"export_folder={folder}"])
    assert load_config(AnnotateConfig, None, ["export_folder=annotation/round.1"]).export_folder == "annotation/round.1"


@pytest.mark.parametrize("line", ['{"pair_id": "a", "chosen": "\\ud800"}', '{"pair_id": "\\udfff"}', '{"pair_id": 1}', "[]", "{"])
def test_a_note_that_no_page_can_show_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    (tmp_path / "notes.jsonl").write_text('{"pair_id": "b", "chosen": "fine"}\n' + line + "\n")
    assert annotate.main(["queue", f"workspace={tmp_path}", f"notes={tmp_path / 'notes.jsonl'}", "--dry-run"]) == 2
    assert "notes.jsonl, row 2: expected" in capsys.readouterr().err


def test_waiting_has_an_exit_code_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(config: JobConfig, run: Run) -> str:
        raise WaitingError("do this first")

    assert run_verb("small", ["go", f"workspace={tmp_path}"], JobConfig, {"go": body}) == EXIT_WAITING == 3
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "small waits: do this first"
    assert said.out.splitlines()[-1].startswith("run: ")
    assert not said.err


def test_an_account_is_made_and_its_secret_is_only_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = job(capsys, "user", f"workspace={tmp_path}", "user.name=ann", "user.role=admin")
    secret = said.split("once): ")[1].splitlines()[0]
    database = AnnotateConfig(workspace=str(tmp_path)).open_database()
    accounts = Accounts(database, ServeConfig().login)
    account = accounts.find(accounts.log_in("ann", secret, "here"))
    assert account is not None
    assert account.role is Role.ADMIN
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "annotation").glob("annotations.db*")} == {0o600}
    database.close()
    assert not any(secret.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    (tmp_path / "secret").write_text("a secret from a file\n")
    assert "secret" not in job(capsys, "user", f"workspace={tmp_path}", "user.name=bob", f"user.secret_file={tmp_path / 'secret'}")
    for bad in (["user"], ["user", "user.name=a b"], ["user", "user.name=x", "user.role=root"], [], ["fly"]):
        assert annotate.main([*bad, f"workspace={tmp_path}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_accounts_are_made_together_kept_in_their_role_and_closed_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = f"workspace={tmp_path}"
    said = job(capsys, "user", workspace, "user.name=ann, bob,007")
    secrets = dict(zip(("ann", "bob", "007"), re.findall(r"once\): (\S+)", said), strict=True))
    assert len(set(secrets.values())) == 3
    job(capsys, "user", workspace, "user.name=root", "user.role=admin")
    said = job(capsys, "user", workspace, "user.name=root")  # the secret was lost: another one, and the role stays
    assert "admin root may sign in; earlier sessions have ended" in said
    said = job(capsys, "user", workspace, "user.name=bob", "user.active=false")
    assert "annotator bob is closed" in said
    assert "secret" not in said
    for wrong in (
        ["user.name=eve,bob", "user.active=false"],  # eve is not there
        ["user.name=eve,a b"],
        ["user.name=eve,"],
        ["user.name=ann,eve", f"user.secret_file={tmp_path / 'secret'}"],
        ["user.name=eve", "user.role=root"],
    ):
        assert annotate.main(["user", workspace, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    database = AnnotateConfig(workspace=str(tmp_path)).open_database()
    accounts = Accounts(database, ServeConfig().login)
    roles = {name: accounts.role_of(name) for name in ("ann", "007", "root", "eve")}
    assert roles == {"ann": Role.ANNOTATOR, "007": Role.ANNOTATOR, "root": Role.ADMIN, "eve": None}
    for name in ("ann", "007"):
        assert accounts.log_in(name, secrets[name], "here")
    with pytest.raises(Refused):
        accounts.log_in("bob", secrets["bob"], "here")
    database.close()


@pytest.mark.parametrize("verb", ["status", "export", "serve", "to_label_studio", "from_label_studio"])
def test_a_workspace_without_a_queue_is_said_and_stays_without(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    (tmp_path / "export.json").write_text("[]")
    assert annotate.main([verb, f"workspace={tmp_path}", f"label_studio={tmp_path / 'export.json'}"]) == 2
    said = capsys.readouterr().err
    assert "annotate.py queue" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "annotation").exists()


def test_a_pool_that_stage_1_has_not_tagged_or_tagged_twice_is_said(seed: tuple[Pool, Sidecar], capsys: pytest.CaptureFixture[str]) -> None:
    pool, _ = seed
    workspace = f"workspace={pool.storage.url}"
    assert annotate.main(["queue", workspace, "attributes=12345678"]) == 2  # digits alone are a fingerprint too
    assert "with the fingerprint 12345678" in (said := capsys.readouterr().err)
    assert "jobs/stage1.py" in said
    other = Sidecar(pool, "attributes", "b" * 32)
    pool.storage.write_json(f"{other.folder}/manifest.json", {"pool_digest": pool.digest, "fingerprint": other.fingerprint})
    assert annotate.main(["queue", workspace]) == 2
    assert "there: aaaaaaaa, bbbbbbbb" in capsys.readouterr().err
    pair = pool.read_all(["pair_id"])["pair_id"].to_pylist()
    notes = Path(pool.storage.url) / "notes.jsonl"
    notes.write_text("".join(json.dumps({"pair_id": pair_id, "chosen": "correct"}) + "\n" for pair_id in [*pair, "elsewhere"]))
    assert job(capsys, "queue", workspace, "attributes=aaaaaaaa", f"notes={notes}").splitlines()[2].split() == ["seed", "4", "4", ANY, "4"]


def test_pairs_that_errors_retrieved_come_before_the_rest(seed: tuple[Pool, Sidecar], capsys: pytest.CaptureFixture[str]) -> None:
    pool, attributes = seed
    storage, workspace = pool.storage, f"workspace={pool.storage.url}"
    some = set(pool.read_all(["pair_id"])["pair_id"].to_pylist()[4:])
    selected = gather_pool(storage, "round-01-selected", pieces_of(pool, some), inputs={})
    tags = Sidecar(selected, "attributes", "c" * 32)
    rows = [row for row in attributes.read_all(ATTRIBUTES_SCHEMA.names).to_pylist() if row["pair_id"] in some]
    tags.write(0, pa.Table.from_pylist(rows, schema=ATTRIBUTES_SCHEMA))
    storage.write_json(f"{tags.folder}/manifest.json", {"pool_digest": selected.digest, "fingerprint": tags.fingerprint})
    job(capsys, "queue", workspace, "queue.repeat_share=0")
    seed_only = set(storage.read_table(queue_path("seed"))["pair_id"].to_pylist())
    job(capsys, "queue", workspace, f"pool={selected.name}", "queue.repeat_share=0", "queue.max_fraction=0.9")
    retrieved = set(storage.read_table(queue_path(selected.name))["pair_id"].to_pylist()) - seed_only
    assert retrieved
    client = browser(AnnotateConfig(workspace=pool.storage.url), "ann")
    database = AnnotateConfig(workspace=pool.storage.url).open_database()
    given = []
    for _ in range(len(retrieved) + 1):
        judge(client, take(client))
        with database.read() as session:
            given = list(session.scalars(select(Item.pair_id).join(Assignment, Assignment.item_id == Item.id).order_by(Assignment.id)))
    database.close()
    assert set(given[: len(retrieved)]) == retrieved
    assert given[len(retrieved)] in seed_only


def test_the_job_loads_no_model_code() -> None:
    """The server runs for weeks: torch and its compilers would cost it seconds at the start and half a gigabyte."""
    look = "import sys, jobs.annotate; print([name for name in ('torch', 'triton', 'transformers', 'vllm', 'sklearn') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, env=environment, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_a_network_is_not_served_in_plain_text_by_accident(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plain text"):
        load_config(AnnotateConfig, None, [f"serve.host={json.dumps(host)}"])
    plain = load_config(AnnotateConfig, None, [f"serve.host={json.dumps(host)}", "serve.allow_plain_http=true"])
    proxied = load_config(AnnotateConfig, None, [f"serve.host={json.dumps(host)}", "serve.behind_tls_proxy=true"])
    assert (plain.serve.secure, proxied.serve.secure) == (False, True)
    load_config(AnnotateConfig, None, [f"serve.host={json.dumps(host)}", "serve.tls_certificate=c.pem", "serve.tls_key=k.pem"])
    with pytest.raises(ConfigError, match="both files"):
        load_config(AnnotateConfig, None, ["serve.tls_key=k.pem"])
    assert annotate.main(["serve", f"workspace={tmp_path}", "serve.tls_certificate=c.pem", "serve.tls_key=k.pem", "--dry-run"]) == 2


def test_tls_files_that_cannot_be_used_are_one_line_before_anything_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.pem"
    file.write_text("no certificate\n")
    assert annotate.main(["serve", f"workspace={tmp_path}", f"serve.tls_certificate={file}", f"serve.tls_key={file}", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "expected PEM files" in said
    assert annotate.main(["serve", f"workspace={tmp_path}", "serve.host=0.0.0.0"]) == 2
    assert capsys.readouterr().err.startswith("annotate: bad settings: serve: serve.host=0.0.0.0 opens the app to a network in plain text: give")


def test_a_database_password_is_in_no_run_folder(tmp_path: Path) -> None:
    code = annotate.main(["status", f"workspace={tmp_path}", "database=postgresql+psycopg://me:hidden-word@127.0.0.1:1/none"])
    assert code == 2
    assert not any(b"hidden-word" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    "url",
    [
        *("mysql://x", "nonsense", "sqlite://", "sqlite:///:memory:", "sqlite:///a.db?timeout=x", "sqlite://host/a.db", "sqlite+aiosqlite:///a.db"),
        *(
            "postgresql+psycopg://me:hidden-word@h:port/x",
            "postgresql+psycopg2://me:hidden-word@h/x",
            "postgresql://me:hidden-word@127.0.0.1:1/x?bogus=1",
        ),
    ],
)
def test_other_databases_are_refused_in_one_line(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        Database(url)
    assert annotate.main(["status", f"workspace={tmp_path}", f"database={json.dumps(url)}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "hidden-word" not in said


def test_a_workspace_on_object_storage_needs_a_database_elsewhere(tmp_path: Path) -> None:
    for make in (True, False):
        with pytest.raises(InputError, match="name a database"):
            AnnotateConfig(workspace="s3://bucket/run").open_database(make=make)
    config = load_config(AnnotateConfig, None, ["workspace=s3://bucket/run", f"database=sqlite:///{tmp_path / 'a.db'}"])
    config.open_database().close()
    assert (tmp_path / "a.db").exists()


def test_a_file_that_is_no_database_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_text("no database at all, " * 100)
    with pytest.raises(ConfigError, match="not a database"):
        Database(f"sqlite:///{tmp_path / 'a.db'}")
    with pytest.raises(SynprefError):
        Database(f"sqlite:///{tmp_path / 'none' / 'a.db'}")
