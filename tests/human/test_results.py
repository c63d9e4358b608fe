"""Agreement and consensus by hand, adjudication, and an export that reads back as verdicts."""

from itertools import combinations
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from synpref_ray.human.agreement import Vote, agreement_by_category, measure_agreement
from synpref_ray.human.consensus import ConsensusConfig, Standing, dawid_skene, settle_pairs
from synpref_ray.human.database import Role
from synpref_ray.human.protocol import is_swapped
from synpref_ray.human.results import attribute_table, verdict_table, vote_table
from synpref_ray.human.verdict_file import import_verdicts
from synpref_ray.schema import Verdict
from tests.human.site import SECRET, TAGS, SmallSite, better, hidden, judge, make_item, take, token_of, undo_form


def votes(text: str, category: str = "math") -> list[Vote]:
    """Read votes: a word a pair, a letter an annotator (c, r, u; a dot: none)."""
    names = {"c": "chosen", "r": "rejected", "u": "undecidable"}
    return [
        Vote(f"p{pair}", f"a{person}", names[letter], category)
        for pair, word in enumerate(text.split())
        for person, letter in enumerate(word)
        if letter != "."
    ]


def test_agreement_of_two_people_by_hand() -> None:
    found = measure_agreement(votes("cc cc cr rr"))
    # Observed 3/4. Cohen: a0 says c, c, c, r; a1 c, c, r, r: chance 3/4 x 2/4 + 1/4 x 2/4 = 1/2, so (3/4 - 1/2) / (1 - 1/2) = 1/2.
    # Krippendorff: 8 values, 5 c and 3 r: expected disagreement 2 x 5 x 3 / (8 x 7) = 30/56, observed 1/4: 1 - (1/4) / (30/56) = 8/15.
    assert (found.num_votes, found.num_shared_pairs, found.percent_agreement) == (8, 4, 0.75)
    assert found.cohen_kappa == pytest.approx(0.5)
    assert found.krippendorff_alpha == pytest.approx(8 / 15)


def test_a_figure_that_is_not_defined_is_none() -> None:
    alone, same = measure_agreement(votes("c. .r")), measure_agreement(votes("cc cc"))
    assert (alone.num_shared_pairs, alone.percent_agreement, alone.krippendorff_alpha, alone.cohen_kappa) == (0, None, None, None)
    assert (same.percent_agreement, same.krippendorff_alpha, same.cohen_kappa) == (1.0, None, None)
    assert measure_agreement([]).num_votes == 0


def test_kappa_of_a_large_team_is_not_dragged_down_by_duos_that_share_one_pair() -> None:
    """Forty people, eight shared pairs each, nearly all duos with one pair: 19 of 20 agree, each label comes half of the time."""
    random = Random(0)
    duos = random.sample(list(combinations(range(40), 2)), 160)
    given = []
    for pair, duo in enumerate(duos):
        said = ["chosen", "rejected"] if pair % 2 else ["rejected", "chosen"]
        for place, person in enumerate(duo):
            given.append(Vote(f"p{pair}", f"a{person}", said[pair % 20 == 0 and place == 1], "math"))
    found = measure_agreement(given)
    assert found.percent_agreement == pytest.approx(0.95)
    assert found.cohen_kappa is not None
    assert found.krippendorff_alpha == pytest.approx(0.9, abs=0.01)
    assert 0.85 < found.cohen_kappa < 0.91  # chance is taken from eight verdicts of each, the pair's own among them


def test_agreement_by_category() -> None:
    mixed = [*votes("cc rr"), *(Vote(f"x{vote.pair_id}", vote.annotator, vote.verdict, "coding") for vote in votes("cr rc"))]
    found = agreement_by_category(mixed)
    assert list(found) == ["coding", "math"]
    assert (found["math"].cohen_kappa, found["coding"].cohen_kappa) == (pytest.approx(1.0), pytest.approx(-1.0))


def test_the_majority_settles_a_tie_is_a_dispute_and_an_admin_stands_above() -> None:
    given = votes("ccr cr. cu. uu. c.. ccc")
    required = {"p0": 3, "p1": 2, "p2": 2, "p3": 2, "p4": 2, "p5": 3, "p6": 1}
    found = settle_pairs(required, given, {"p5": ("undecidable", "root")}, ConsensusConfig())
    said = {pair: (outcome.standing, outcome.verdict) for pair, outcome in found.items()}
    assert said == {
        "p0": (Standing.SETTLED, "chosen"),
        "p1": (Standing.DISPUTED, None),
        "p2": (Standing.DISPUTED, None),
        "p3": (Standing.SETTLED, "undecidable"),
        "p4": (Standing.WAITING, None),
        "p5": (Standing.ADJUDICATED, "undecidable"),
        "p6": (Standing.WAITING, None),
    }
    assert found["p0"].confidence == pytest.approx(2 / 3)
    more = settle_pairs(required, given, {}, ConsensusConfig(min_verdicts=3))
    assert more["p3"].standing is Standing.WAITING


