"""What the app must refuse: wrong secrets, forged and replayed forms, other people's pairs, expired leases, higher roles, odd paths and texts."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError

from synpref_ray.human.accounts import LoginConfig, LoginRefused
from synpref_ray.human.database import AuditEvent, Role, User, VerdictRow
from tests.human.site import SECRET, TAGS, SmallSite, form_of, hidden, judge, log_in, make_item, take, token_of, undo_form


@pytest.fixture
def site(tmp_path: Path) -> SmallSite:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(number) for number in range(6)])
    return site


def num_verdicts(site: SmallSite) -> int:
    with site.database.read() as session:
        return session.scalar(select(func.count()).select_from(VerdictRow)) or 0


def test_pages_carry_strict_headers_and_cookies_are_closed_to_scripts(tmp_path: Path) -> None:
    plain, secure = SmallSite(tmp_path), SmallSite(tmp_path / ".", secure=True)
    page = plain.client().get("/login")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert (page.headers["x-content-type-options"], page.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|<style|\sstyle=", page.text)
    client = plain.signed_in("ann")
    cookie = log_in(plain.client(), "ann", SECRET).headers["set-cookie"]
    assert {"httponly", "samesite=strict", "path=/"} <= {part.strip().lower() for part in cookie.split(";")}
    assert "secure" not in cookie.lower()
    assert client.cookies["session"] not in (plain.folder / "annotations.db").read_bytes().decode("latin-1")
    cookie = log_in(secure.client(), "ann", SECRET).headers["set-cookie"]
    assert cookie.startswith("__Host-session=")
    assert "max-age" in secure.client().get("/login").headers["strict-transport-security"]
    assert "strict-transport-security" not in page.headers
    assert "secure" in cookie.lower()


def test_nothing_is_shown_to_strangers(site: SmallSite) -> None:
    for path in ("/", "/assignments/1", "/admin", "/admin/items/1", "/admin/export/verdicts.parquet", "/guideline"):
        answer = site.client().get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    for path in ("/next", "/undo", "/logout", "/assignments/1/skip", "/assignments/1/renew", "/admin/items/1/adjudicate"):
        assert site.client().post(path, data={"csrf": "x", "choice": "1"}).status_code == 401


def test_a_wrong_secret_and_an_unknown_name_are_refused_alike(site: SmallSite) -> None:
    site.user("ann")
    answers = [log_in(site.client(), name, "wrong secret here") for name in ("ann", "nobody", "ann' OR '1'='1", "ann\x00", "ann ")]
    assert {answer.status_code for answer in answers} == {401}
    assert all("The name or the secret is not right." in answer.text for answer in answers)
    assert all("session" not in answer.cookies for answer in answers)


def test_a_secret_that_is_changed_while_it_is_looked_at_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = SmallSite(tmp_path)
    site.user("ann")
    verify = site.accounts._verify

    def changed_meanwhile(*args: str) -> bool:
        found = verify(*args)
        site.accounts.save_user("ann", Role.ANNOTATOR, "another secret")
        return found

    monkeypatch.setattr(site.accounts, "_verify", changed_meanwhile)
    with pytest.raises(LoginRefused):
        site.accounts.log_in("ann", SECRET, "here")


def test_guesses_are_throttled_by_name_and_by_address(tmp_path: Path) -> None:
    site = SmallSite(tmp_path, login=LoginConfig(max_failures_per_user=3, max_failures_per_address=5))
    site.user("ann")
    site.user("bob")
    assert [log_in(site.client(), "ann", "wrong").status_code for _ in range(4)] == [401, 401, 401, 429]
    assert log_in(site.client(), "ann", SECRET).status_code == 429  # unread
    assert [log_in(site.client(), "bob", "wrong").status_code for _ in range(3)] == [401, 401, 429]  # the address has had its five
    site.clock.now += 15 * 60 + 1
    assert log_in(site.client(), "ann", SECRET).status_code == 303


def test_a_right_secret_takes_the_count_back(tmp_path: Path) -> None:
    site = SmallSite(tmp_path, login=LoginConfig(max_failures_per_user=2, max_failures_per_address=100))
    site.user("ann")
    for _ in range(5):
        assert log_in(site.client(), "ann", "wrong").status_code == 401
        assert log_in(site.client(), "ann", SECRET).status_code == 303


def test_sessions_end(site: SmallSite) -> None:
    client, other = site.signed_in("ann"), site.client()
    stolen = client.cookies["session"]
    assert client.post("/logout", data={"csrf": token_of(client)}).headers["location"] == "/login"
    other.cookies.set("session", stolen)
    assert other.get("/").headers["location"] == "/login"
    client = site.signed_in("bob")
    site.clock.now += 12 * 3600
    assert client.get("/").headers["location"] == "/login"
    client = site.signed_in("eve")
    site.accounts.save_user("eve", Role.ANNOTATOR, SECRET, active=False)
    assert client.get("/").headers["location"] == "/login"
    assert log_in(site.client(), "eve", SECRET).status_code == 401


@pytest.mark.parametrize("forged", ["", "x" * 43, None])
def test_a_form_without_its_session_s_token_is_refused(site: SmallSite, forged: str | None) -> None:
    client, other = site.signed_in("ann"), site.signed_in("bob")
    csrf = token_of(other) if forged is None else forged  # None: the token of another session
    path = take(client)
    for where in ("/next", "/undo", "/logout", f"{path}/renew"):
        assert client.post(where, data={"csrf": csrf}).status_code == 403
    assert client.post(f"{path}/skip", data={"csrf": csrf, "reason": "x"}).status_code == 403
    assert judge(client, path, csrf=csrf).status_code == 403
    assert num_verdicts(site) == 0


def test_a_login_form_of_another_browser_is_refused(site: SmallSite) -> None:
    site.user("ann")
    token = hidden(site.client().get("/login").text, "csrf")
    assert site.client().post("/login", data={"csrf": token, "name": "ann", "secret": SECRET}).status_code == 403


def test_a_form_of_another_site_is_refused(site: SmallSite) -> None:
    client = site.signed_in("ann")
    for origin in ("cross-site", "same-site"):
        assert client.post("/next", data={"csrf": token_of(client)}, headers={"Sec-Fetch-Site": origin}).status_code == 403
    assert client.post("/next", data={"csrf": token_of(client)}, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 303


def test_a_form_that_was_sent_before_is_refused_also_after_an_undo(site: SmallSite) -> None:
    client = site.signed_in("ann")
    path = take(client)
    form = form_of(client, path)
    assert client.post(f"{path}/verdict", data=form).status_code == 303
    assert client.post(f"{path}/verdict", data=form).status_code == 409
    assert client.post("/undo", data=undo_form(client)).headers["location"] == path
    assert client.post(f"{path}/verdict", data=form).status_code == 409
    assert num_verdicts(site) == 2  # the verdict, and that it was taken back
    assert judge(client, path).status_code == 303


def test_an_undo_that_is_sent_again_takes_back_nothing_more(site: SmallSite) -> None:
    client = site.signed_in("ann")
    for _ in range(3):
        judge(client, take(client))
    form = undo_form(client)
    answers = [client.post("/undo", data=form).status_code for _ in range(3)]
    assert answers == [303, 409, 409]
    assert client.post("/undo", data={"csrf": form["csrf"]}).status_code == 409
    assert num_verdicts(site) == 4
    path = f"/assignments/{form['assignment_id']}"
    judge(client, path)
    assert client.post("/undo", data=form).status_code == 409  # the same assignment, said anew


def test_another_person_s_pair_is_not_there(site: SmallSite) -> None:
    ann, bob = site.signed_in("ann"), site.signed_in("bob")
    path = take(ann)
    take(bob)
    form = {**form_of(ann, path), "csrf": token_of(bob), "reason": "x"}
    unknown = bob.get("/assignments/999")
    for answer in (bob.get(path), bob.post(f"{path}/verdict", data={k: v for k, v in form.items() if k != "reason"})):
        assert answer.status_code == 404
        assert "There is no such pair in your hands." in answer.text
        assert "Question" not in answer.text
    for verb in ("skip", "renew"):
        data = {"csrf": form["csrf"], **({"reason": "x"} if verb == "skip" else {})}
        assert bob.post(f"{path}/{verb}", data=data).status_code == 404
    assert unknown.status_code == 404
    assert num_verdicts(site) == 0


def test_an_expired_lease_is_refused_and_its_pair_goes_to_the_next(site: SmallSite) -> None:
    ann, bob = site.signed_in("ann"), site.signed_in("bob")
    path = take(ann)
    form = form_of(ann, path)
    site.clock.now += 29 * 60
    assert ann.post(f"{path}/renew", data={"csrf": form["csrf"]}).status_code == 200
    site.clock.now += 29 * 60
    assert ann.get(path).status_code == 200
    site.clock.now += 60
    bob_path = take(bob)
    assert "Question 0" in bob.get(bob_path).text
    assert ann.get(path).status_code == 409
    for verb, data in (("verdict", form), ("skip", {"csrf": form["csrf"], "reason": "x"}), ("renew", {"csrf": form["csrf"]})):
        assert ann.post(f"{path}/{verb}", data=data).status_code == 409
    assert num_verdicts(site) == 0
    assert judge(bob, bob_path).status_code == 303


def test_an_expired_lease_whose_place_is_free_goes_on(site: SmallSite) -> None:
    ann = site.signed_in("ann")
    path = take(ann)
    for _ in range(2):
        site.clock.now += 31 * 60
        assert ann.get(path).status_code == 200
    form = form_of(ann, path, rationale="typed for an hour")
    site.clock.now += 3600
    assert ann.post(f"{path}/renew", data={"csrf": form["csrf"]}).status_code == 200
    site.clock.now += 3600
    assert ann.post(f"{path}/verdict", data=form).status_code == 303
    assert num_verdicts(site) == 1


@pytest.mark.parametrize("name", ["rationale", "code_run", "desired_attributes", "annotation_guideline", "search_link"])
def test_a_text_that_is_too_long_is_shown_again(site: SmallSite, name: str) -> None:
    client = site.signed_in("ann")
    path, typed = take(client), "https://x.org/" + "y" * 10_000
    answer = judge(client, path, **{name: typed})
    assert answer.status_code == 422
    assert "characters; at most" in answer.text
    assert answer.text.count(typed) == 1
    assert num_verdicts(site) == 0


def test_an_annotator_cannot_become_an_admin(site: SmallSite) -> None:
    client = site.signed_in("ann")
    path = take(client)
    csrf = token_of(client)
    for where in ("/admin", "/admin/items/1", "/admin/export/verdicts.parquet", "/admin/export/votes.parquet"):
        assert client.get(where).status_code == 403
    assert client.post("/admin/items/1/adjudicate", data={"csrf": csrf, "choice": "1"}).status_code == 403
    for extra in ({"role": "admin"}, {"user_id": "1"}, {"swapped": "1"}):
        assert judge(client, path, **extra).status_code == 422
        assert client.post("/next", data={"csrf": csrf, **extra}).status_code == 422
    client.cookies.set("role", "admin")
    assert client.get("/admin").status_code == 403
    with site.database.read() as session:
        assert session.scalars(select(User.role)).all() == ["annotator"]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/....//app.py",
        "/static//etc/passwd",
        "/static/%00",
        "/admin/export/..%2f..%2fannotations.db",
        "/admin/export/users.parquet",
        "/admin/items/1%20OR%201=1",
        "/assignments/1;DROP TABLE items",
        "/assignments/-1",
        "/assignments/99999999999999999999",
    ],
)
def test_odd_paths_find_nothing(site: SmallSite, path: str) -> None:
    client = site.signed_in("root", Role.ADMIN)
    answer = client.get(path)
    assert answer.status_code in (404, 422), answer.text
    assert "class Shield" not in answer.text
    assert "root:" not in answer.text


@pytest.mark.parametrize("hostile", ["'; DROP TABLE verdicts; --", '" OR 1=1 --', "%s %d {0} ${x} {{ 7*7 }}", "\u202e\u2066evil", "a" * 10_000])
def test_texts_are_stored_as_they_are(site: SmallSite, hostile: str) -> None:
    client, path = site.signed_in("ann"), ""
    path = take(client)
    assert judge(client, path, rationale=hostile, desired_attributes=hostile).status_code == 303
    with site.database.read() as session:
        row = session.scalars(select(VerdictRow)).one()
    assert (row.rationale, row.attributes["desired_attributes"]) == (hostile, hostile)
    admin = site.signed_in("root", Role.ADMIN)
    assert "{{ 7*7 }}" not in hostile or "{{ 7*7 }}" in admin.get("/admin/items/1").text


def test_a_pair_whose_page_cannot_be_shown_can_be_skipped_from_the_first_page(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0, notes={"chosen": "half \ud800"}), make_item(1)])
    client = site.signed_in("ann")
    assert "/skip" not in client.get("/").text
    path = take(client)
    with pytest.raises(UnicodeEncodeError):  # a server answers 500
        client.get(path)
    page = client.get("/").text
    found = re.search(r'action="(/assignments/\d+/skip)"', page)
    assert found, page
    assert found[1] == f"{path}/skip"
    answer = client.post(found[1], data={"csrf": hidden(page, "csrf"), "reason": "broken text"})
    assert "Question 1" in client.get(answer.headers["location"]).text


def test_another_category_gets_nobody_round_the_evidence(tmp_path: Path) -> None:
    site = SmallSite(tmp_path)
    site.queue.add([make_item(0, attributes={**TAGS, "task_category": "coding_and_debugging"})])
    client = site.signed_in("ann")
    path = take(client)
    for category in ("math", "", "coding_and_debugging"):
        answer = judge(client, path, task_category=category, rationale="typed at length")
        assert answer.status_code == 422
        assert "Code must be run" in answer.text
        assert "typed at length" in answer.text
    assert judge(client, path, task_category="math", code_run="print(1 + 1)  # gave 2").status_code == 303


def test_what_is_no_form_is_refused(site: SmallSite) -> None:
    client = site.signed_in("ann")
    path = take(client)
    for change in ({"choice": "3"}, {"choice": ""}, {"strength": "9"}, {"revision": "x"}, {"task_category": "nonsense"}, {"focus_seconds": "nan"}):
        assert judge(client, path, **change).status_code == 422, change
    assert judge(client, path, rationale="a\x00b").status_code == 422
    assert judge(client, path, rationale="a" * 10_001).status_code == 422
    assert client.post("/next", content=b"x" * 600_000).status_code == 413
    assert client.post("/next", content=(b"x" * 50_000 for _ in range(12))).status_code == 413
    assert client.post("/next", content=quote("csrf=\ud800", errors="surrogatepass").encode()).status_code in (403, 422)
    assert num_verdicts(site) == 0


def test_the_log_of_verdicts_only_grows_and_the_audit_log_names_every_change(site: SmallSite) -> None:
    client = site.signed_in("ann")
    path = take(client)
    judge(client, path)
    client.post("/undo", data=undo_form(client))
    judge(client, path, choice="undecidable")
    client.post(f"{take(client)}/skip", data={"csrf": token_of(client), "reason": "needs an expert"})
    with site.database.read() as session:
        said = [(row.revision, row.verdict) for row in session.scalars(select(VerdictRow).order_by(VerdictRow.id))]
        actions = list(session.scalars(select(AuditEvent.action).order_by(AuditEvent.id)))
    assert [revision for revision, _ in said] == [1, 2, 3]
    assert [verdict for _, verdict in said][1:] == ["withdrawn", "undecidable"]
    assert actions == ["save_user", "login", "verdict", "undo", "verdict", "skip"]
    for statement in (
        "UPDATE verdicts SET verdict = 'chosen'",
        "DELETE FROM verdicts",
        "DELETE FROM audit_log",
        "UPDATE adjudications SET verdict = ''",
    ):
        if "adjudications" in statement:
            site.results.adjudicate(1, 1, "chosen", "", 0)
        with pytest.raises(IntegrityError, match="only grows"), site.database.write() as session:
            session.execute(text(statement))
