"""A site of a few pairs, and clients that sign in and judge as a browser would: forms are read from the pages, nothing is known beforehand."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argon2 import PasswordHasher
from fastapi.testclient import TestClient

from synpref_ray.human.accounts import Accounts, LoginConfig
from synpref_ray.human.assignments import AnnotationQueue, NewItem
from synpref_ray.human.consensus import ConsensusConfig
from synpref_ray.human.database import Database, Role
from synpref_ray.human.protocol import ProtocolConfig
from synpref_ray.human.results import Results
from synpref_ray.human.web import Site, create_app
from synpref_ray.llm.guidelines import guideline_for

SECRET = "correct horse battery"
QUICK_HASHER = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
TAGS = {
    "task_category": "math",
    "objectivity": "objective",
    "controversiality": "low",
    "desired_attributes": "exact",
    "annotation_guideline": "Check the sum.",
}


@dataclass
class Clock:
    """Time that passes only when it is told to; seconds."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def make_item(number: int, **changes: Any) -> NewItem:
    """Return a pair whose replies say which side they are."""
    values = {
        "pair_id": f"{number:032x}",
        "pool": "seed",
        "prompt": [{"role": "user", "content": f"Question {number}"}],
        "chosen": f"good reply {number}",
        "rejected": f"bad reply {number}",
        "rank": number,
        "selected_by": "priority",
        "attributes": TAGS,
    }
    return NewItem(**{**values, **changes})


@dataclass
class SmallSite:
    """Everything of one app over a database file."""

    folder: Path
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    consensus: ConsensusConfig = field(default_factory=ConsensusConfig)
    login: LoginConfig = field(default_factory=LoginConfig)
    clock: Clock = field(default_factory=Clock)
    secure: bool = False

    def __post_init__(self) -> None:
        self.database = Database(f"sqlite:///{self.folder / 'annotations.db'}", self.clock)
        self.accounts = Accounts(self.database, self.login, QUICK_HASHER)
        self.queue = AnnotationQueue(self.database, self.protocol)
        self.results = Results(self.database, self.consensus)
        parts = {"database": self.database, "accounts": self.accounts, "queue": self.queue, "results": self.results, "protocol": self.protocol}
        self.app = create_app(Site(guideline=guideline_for, secure=self.secure, **parts))

    def user(self, name: str, role: Role = Role.ANNOTATOR) -> int:
        """Add an account and return its id."""
        self.accounts.save_user(name, role, SECRET)
        found = self.accounts.find(self.accounts.log_in(name, SECRET, "setup"))
        assert found is not None
        return found.user_id

    def client(self) -> TestClient:
        """Return a browser that nobody has signed in with."""
        scheme = "https" if self.secure else "http"
        return TestClient(self.app, base_url=f"{scheme}://testserver", follow_redirects=False)

    def signed_in(self, name: str, role: Role = Role.ANNOTATOR) -> TestClient:
        """Add an account, and return a browser that is signed in with it."""
        self.accounts.save_user(name, role, SECRET)
        client = self.client()
        answer = log_in(client, name, SECRET)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        return client


def log_in(client: TestClient, name: str, secret: str) -> Any:
    """Fill in the login form."""
    token = hidden(client.get("/login").text, "csrf")
    return client.post("/login", data={"csrf": token, "name": name, "secret": secret})


def hidden(page: str, name: str) -> str:
    """Return the value of a page's hidden field."""
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page
    return found[1]


def token_of(client: TestClient) -> str:
    """Return the token that this session's forms carry."""
    return hidden(client.get("/").text, "csrf")


def take(client: TestClient) -> str:
    """Ask for the next pair; return its path, `/` if none is left."""
    answer = client.post("/next", data={"csrf": token_of(client)})
    assert answer.status_code == 303, answer.text
    return str(answer.headers["location"])


def form_of(client: TestClient, path: str, **changes: Any) -> dict[str, Any]:
    """Return the verdict form of a pair's page, filled in: reply 1 is better, attributes as the page has them."""
    page = client.get(path)
    assert page.status_code == 200, page.text
    return {"csrf": hidden(page.text, "csrf"), "revision": hidden(page.text, "revision"), "choice": "1", "strength": "2", **TAGS, **changes}


def judge(client: TestClient, path: str, **changes: Any) -> Any:
    """Send a verdict on a pair; return the answer."""
    return client.post(f"{path}/verdict", data=form_of(client, path, **changes))


def undo_form(client: TestClient) -> dict[str, str]:
    """Return the undo form of the first page."""
    page = client.get("/").text
    form = page[page.index('action="/undo"') :]
    return {name: hidden(form, name) for name in ("csrf", "assignment_id", "revision")}


def better(client: TestClient, path: str) -> str:
    """Return which reply on the page is the pair's chosen one, as a person who knows would."""
    page = client.get(path).text
    return "1" if page.index("good reply") < page.index("bad reply") else "2"