def test_dawid_skene_believes_those_who_are_usually_right() -> None:
    careful = "crcrcrcrcrcrcrcrcrcr"
    lines = [word * 2 + ("c" if place % 3 else word) for place, word in enumerate(careful)]  # the third says c whatever it is
    given = votes(" ".join([*lines, "rrc"]))
    by_pair, quality = dawid_skene(given, 100)
    assert quality["a0"] > 0.95 > 0.8 > quality["a2"]
    assert by_pair["p20"]["rejected"] > 0.9
    shuffled, _ = dawid_skene(given[::-1], 100)
    assert shuffled == by_pair
    found = settle_pairs({"p20": 3}, [vote for vote in given if vote.pair_id == "p20"], {}, ConsensusConfig(rule="dawid_skene", threshold=0.6))
    assert found["p20"].verdict == "rejected"
    assert dawid_skene([], 10) == ({}, {})


def test_who_judges_most_alone_wins_no_dispute_by_it() -> None:
    alone = [Vote(f"p{pair}", "a", "chosen" if pair % 2 else "rejected", "math") for pair in range(100)]
    both = [Vote(f"q{pair}", name, said, "math") for pair in range(5) for name, said in (("a", "chosen"), ("b", "rejected"))]
    required = {f"p{pair}": 1 for pair in range(100)} | {f"q{pair}": 2 for pair in range(5)}
    found = settle_pairs(required, [*alone, *both], {}, ConsensusConfig(rule="dawid_skene"))
    assert {found[f"q{pair}"].standing for pair in range(5)} == {Standing.DISPUTED}
    assert [found[vote.pair_id].verdict for vote in alone] == [vote.verdict for vote in alone]


def test_a_later_round_leaves_the_outcomes_of_an_earlier_one() -> None:
    early = [Vote(f"p{pair}", person, "chosen" if person == "a" else "rejected", "math") for pair in range(2) for person in "ab"]
    early += [Vote(f"q{pair}", person, verdict, "math") for pair, verdict in enumerate(["chosen", "rejected"] * 4) for person in "ac"]
    late = [
        Vote(f"r{pair}", person, "chosen" if (person == "b") == (pair % 2 == 0) else "rejected", "math") for pair in range(20) for person in "abc"
    ]
    pools = {vote.pair_id: "late" if vote.pair_id[0] == "r" else "early" for vote in early + late}
    config, required = ConsensusConfig(rule="dawid_skene"), dict.fromkeys(pools, 2)
    before = settle_pairs({pair: 2 for pair in required if pair[0] != "r"}, early, {}, config, pools=pools)
    after = settle_pairs(required, early + late, {}, config, pools=pools)
    assert {pair: after[pair] for pair in before} == before
    together = settle_pairs(required, early + late, {}, config)
    assert {pair: together[pair] for pair in before} != before  # one model for all would have changed its mind


def test_what_people_say_in_the_browser_reads_back_as_verdicts(tmp_path: Path) -> None:
    """Three people, four pairs: agreement, a dispute that an admin settles, doubt, and edited attributes."""
    site = SmallSite(tmp_path)
    site.queue.add([make_item(number, required=2 if number < 2 else 1) for number in range(4)])
    ann, bob, root = site.signed_in("ann"), site.signed_in("bob"), site.signed_in("root", Role.ADMIN)
    other = {"1": "2", "2": "1"}
    for client, answers in ((ann, ["right", "right", "undecidable", "right"]), (bob, ["right", "wrong"])):
        for answer in answers:
            path = take(client)
            choice = {"right": (right := better(client, path)), "wrong": other[right]}.get(answer, answer)
            edited = {"task_category": "reasoning", "desired_attributes": ""} if answer == "undecidable" else {}
            assert judge(client, path, choice=choice, **edited).status_code == 303
    assert take(ann) == take(bob) == "/"
    page = root.get("/admin").text
    assert 'id="count-disputed">1<' in page
    assert "/admin/items/2" in page
    before = verdict_table(site.results.snapshot())
    assert before["pair_id"].to_pylist() == [f"{number:032x}" for number in range(4)]
    assert before["verdict"].to_pylist() == ["chosen", "unsettled", "undecidable", "chosen"]
    dispute = root.get("/admin/items/2").text
    choice = "1" if dispute.index("good reply") < dispute.index("bad reply") else "2"
    assert root.post("/admin/items/2/adjudicate", data={"csrf": token_of(root), "choice": choice, "rationale": "sums"}).status_code == 303

    file = tmp_path / "verdicts.parquet"
    file.write_bytes(root.get("/admin/export/verdicts.parquet").content)
    found = import_verdicts(str(file)).answers
    chosen, abstain = Verdict.CHOSEN, Verdict.ABSTAIN
    assert {int(pair, 16): answer.verdict for pair, answer in found.items()} == {0: chosen, 1: chosen, 2: abstain, 3: chosen}
    assert found[f"{0:032x}"].annotator == "ann, bob"
    assert found[f"{1:032x}"].annotator == "ann, bob, root"

    attributes = {row["pair_id"]: row for row in attribute_table(site.results.snapshot()).to_pylist()}
    edited = attributes[f"{2:032x}"]
    assert (edited["task_category"], edited["desired_attributes"], edited["changed"]) == ("reasoning", None, ["task_category", "desired_attributes"])
    assert attributes[f"{0:032x}"]["changed"] == []
    log = vote_table(site.database)
    assert (log.num_rows, sum(log["counts"].to_pylist())) == (6, 6)
    for name in ("votes", "attributes"):
        (tmp_path / name).write_bytes(root.get(f"/admin/export/{name}.parquet").content)
        assert pq.read_table(tmp_path / name).num_rows in (4, 6)


