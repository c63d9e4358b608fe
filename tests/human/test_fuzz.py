"""A fuzzer that reads the app's own OpenAPI description sends it whatever that allows, and worse: no answer is a 5xx."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case
from schemathesis.schemas import BaseSchema

from synpref_ray.human.database import Role
from tests.human.live import LiveServer
from tests.human.site import SmallSite, make_item

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("fuzz")
    (workspace / "annotation").mkdir()
    return workspace


@pytest.fixture(scope="module")
def site(folder: Path) -> SmallSite:
    site = SmallSite(folder / "annotation")
    site.clock.now = 4_000_000_000.0  # sessions that the server's own clock finds open
    site.queue.add([make_item(number, required=3) for number in range(30)])
    return site


@pytest.fixture(scope="module")
def server(folder: Path, site: SmallSite) -> Iterator[LiveServer]:
    with LiveServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def described(site: SmallSite) -> BaseSchema:
    description = site.app.openapi()
    description["paths"].pop("/logout")  # the session is used for all of the test
    return schemathesis.openapi.from_dict(description)


@pytest.fixture(scope="module")
def session(site: SmallSite) -> tuple[str, str]:
    """Return an admin's cookie and token."""
    cookie = signed_in(site)
    account = site.accounts.find(cookie)
    assert account is not None
    return cookie, account.csrf_token


def signed_in(site: SmallSite) -> str:
    site.user("root", Role.ADMIN)
    return site.accounts.log_in("root", "correct horse battery", "here")


def test_no_request_breaks_the_app(described: BaseSchema, server: LiveServer, session: tuple[str, str]) -> None:
    cookie, token = session
    operations = [found.ok() for found in described.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/login", "/next", "/undo", "/assignments/{assignment_id}/verdict", "/admin"}
    for operation in operations:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(), goes_deep=st.booleans())
        def send(case: Case, goes_deep: bool) -> None:
            if goes_deep:  # half of the requests name what is there and carry the right token
                if isinstance(case.body, dict):
                    case.body["csrf"] = token
                case.path_parameters.update({name: 1 for name in ("assignment_id", "item_id") if name in case.path_parameters})
            answer = case.call(base_url=server.url, cookies={"session": cookie} if goes_deep else {}, allow_redirects=False)
            assert answer.status_code < 500, (case.method, case.formatted_path, case.body, answer.text[:300])

        send()
