"""Credentials in URLs: refused in settings, which are written into every run's folder, and taken out of messages that libraries make.

A URL holds a credential as userinfo (`s3://key:secret@bucket`, `https://user:secret@host`, `https://token@host`) or in its query: presigned URLs of
AWS, Google and CloudFront, shared access signatures of Azure (`sig`), keys and tokens of APIs (of Google's `key=` by how its keys begin). What is no
secret passes: an account before a container (`abfs://container@account…`), a user without a password (`sftp://user@host`), a port, an `@` in a path
(a revision of the hub). Addresses of S3 have no port, and databases' libraries take a `/` in a password: there all up to the last `@` is userinfo.
"""

import re

from synpref_ray.errors import ConfigError

_SECRETS = (
    *("AWSAccessKeyId", "GoogleAccessId", "Key-Pair-Id", "Signature", "sig"),
    *(f"X-{who}-{what}" for who in ("Amz", "Goog") for what in ("Credential", "Signature", "Security-Token")),
    *("access_token", "token", "api[-_]?key", "password", "secret"),
)
_DATABASES = (
    *("postgres(?:ql)?", "mysql", "mariadb", "mssql", "oracle", "cockroachdb", "redshift", "snowflake", "clickhouse"),
    *("mongodb", "rediss?", "amqps?"),
)
_TO_QUERY = r"\d{1,5}(?:/[^@?#\s]*)?\?[^@=\s]*="  # a port, a name, and then a query: an `@` in it stands before no host
_WITH_SLASHES = rf"(?P<scheme>\b(?:s3a?|{'|'.join(_DATABASES)})(?:\+\w+)?://)[^:/?#@\[\s]*:(?!{_TO_QUERY})[^@\s]*@(?:[^?#\s]*@)?"
_ALONE = r"(?:(?<=http://)|(?<=https://)|(?<=s3://)|(?<=s3a://))[^/?#\s]*@"
_USER_AND_WORD = r"(?<=://)[^/?#@\[\s]*:(?!\d{1,5}(?:[/?#\s]|$))[^?#\s]*@"
_DIGITS = r"(?<=://)(?<!http://)(?<!https://)[^/?#@\[\s]*:\d[\d/]*@"  # in a web address these are a port and a path
_USERINFO = "|".join((_WITH_SLASHES, _ALONE, _USER_AND_WORD, _DIGITS))
_SECRET = rf"(?:(?:{'|'.join(_SECRETS)})=|key=AIza)"
_CREDENTIAL = re.compile(rf"{_USERINFO}|[?&]{_SECRET}", re.IGNORECASE)
_IN_MESSAGE = re.compile(rf"(?P<userinfo>{_USERINFO})|\?(?:[^\s'\"<>]*&)?{_SECRET}[^\s'\"<>]*", re.IGNORECASE)


def refuse_credentials(text: str, where: str) -> None:
    """Raise ConfigError, without the credential, where a URL holds one: configs go into every run's folder, and names of tables into logs."""
    if _CREDENTIAL.search(text):
        raise ConfigError(
            f"{where} holds a credential in its URL; write the URL without it, and give the credential by the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY), the storage's own files, or the machine's role"
        )


def redact(message: str) -> str:
    """Return a message with `…` in place of credentials in its URLs: whole queries of signed URLs, and what stands before the host."""
    return _IN_MESSAGE.sub(lambda found: f"{found['scheme'] or ''}…@" if found["userinfo"] else "?…", message)