def test_lines_as_a_browser_sends_them_are_no_edit(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0, attributes={**TAGS, "desired_attributes": " exact\nshort\n", "annotation_guideline": "a\r\nb"})])
    ann = site.signed_in("ann")
    texts = {"desired_attributes": " exact\r\nshort\r\n", "annotation_guideline": "a\r\nb", "rationale": "two\r\nlines"}
    assert judge(ann, take(ann), **texts).status_code == 303
    (row,) = attribute_table(site.results.snapshot()).to_pylist()
    assert (row["changed"], row["desired_attributes"]) == ([], " exact\nshort\n")
    assert vote_table(site.database)["rationale"].to_pylist() == ["two\nlines"]


def test_a_pair_that_everybody_skipped_is_for_the_admin(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0)])
    ann, root = site.signed_in("ann"), site.signed_in("root", Role.ADMIN)
    assert site.results.snapshot().to_adjudicate == []
    ann.post(f"{take(ann)}/skip", data={"csrf": token_of(ann), "reason": "needs an expert"})
    assert site.results.snapshot().to_adjudicate == [f"{0:032x}"]
    assert "nobody is left" in root.get("/admin").text
    root.post("/admin/items/1/adjudicate", data={"csrf": token_of(root), "choice": "undecidable"})
    found = site.results.snapshot()
    assert (found.to_adjudicate, found.standings["adjudicated"]) == ([], 1)


def test_skips_and_every_word_of_an_admin_are_exported(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0)])
    ann, root = site.signed_in("ann"), site.signed_in("root", Role.ADMIN)
    ann.post(f"{take(ann)}/skip", data={"csrf": token_of(ann), "reason": "needs an expert"})
    for words, choice in enumerate(("undecidable", "1")):
        form = {"csrf": token_of(root), "choice": choice, "words": words, "rationale": f"word {words}"}
        assert root.post("/admin/items/1/adjudicate", data=form).status_code == 303
    (tmp_path / "skips").write_bytes(root.get("/admin/export/skips.parquet").content)
    (tmp_path / "words").write_bytes(root.get("/admin/export/adjudications.parquet").content)
    skips, words_said = (pq.read_table(tmp_path / name).to_pylist() for name in ("skips", "words"))
    assert [(row["pair_id"], row["annotator"], row["reason"]) for row in skips] == [(f"{0:032x}", "ann", "needs an expert")]
    said = [(row["admin"], row["counts"], row["rationale"]) for row in words_said]
    assert said == [("root", False, "word 0"), ("root", True, "word 1")]


def test_a_changed_role_is_seen_at_once(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.user("ann")
    assert [worker.role for worker in site.results.snapshot().workers] == ["annotator"]
    site.accounts.save_user("ann", Role.ADMIN, SECRET)
    assert [worker.role for worker in site.results.snapshot().workers] == ["admin"]


def test_a_word_stands_after_an_undo_and_a_stale_one_is_refused(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0)])
    ann, bob, root = site.signed_in("ann"), site.signed_in("bob"), site.signed_in("root", Role.ADMIN)
    judge(ann, take(ann))
    words = hidden(root.get("/admin/items/1").text, "words")
    form = {"csrf": token_of(root), "choice": "1", "words": words}
    answers = [root.post("/admin/items/1/adjudicate", data=form).status_code for _ in range(2)]
    assert answers == [303, 409]
    assert hidden(root.get("/admin/items/1").text, "words") == "1"
    ann.post("/undo", data=undo_form(ann))
    assert take(bob) == "/"  # an admin has settled it: nobody is asked any more
    assert site.results.snapshot().standings == {"adjudicated": 1}


def test_an_admin_s_order_of_replies_needs_the_salt(tmp_path: Path) -> None:
    sites = [SmallSite(folder) for folder in (tmp_path / "a", tmp_path / "b") if folder.mkdir() is None]
    orders = [[is_swapped(site.database.salt, f"{number:032x}", "root") for number in range(200)] for site in sites]
    assert orders[0] != orders[1]
    assert all(50 < sum(order) < 150 for order in orders)
    assert sites[0].database.salt == SmallSite(tmp_path / "a").database.salt
