"""Credentials in URLs: refused in settings, which are written into every run's folder, and taken out of messages that libraries make.

A URL holds a credential as userinfo (`s3://key:secret@bucket`, `https://user:secret@host`, `https://token@host`) or in its query: presigned URLs of
AWS, Google and CloudFront, shared access signatures of Azure (`sig`), keys and tokens of APIs. What is no secret passes: an account before a
container (`abfs://container@account…`), a user without a password (`sftp://user@host`), a port, an `@` in a path (a revision of the hub).
"""

import re

from synpref_ray.errors import ConfigError

_SECRETS = (
    *("AWSAccessKeyId", "GoogleAccessId", "Key-Pair-Id", "Signature", "sig"),
    *(f"X-{who}-{what}" for who in ("Amz", "Goog") for what in ("Credential", "Signature", "Security-Token")),
    *("access_token", "token", "api[-_]?key", "password", "secret"),
)
_USERINFO = r"(?:(?<=http://)|(?<=https://)|(?<=s3://)|(?<=s3a://))[^/?#\s]*@|(?<=://)[^/?#@\[\s]*:(?!\d{1,5}(?:[/?#\s]|$))[^?#\s]*@"
_QUERY = rf"[?&](?:{'|'.join(_SECRETS)})="
_CREDENTIAL = re.compile(f"{_USERINFO}|{_QUERY}", re.IGNORECASE)
_IN_MESSAGE = re.compile(rf"(?P<userinfo>{_USERINFO})|\?(?:[^\s'\"<>]*&)?(?:{'|'.join(_SECRETS)})=[^\s'\"<>]*", re.IGNORECASE)
_OF_A_DATABASE = re.compile(r"postgresql(\+\w+)?://", re.IGNORECASE)
"""Its URL is a setting that is never written (`database` of jobs/annotate.py)."""


def refuse_credentials(text: str, where: str) -> None:
    """Raise ConfigError, without the credential, where a URL holds one: configs go into every run's folder, and names of tables into logs."""
    if _CREDENTIAL.search(text) and not _OF_A_DATABASE.match(text):
        raise ConfigError(
            f"{where} holds a credential in its URL; write the URL without it, and give the credential by the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY), the storage's own files, or the machine's role"
        )


def redact(message: str) -> str:
    """Return a message with `…` in place of credentials in its URLs: whole queries of signed URLs, and what stands before the host."""
    return _IN_MESSAGE.sub(lambda found: "…@" if found["userinfo"] else "?…", message)
