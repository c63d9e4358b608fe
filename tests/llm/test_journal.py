"""What a killed shard keeps, and what is never sent twice."""

import contextlib
import dataclasses
import itertools

import pytest

from synpref_ray.llm.engine import EngineDied, Reply, Request
from synpref_ray.llm.journal import Journal, generate_once
from tests.llm.fakes import MemoryStorage, ScriptedEngine

FOLDER = "journal/00007"


def requests(*prompts: str) -> list[Request]:
    return [Request.of(prompt, prompt_version="v", max_new_tokens=4) for prompt in prompts]


def reply(key: str, text: str = "t") -> Reply:
    return Reply(key=key, text=text, finish_reason="stop", prompt_tokens=3, output_tokens=1, choice_logprobs=(-0.25, -1.5))


def test_replies_come_back_in_request_order_and_equal_requests_are_sent_once() -> None:
    engine = ScriptedEngine(lambda request: request.prompt.upper())
    replies = generate_once(requests("a", "b", "a", "c"), engine, None)
    assert [reply.text for reply in replies] == ["A", "B", "A", "C"]
    assert sorted(request.prompt for request in engine.sent) == ["a", "b", "c"]


def test_a_second_run_sends_nothing() -> None:
    storage = MemoryStorage()
    first = generate_once(requests("a", "b"), ScriptedEngine(lambda request: request.prompt), Journal(storage, FOLDER))
    engine = ScriptedEngine(lambda request: "never asked")
    journal = Journal(storage, FOLDER)
    assert generate_once(requests("a", "b"), engine, journal) == first
    assert engine.counts().requests_sent == 0
    assert journal.num_replies_found == 2


def test_what_is_sent_and_what_was_paid_for_are_counted_once_per_request() -> None:
    storage, engine = MemoryStorage(), ScriptedEngine(lambda request: request.prompt)
    first, other = Journal(storage, FOLDER), Journal(storage, "journal/00008")  # two shards share one engine
    generate_once(requests("a", "b", "a"), engine, first)
    generate_once(requests("a"), engine, other)
    resumed = Journal(storage, FOLDER)
    generate_once(requests("a", "b", "c", "c"), engine, resumed)
    assert [(j.num_requests_sent, j.num_replies_found) for j in (first, other, resumed)] == [(2, 0), (1, 0), (1, 2)]
    assert engine.counts().requests_sent == 4


def test_what_finished_before_the_engine_died_is_kept() -> None:
    storage = MemoryStorage()
    with pytest.raises(EngineDied, match="scripted death"):
        generate_once(requests("a", "b", "c", "d"), ScriptedEngine(lambda request: "old", dies_after=3), Journal(storage, FOLDER))
    engine = ScriptedEngine(lambda request: "new")
    replies = generate_once(requests("a", "b", "c", "d"), engine, Journal(storage, FOLDER))
    assert [reply.text for reply in replies] == ["new", "old", "old", "old"]  # the scripted engine answers the last request first
    assert [request.prompt for request in engine.sent] == ["a"]


def test_flushes_by_number_and_by_time() -> None:
    storage, now = MemoryStorage(), [0.0]
    journal = Journal(storage, FOLDER, flush_replies=3, flush_seconds=5.0, clock=lambda: now[0])
    journal.append(reply("k0"))
    journal.append(reply("k1"))
    assert storage.objects == {}
    journal.append(reply("k2"))
    assert len(storage.objects) == 1
    now[0] = 4.9
    journal.append(reply("k3"))
    assert len(storage.objects) == 1
    now[0] = 5.0
    journal.append(reply("k4"))
    assert len(storage.objects) == 2
    journal.flush()
    assert len(storage.objects) == 2  # nothing to write
    assert all(path.startswith(f"{FOLDER}/00000") and path.endswith(".jsonl") for path in storage.objects)
    again = Journal(storage, FOLDER)
    assert [again.find(f"k{number}") for number in range(5)] == [reply(f"k{number}") for number in range(5)]


def test_a_reply_is_written_when_it_is_old_though_no_other_one_comes() -> None:
    storage, now = MemoryStorage(), [0.0]
    journal = Journal(storage, FOLDER, flush_seconds=5.0, clock=lambda: now[0])
    journal.flush_if_old()
    journal.append(reply("k0"))
    now[0] = 4.9
    journal.flush_if_old()
    assert storage.objects == {}
    now[0] = 5.0
    journal.flush_if_old()
    assert len(storage.objects) == 1
    now[0] = 10.0
    journal.flush_if_old()
    assert len(storage.objects) == 1  # nothing to write


