"""What every page needs: storage, protocol, templates, and who is asking."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from synpref_ray.human.accounts import Account, Accounts, same_token
from synpref_ray.human.assignments import AnnotationQueue
from synpref_ray.human.database import Database, Refused, Role
from synpref_ray.human.protocol import ProtocolConfig, is_web_link
from synpref_ray.human.rendering import render_text
from synpref_ray.human.results import Results
from synpref_ray.schema import Controversiality, Objectivity, TaskCategory

FOLDER = Path(__file__).parent
CHOICES = {"task_category": TaskCategory, "objectivity": Objectivity, "controversiality": Controversiality}


class LoginNeeded(Refused):
    """Nobody is signed in."""

    status = 401


class Forbidden(Refused):
    """The account may not do this, or the form is not one that this session was given."""

    status = 403


def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,  # the files of a running server stay as they are
    )
    found.filters["markdown"] = render_text
    found.tests["web_link"] = is_web_link
    return found


@dataclass(frozen=True)
class Site:
    """One running app. `guideline` gives the text for a category, objectivity and controversiality; `secure`: it is served over TLS."""

    database: Database
    accounts: Accounts
    queue: AnnotationQueue
    results: Results
    protocol: ProtocolConfig
    guideline: Callable[[str, str, str], str]
    secure: bool = False
    templates: Environment = field(default_factory=_templates)

    @property
    def session_cookie(self) -> str:
        """The name of the session's cookie; browsers take the prefix only with Secure and the whole site as path."""
        return "__Host-session" if self.secure else "session"

    @property
    def login_cookie(self) -> str:
        """The name of the cookie that ties a login form to the browser that asked for it."""
        return "__Host-login" if self.secure else "login"

    async def account(self, request: Request) -> Account:
        """Return who is asking.

        Raises:
            LoginNeeded: nobody is signed in.
        """
        cookie = request.cookies.get(self.session_cookie)
        # A row of a local file is read sooner than a thread is found to read it, and no writer keeps a reader waiting there (WAL).
        remote = self.database.has_many_writers
        account = await run_in_threadpool(self.accounts.find, cookie) if remote else self.accounts.find(cookie)
        if account is None:
            raise LoginNeeded("Sign in first.")
        return account

    async def admin(self, request: Request) -> Account:
        """Return the admin who is asking; others are refused."""
        account = await self.account(request)
        if account.role is not Role.ADMIN:
            raise Forbidden("This page is for admins.")
        return account

    def page(self, template: str, account: Account | None, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page."""
        body = self.templates.get_template(template).render(account=account, choices=CHOICES, **values)
        return HTMLResponse(body, status_code=status)

    def set_cookie(self, response: HTMLResponse | RedirectResponse, name: str, value: str) -> None:
        """Set a cookie that scripts cannot read and other sites cannot send."""
        response.set_cookie(name, value, httponly=True, samesite="strict", secure=self.secure, path="/")

    def kind_of(self, attributes: Mapping[str, str | None]) -> str:
        """Return in a few words what kind of pair this is; attributes that are missing or unknown are left out."""
        found = []
        for name, enum in CHOICES.items():
            value = attributes.get(name)
            if value in {entry.value for entry in enum}:
                found.append(f"{value} controversy" if name == "controversiality" else str(value).replace("_", " "))
        return " · ".join(found)

    def guideline_of(self, attributes: Mapping[str, str | None]) -> str:
        """Return the guideline for a pair's attributes; what is missing or unknown counts as the widest value."""
        fallback = {"task_category": TaskCategory.OTHER, "objectivity": Objectivity.SUBJECTIVE, "controversiality": Controversiality.MEDIUM}
        values = {}
        for name, enum in CHOICES.items():
            known = {entry.value for entry in enum}
            value = attributes.get(name)
            values[name] = value if value in known else fallback[name].value
        return self.guideline(str(values["task_category"]), str(values["objectivity"]), str(values["controversiality"]))


def require_token(account: Account, csrf: str) -> None:
    """Refuse a form that this session was not given."""
    if not same_token(account.csrf_token, csrf):
        raise Forbidden("This form is not from your session: nothing was stored. Go back, reload the page and try again.")


def new_token() -> str:
    """Return a token that nobody can guess."""
    return secrets.token_urlsafe(32)
