"""Accounts, logins and sessions: Argon2id hashes, throttled guesses, and cookies of which only the digest is stored.

Our choice: after `max_failures_per_user` refused logins for a name, or `max_failures_per_address` from an address, within `window_minutes`, further
tries are refused unread until the window has passed. An unknown name costs as much time as a wrong secret.
"""

import hashlib
import hmac
import re
import secrets
import threading
from dataclasses import dataclass

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerifyMismatchError
from pydantic import Field
from sqlalchemy import String, bindparam, delete, func, or_, select

from synpref_ray.config import Settings
from synpref_ray.errors import ConfigError
from synpref_ray.human.database import Database, LoginFailure, LoginSession, Refused, Role, User, record

MIN_SECRET_CHARS = 12  # ours: NIST SP 800-63B asks for 8 at least, 15 where nothing else guards
MAX_SECRET_CHARS = 256
RESERVED_PREFIX = "ls-"
MAX_HASHES = 2  # ours: every hash takes 64 MiB
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class LoginConfig(Settings):
    """How long a login lasts, and how many guesses are read."""

    session_hours: float = Field(default=12.0, gt=0)  # ours: a working day
    window_minutes: float = Field(default=15.0, gt=0)  # ours
    max_failures_per_user: int = Field(default=5, ge=1)  # ours: people mistype, programs guess
    max_failures_per_address: int = Field(default=25, ge=1)  # ours: an office may share one


class LoginRefused(Refused):
    """The name or the secret is wrong: which of the two is not told."""

    status = 401


class LoginThrottled(Refused):
    """Too many refused logins."""

    status = 429


@dataclass(frozen=True)
class Account:
    """A signed-in person, and the token that their forms must carry."""

    user_id: int
    name: str
    role: Role
    csrf_token: str