def test_while_the_engine_is_idle_old_replies_are_written() -> None:
    storage, written_when_asked = MemoryStorage(), []
    ticks = itertools.count(0.0, 3.0)  # whoever looks at the clock finds it 3 s later

    def answer(request: Request) -> str:
        written_when_asked.append(len(storage.objects))
        return "t"

    journal = Journal(storage, FOLDER, flush_replies=99, flush_seconds=5.0, clock=lambda: next(ticks))
    generate_once(requests("a", "b", "c"), ScriptedEngine(answer), journal)
    assert written_when_asked == [0, 1, 2]  # too young when it came, old enough when nothing else did


def test_what_could_not_be_written_is_kept_and_not_tried_at_every_reply() -> None:
    class Storage(MemoryStorage):
        is_full, num_tries = True, 0

        def write_bytes(self, path: str, data: bytes) -> None:
            self.num_tries += 1
            if self.is_full:
                raise OSError("no space left")
            super().write_bytes(path, data)

    storage = Storage()
    journal = Journal(storage, FOLDER, flush_replies=3, clock=lambda: 0.0)
    for number in range(8):
        with contextlib.suppress(OSError):
            journal.append(reply(f"k{number}"))
    assert storage.num_tries == 2
    storage.is_full = False
    journal.append(reply("k8"))
    again = Journal(storage, FOLDER)
    assert all(again.find(f"k{number}") is not None for number in range(9))


def test_the_totals_are_those_of_all_runs() -> None:
    storage = MemoryStorage()
    first = Journal(storage, FOLDER)
    first.append(dataclasses.replace(reply("k0"), cost=0.5))
    first.flush()
    second = Journal(storage, FOLDER)
    second.append(dataclasses.replace(reply("k1"), cost=0.25))
    second.append(dataclasses.replace(reply("k2"), cost=0.75, finish_reason="refused"))
    second.append(dataclasses.replace(reply("k3"), cost=0.25, finish_reason="too_long"))
    assert second.totals() == {"cost": 1.75, "prompt_tokens": 6.0, "output_tokens": 2.0}


def test_a_later_run_adds_objects_and_overwrites_none() -> None:
    storage = MemoryStorage()
    for key in ("k0", "k1"):
        journal = Journal(storage, FOLDER)
        journal.append(reply(key))
        journal.flush()
    assert sorted(path.rpartition("/")[2][:7] for path in storage.objects) == ["000000-", "000001-"]


def test_of_two_replies_to_one_request_the_first_written_counts() -> None:
    storage = MemoryStorage()
    journals = [Journal(storage, FOLDER), Journal(storage, FOLDER)]  # two workers on one shard
    for journal, text in zip(journals, ("one", "two"), strict=True):
        journal.append(reply("k0", text))
        journal.flush()
    assert len(storage.objects) == 2
    first = sorted(storage.objects)[0]
    found = Journal(storage, FOLDER).find("k0")
    assert found is not None
    assert f'"text": "{found.text}"'.encode() in storage.objects[first]


@pytest.mark.parametrize("damage", [b'{"key": "k9", "te', b"\xff\xfe", b"[]\n", b'{"key": "k9"}\n', b"null\n"])
def test_a_damaged_object_is_counted_and_costs_only_its_requests(damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    journal = Journal(storage, FOLDER)
    journal.append(reply("k0"))
    journal.flush()
    storage.objects[f"{FOLDER}/000001-0.jsonl"] = damage
    again = Journal(storage, FOLDER)
    assert again.find("k0") == reply("k0")
    assert again.find("k9") is None
    assert again.num_damaged_objects == 1
    assert "1 damaged objects ignored" in caplog.text


def test_other_shards_and_other_files_are_not_read() -> None:
    storage = MemoryStorage()
    other = Journal(storage, "journal/00008")
    other.append(reply("k0"))
    other.flush()
    storage.objects[f"{FOLDER}/notes.txt"] = b"not a journal"
    journal = Journal(storage, FOLDER)
    assert journal.find("k0") is None
    assert journal.num_damaged_objects == 0
