"""A hundred annotators over HTTP, and a server killed in the middle: no verdict that was acknowledged is lost, none is stored twice."""

import asyncio
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select

from synpref_ray.human.database import Assignment, Item, Role, State, VerdictRow
from tests.human.live import START_SECONDS, LiveServer
from tests.human.site import SECRET, TAGS, SmallSite, make_item

NUM_ANNOTATORS = 100
NUM_VERDICTS = int(os.environ.get("SYNPREF_LOAD_VERDICTS", "10000"))
THINK_SECONDS = 3.0  # mean; a person takes 10 s at the least (paper), so this is three times the load of a real team of a hundred
PATIENCE_SECONDS = START_SECONDS + 60  # a server may take that long to start again


@dataclass
class Load:
    """What the annotators saw: acknowledged verdicts by assignment, answers that were conflicts, and seconds of every answer."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    conflicts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    half: asyncio.Event = field(default_factory=asyncio.Event)


async def ask(client: httpx2.AsyncClient, load: Load, method: str, path: str, data: dict[str, str] | None = None) -> httpx2.Response:
    """Send a request, again and again while the server is away."""
    gives_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < gives_up_at:
        began = time.monotonic()
        try:
            answer = await client.request(method, path, data=data)
        except httpx2.TransportError:
            await asyncio.sleep(0.5)
            continue
        load.seconds.append(time.monotonic() - began)
        return answer
    raise AssertionError(f"the server did not come back for {method} {path}")


async def annotate(url: str, name: str, load: Load) -> None:
    """Judge pairs until none is left, as a browser would."""
    chance = random.Random(name)
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
        token = read((await ask(client, load, "GET", "/login")).text, "csrf")
        answer = await ask(client, load, "POST", "/login", {"csrf": token, "name": name, "secret": SECRET})
        assert answer.status_code == 303, answer.text
        csrf = read((await ask(client, load, "GET", "/")).text, "csrf")
        path = "/"
        while True:
            if path == "/":
                path = (await ask(client, load, "POST", "/next", {"csrf": csrf})).headers["location"]
                if path == "/":
                    return
            page = await ask(client, load, "GET", path)
            if page.status_code == 409:  # the verdict had arrived before the kill, its answer had not
                path = "/"
                continue
            await asyncio.sleep(chance.uniform(0, 2 * THINK_SECONDS))
            choice = chance.choice(["1", "2", "undecidable"])
            form = {"csrf": csrf, "revision": read(page.text, "revision"), "choice": choice, **TAGS}
            answer = await ask(client, load, "POST", f"{path}/verdict", form)
            if answer.status_code == 303:
                assert path not in load.acknowledged
                load.acknowledged[path] = choice
                path = answer.headers["location"]
            else:
                assert answer.status_code == 409, answer.text
                load.conflicts[path] += 1
                path = "/"
            if len(load.acknowledged) >= NUM_VERDICTS // 2:
                load.half.set()


def read(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page[:500]
    return found[1]


async def run(server: LiveServer) -> Load:
    load = Load()
    people = asyncio.gather(*(annotate(server.url, f"person-{number}", load) for number in range(NUM_ANNOTATORS)))
    half = asyncio.create_task(load.half.wait())
    await asyncio.wait([half, people], return_when=asyncio.FIRST_COMPLETED)
    if not load.half.is_set():  # somebody failed before: say with what, and do not wait for ever
        half.cancel()
        await people
        raise AssertionError("the annotators ended before half of the verdicts were there")
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    await people
    return load


@pytest.mark.slow
def test_a_hundred_annotators_and_a_kill_lose_and_double_nothing(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    (tmp_path / "annotation").mkdir()
    site = SmallSite(tmp_path / "annotation")
    for number in range(NUM_ANNOTATORS):
        site.accounts.save_user(f"person-{number}", Role.ANNOTATOR, SECRET)
    required, wanted = {}, 0
    while wanted < NUM_VERDICTS:  # every tenth pair is for two people
        required[len(required)] = min(2 if len(required) % 10 == 0 else 1, NUM_VERDICTS - wanted)
        wanted += required[len(required) - 1]
    site.queue.add([make_item(number, required=count) for number, count in required.items()])
    with LiveServer(tmp_path, "serve.login.max_failures_per_address=1000") as server:  # a hundred sign in at once, from one address
        load = asyncio.run(run(server))
    with site.database.read() as session:
        stored = {f"/assignments/{row.assignment_id}": row.verdict for row in session.scalars(select(VerdictRow))}
        assignments = list(session.scalars(select(Assignment)))
        items = {item.id: int(item.pair_id, 16) for item in session.scalars(select(Item))}
    swapped = {f"/assignments/{row.id}": row.swapped for row in assignments}
    for path, choice in load.acknowledged.items():
        better = {"1": "rejected" if swapped[path] else "chosen", "2": "chosen" if swapped[path] else "rejected"}.get(choice, choice)
        assert stored[path] == better
    lost_answers = len(stored) - len(load.acknowledged)
    assert 0 <= lost_answers <= NUM_ANNOTATORS  # at most one in flight per person when the server died
    assert set(load.conflicts) <= set(stored) - set(load.acknowledged)
    places = Counter(items[row.item_id] for row in assignments if row.state == State.DONE)
    assert places == required
    assert len(stored) == NUM_VERDICTS
    latencies = sorted(load.seconds)
    found = {
        "answers": len(latencies),
        "lost_answers": lost_answers,
        "p50": latencies[len(latencies) // 2],
        "p95": latencies[len(latencies) * 95 // 100],
    }
    record_property("load", json.dumps(found))
    print(f"{NUM_VERDICTS} verdicts of {NUM_ANNOTATORS} people: {found}")  # noqa: T201  # a measurement, not a condition