class Accounts:
    """Reads and writes users and their sessions."""

    def __init__(self, database: Database, config: LoginConfig, hasher: PasswordHasher | None = None):
        self._db = database
        self._config = config
        self._hasher = hasher or PasswordHasher()  # the library's defaults follow RFC 9106
        self._slots = threading.BoundedSemaphore(MAX_HASHES)
        self._nobody = self._hasher.hash(secrets.token_hex())

    def save_user(self, name: str, role: Role, secret: str, *, active: bool = True) -> None:
        """Add an account, or change one: its sessions end.

        Raises:
            ConfigError: the name or the secret is not fit.
        """
        check_name(name)
        if not MIN_SECRET_CHARS <= len(secret) <= MAX_SECRET_CHARS:
            raise ConfigError(f"a secret has {MIN_SECRET_CHARS} to {MAX_SECRET_CHARS} characters, found {len(secret)}")
        hashed, now = self._hash(secret), self._db.clock()
        with self._db.write() as session:
            user = session.scalar(select(User).where(User.name == name))
            if user is None:
                user = User(name=name, created_at=now, role=role.value, secret_hash=hashed, active=active)
                session.add(user)
                session.flush()
            else:
                user.role, user.secret_hash, user.active = role.value, hashed, active
                session.execute(delete(LoginSession).where(LoginSession.user_id == user.id))
            session.execute(delete(LoginFailure).where(LoginFailure.key == f"user:{name}"))
            record(session, at=now, user_id=None, action="save_user", subject=name, role=role.value, active=active)

    def role_of(self, name: str) -> Role | None:
        """Return the role of an account, closed or not; None: there is no such account."""
        with self._db.read() as session:
            found = session.scalar(select(User.role).where(User.name == name))
        return None if found is None else Role(found)

    def log_in(self, name: str, secret: str, address: str) -> str:
        """Return the cookie of a new session.

        Raises:
            LoginRefused: the name or the secret is wrong, or the account is not active.
            LoginThrottled: too many were, of this name or from this address.
        """
        known = name if _NAME.fullmatch(name) else "?"  # no account can have such a name
        keys = {f"user:{known}": self._config.max_failures_per_user, f"address:{address}": self._config.max_failures_per_address}
        tried = self._count_try(keys)
        with self._db.read() as session:
            user = session.scalar(select(User).where(User.name == known))
        is_right = self._verify(user.secret_hash if user else self._nobody, secret[: MAX_SECRET_CHARS + 1])
        now = self._db.clock()
        if user is None or not is_right or not user.active:
            with self._db.write() as session:
                record(session, at=now, user_id=user.id if user else None, action="login_refused", subject=known, address=address)
            raise LoginRefused("The name or the secret is not right.")
        token = secrets.token_urlsafe(32)
        expires_at = now + 3600 * self._config.session_hours
        with self._db.write() as session:
            now_known = select(User.secret_hash).where(User.id == user.id, User.active).with_for_update()
            if session.scalar(now_known) != user.secret_hash:  # changed or closed while the secret was looked at
                raise LoginRefused("The name or the secret is not right.")
            session.execute(delete(LoginFailure).where(or_(LoginFailure.key == f"user:{known}", LoginFailure.id.in_(tried))))
            session.execute(delete(LoginSession).where(LoginSession.expires_at <= now))
            session.add(LoginSession(token_digest=_digest(token), user_id=user.id, csrf_token=secrets.token_urlsafe(32), expires_at=expires_at))
            record(session, at=now, user_id=user.id, action="login", subject=user.name, address=address)
        return token

    def find(self, token: str | None) -> Account | None:
        """Return whose session the cookie opens, with the role that the account has now; None: nobody's."""
        if not token:
            return None
        with self._db.read() as session:
            found = session.execute(_BY_DIGEST, {"digest": _digest(token)}).first()
        if found is None or not found.active or found.expires_at <= self._db.clock():
            return None
        return Account(found.id, found.name, Role(found.role), found.csrf_token)

    def log_out(self, token: str) -> None:
        """End a session."""
        with self._db.write() as session:
            session.execute(delete(LoginSession).where(LoginSession.token_digest == _digest(token)))

    def _count_try(self, limits: dict[str, int]) -> list[int]:
        """Count a try as refused before it is read, so that guesses in parallel are counted too; return the rows that a right one takes back."""
        now = self._db.clock()
        with self._db.write() as session:
            session.execute(delete(LoginFailure).where(LoginFailure.at <= now - 60 * self._config.window_minutes))
            for key, limit in limits.items():
                if (session.scalar(select(func.count()).where(LoginFailure.key == key)) or 0) >= limit:
                    raise LoginThrottled(f"Too many tries. Wait {self._config.window_minutes:g} minutes, then try again.")
            rows = [LoginFailure(key=key, at=now) for key in limits]
            session.add_all(rows)
            session.flush()
            return [row.id for row in rows]

    def _hash(self, secret: str) -> str:
        with self._slots:
            return self._hasher.hash(secret)

    def _verify(self, hashed: str, secret: str) -> bool:
        with self._slots:
            try:
                return self._hasher.verify(hashed, secret)
            except (VerifyMismatchError, InvalidHashError):
                return False


_BY_DIGEST = (  # asked by every request, so put together once
    select(User.id, User.name, User.role, User.active, LoginSession.csrf_token, LoginSession.expires_at)
    .join(LoginSession, LoginSession.user_id == User.id)
    .where(LoginSession.token_digest == bindparam("digest", type_=String))
)


def check_name(name: str) -> None:
    """Raise `ConfigError` where no account may have this name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a user's name has 1 to 64 letters, digits or . _ @ -, found {name[:80]!r}")
    if name.lower().startswith(RESERVED_PREFIX):
        raise ConfigError(f"names that begin with {RESERVED_PREFIX!r} stand for annotators of Label Studio; found {name!r}")


def same_token(expected: str, given: str) -> bool:
    """Compare two tokens in a time that says nothing about where they differ."""
    return hmac.compare_digest(expected.encode(), given.encode())


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
