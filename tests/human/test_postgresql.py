"""The queue on a real PostgreSQL: twenty threads lease and answer at once, and the log only grows."""

import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete, select, text, update
from sqlalchemy.exc import DBAPIError

from synpref_ray.errors import SynprefError
from synpref_ray.human.accounts import Accounts, LoginConfig
from synpref_ray.human.assignments import AnnotationQueue
from synpref_ray.human.consensus import ConsensusConfig
from synpref_ray.human.database import Assignment, Database, Item, Refused, Role, User, VerdictRow
from synpref_ray.human.protocol import Given, ProtocolConfig
from synpref_ray.human.results import Results, verdict_table
from tests.human.site import QUICK_HASHER, SECRET, Clock, make_item

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/none"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "initdb").is_file(), reason="no PostgreSQL server here (Debian: apt-get install postgresql)"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Start a server of its own, reached through a socket in its own folder alone; return its URL."""
    folder = tempfile.mkdtemp(prefix="synpref-pg-")
    owner = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name  # it refuses to run as root
    if os.geteuid() == 0:
        shutil.chown(folder, owner)
    data, log = f"{folder}/data", f"{folder}/log"

    def run(*command: str) -> None:
        user = owner if os.geteuid() == 0 else None
        subprocess.run([f"{BIN}/{command[0]}", *command[1:]], check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    run("initdb", "-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C")
    run("pg_ctl", "-D", data, "-l", log, "-w", "-o", f"-k {folder} -c listen_addresses='' -c max_connections=200", "start")
    yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def test_twenty_threads_never_hold_one_place_twice(server: str) -> None:
    database = Database(server, Clock())
    accounts = Accounts(database, LoginConfig(), QUICK_HASHER)
    people = []
    for number in range(20):
        accounts.save_user(f"person-{number}", Role.ANNOTATOR, SECRET)
    with database.read() as session:
        people = list(session.scalars(select(User.id)))
    AnnotationQueue(database, ProtocolConfig()).add(
        [make_item(number, required=2 if number % 5 == 0 else 1, chosen=f"nul \x00 {number}") for number in range(60)]
    )
    ready, errors = threading.Barrier(20), []

    def work(user_id: int) -> None:
        ready.wait(timeout=60)
        try:
            own = Database(server, Clock())
            queue = AnnotationQueue(own, ProtocolConfig())
            held = queue.lease_next(user_id)
            while held is not None:
                queue.open(user_id, held)
                held = queue.answer(user_id, held, 0, Given(choice="1", rationale="\u05e9")) or queue.lease_next(user_id)
            own.close()
        except SynprefError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(user_id,)) for user_id in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors
    with database.read() as session:
        places = Counter(session.scalars(select(Assignment.item_id)))
        said = session.scalars(select(VerdictRow.assignment_id)).all()
        items = list(session.scalars(select(Item)))
    assert len(said) == len(set(said)) == sum(places.values()) == 72
    assert all(places[item.id] == item.required and item.complete for item in items)

    found = Results(database, ConsensusConfig()).snapshot()
    assert verdict_table(found).num_rows == 60
    for statement in (delete(VerdictRow), update(VerdictRow).values(verdict="chosen"), text("TRUNCATE verdicts")):
        with pytest.raises(DBAPIError, match="verdicts only grows"), database.write() as session:
            session.execute(statement)
    with database.read() as session:
        assert len(session.scalars(select(VerdictRow.id)).all()) == 72
    with pytest.raises(Refused, match="name or the secret"):
        accounts.log_in("person\x00", SECRET, "here")
    database.close()


def test_a_reader_sees_one_state_of_the_data(server: str) -> None:
    database = Database(server, Clock())
    queue = AnnotationQueue(database, ProtocolConfig())
    queue.add([make_item(1000)])
    with database.read() as session:
        before = len(session.scalars(select(Item.id)).all())
        queue.add([make_item(1001), make_item(1002)])
        assert len(session.scalars(select(Item.id)).all()) == before
    with database.read() as session:
        assert len(session.scalars(select(Item.id)).all()) == before + 2
    database.close()


def test_a_lease_that_somebody_else_took_meanwhile_is_refused(server: str) -> None:
    clock = Clock()
    database = Database(server, clock)
    queue = AnnotationQueue(database, ProtocolConfig())
    accounts = Accounts(database, LoginConfig(), QUICK_HASHER)
    for name in ("ann", "bob"):
        accounts.save_user(name, Role.ANNOTATOR, SECRET)
    with database.read() as session:
        ann, bob = session.scalars(select(User.id).where(User.name.in_(["ann", "bob"])).order_by(User.name)).all()
    queue.add([make_item(2000, rank=-5)])
    held = queue.lease_next(ann)
    assert held is not None
    clock.now += 3600
    assert queue.renew(ann, held) == clock.now + 1800
    clock.now += 3600
    taken = queue.lease_next(bob)
    assert taken is not None
    for late in (lambda: queue.answer(ann, held, 0, Given(choice="1")), lambda: queue.skip(ann, held, "x"), lambda: queue.renew(ann, held)):
        with pytest.raises(Refused, match="somebody else has it"):
            late()
    queue.answer(bob, taken, 0, Given(choice="1"))
    assert queue.undo(bob, taken, 1) == taken
    with pytest.raises(Refused, match="no verdict of yours"):
        queue.undo(bob, taken, 1)
    database.close()
