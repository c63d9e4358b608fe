"""Settings from YAML and the command line: what is read, what is refused, and that a refusal is one line."""

from pathlib import Path

import pytest
from pydantic import Field, SecretStr, ValidationError

from synpref_ray.config import Settings, load_config
from synpref_ray.credentials import redact
from synpref_ray.errors import ConfigError


class Inner(Settings):
    rate: float = 0.5
    names: tuple[str, ...] = ()


class Outer(Settings):
    size: int = Field(default=1, ge=1)
    title: str = "x"
    inner: Inner = Inner()


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_yaml_mirrors_the_models_and_overrides_come_last(tmp_path: Path) -> None:
    file = write(tmp_path, "size: 3\ninner:\n  rate: 0.25\n  names: [a]\n")
    config = load_config(Outer, file, ["inner.rate=0.75", "title=new", "inner.rate=1e-1", "inner.names=[b, c]"])
    assert config == Outer(size=3, title="new", inner=Inner(rate=0.1, names=("b", "c")))


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load_config(Outer, None, []) == Outer()
    assert load_config(Outer, write(tmp_path, ""), []) == Outer()


def test_a_value_may_hold_equals_signs_colons_and_dots() -> None:
    assert load_config(Outer, None, ["title=s3://bucket/a=b.c"]).title == "s3://bucket/a=b.c"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Outer().size = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("sise: 3\n", [], "config.yaml: sise: unknown key, perhaps size"),
        ("colour: 3\n", [], "colour: unknown key"),
        ("size: 3\n", ["inner.rat=1"], "bad settings on the command line: inner.rat: unknown key, perhaps rate"),
        ("size: 0\n", ["inner.rat=1"], "config.yaml: size"),
        ("inner:\n  rat: 1\n", [], "inner.rat: unknown key"),
        ("", ["inner.rate=fast"], "inner.rate"),
        ("", ["size=0"], "size"),
        ("", ["size"], "key=value"),
        ("", ["=3"], "key=value"),
        ("", ["size.part=1", "size=2", "size.part=1"], "'size' is a value"),
        ("- 1\n- 2\n", [], "mapping"),
        ("size: [1\n", [], "not valid YAML"),
    ],
)
def test_a_bad_setting_is_one_clear_line(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write(tmp_path, text), overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


class Item(Settings):
    size: int = Field(ge=1)


class Several(Settings):
    items: tuple[Item, ...] = Field(min_length=1)


def test_a_list_with_a_wrong_item_is_not_called_too_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"items\.0\.size") as caught:
        load_config(Several, write(tmp_path, "items: [{size: 0}]"), [])
    assert "at least 1 item" not in str(caught.value)
    with pytest.raises(ConfigError, match="at least 1 item"):
        load_config(Several, write(tmp_path, "items: []"), [])


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml"):
        load_config(Outer, str(tmp_path / "no.yaml"), [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"size: \xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(Outer, str(binary), [])


def test_more_than_three_problems_are_counted() -> None:
    with pytest.raises(ConfigError, match="and 2 more"):
        load_config(Outer, None, ["a=1", "b=1", "c=1", "d=1", "e=1"])


class Twins(Settings):
    one: Outer = Outer()
    other: Outer = Outer()


class Pair(Settings):
    twins: Twins = Twins()


@pytest.mark.parametrize("section", ["one", "other"])
def test_an_override_of_an_aliased_section_leaves_the_other_alone(tmp_path: Path, section: str) -> None:
    file = write(tmp_path, "one: &both\n  inner: &inner {rate: 0.25, names: [a]}\nother: *both\n")
    config = load_config(Twins, file, [f"{section}.inner.rate=0.75", f"{section}.size=2"])
    changed, kept = (config.one, config.other) if section == "one" else (config.other, config.one)
    assert changed == Outer(size=2, inner=Inner(rate=0.75, names=("a",)))
    assert kept == Outer(inner=Inner(rate=0.25, names=("a",)))


def test_aliases_of_merged_sections_and_of_overrides_are_copies_too(tmp_path: Path) -> None:
    file = write(tmp_path, "one: &both\n  inner: {rate: 0.25}\nother:\n  <<: *both\n  size: 3\n")
    config = load_config(Twins, file, ["other.inner.rate=0.75"])
    assert (config.one.inner.rate, config.other.inner.rate, config.other.size) == (0.25, 0.75, 3)
    pair = load_config(Pair, None, ["twins={one: &both {inner: {rate: 0.25}}, other: *both}", "twins.one.inner.rate=0.5"]).twins
    assert (pair.one.inner.rate, pair.other.inner.rate) == (0.5, 0.25)


def test_an_alias_of_itself_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refers to itself"):
        load_config(Twins, write(tmp_path, "one: &one\n  inner: *one\n"), [])


def test_a_file_is_laid_over_its_base_section_by_section_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path, "size: 3\ntitle: base\ninner: {rate: 0.25, names: [a, b]}\n")
    (tmp_path / "more").mkdir()
    middle, top = tmp_path / "more" / "middle.yaml", tmp_path / "more" / "top.yaml"
    middle.write_text("base: ../config.yaml\ntitle: middle\ninner: {names: [c]}\n")
    top.write_text("base: middle.yaml\ninner: {rate: 0.5}\n")
    assert load_config(Outer, str(middle), []) == Outer(size=3, title="middle", inner=Inner(rate=0.25, names=("c",)))
    assert load_config(Outer, str(top), ["size=4"]) == Outer(size=4, title="middle", inner=Inner(rate=0.5, names=("c",)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("base: config.yaml\n", "its own base"), ("base: nowhere.yaml\n", r"nowhere\.yaml"), ("base: [a]\n", "base must be the path")],
)
def test_a_bad_base_is_one_clear_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(Outer, write(tmp_path, text), [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIDEXAMPLE:wJalrXUtnFEMI@bucket/data",
        "s3a://wJalrXUtnFEMI@bucket",
        "https://bucket.s3.amazonaws.com/a.jsonl?X-Amz-Credential=AKID&X-Amz-Signature=wJalrXUtnFEMI",
        "s3://AKIDEXAMPLE:wJalr/XUtnFEMI@bucket/data",
        "simplecache::s3://AKIDEXAMPLE:wJalrXUtnFEMI@bucket/data",
        "https://storage.googleapis.com/b/a.jsonl?X-Goog-Algorithm=x&x-goog-signature=wJalrXUtnFEMI",
        "https://storage.googleapis.com/b/a.jsonl?X-Goog-Credential=wJalrXUtnFEMI",
        "https://account.blob.core.windows.net/c/a.jsonl?se=2030-01-01&sp=r&sig=wJalrXUtnFEMI",
        "https://user:wJalrXUtnFEMI@host/a.jsonl",
        "https://wJalrXUtnFEMI@host:8000/v1",
        "sftp://user:wJalr@XUtnFEMI@host/a.jsonl",
        "https://host/v1?api_key=wJalrXUtnFEMI",
        "https://generativelanguage.googleapis.com/v1beta/models?alt=sse&key=AIzaSywJalrXUtnFEMI",
        "postgresql+psycopg://me:wJalr@host/name",
        "postgresql://me:wJalr/XUtnFEMI@host:5432/name",
        "postgresql://me:34/wJalr?XUtnFEMI@host/name",
    ],
)
def test_a_credential_in_a_config_is_an_error_that_does_not_repeat_it(tmp_path: Path, url: str) -> None:
    file = write(tmp_path, f"inner:\n  names: [s3://bucket/a@b, '{url}']\n")
    with pytest.raises(ConfigError, match=r"^inner\.names\.1 holds a credential in its URL; .*the machine's role$") as refused:
        load_config(Outer, file, [])
    assert "wJalr" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"^title holds a credential"):
        load_config(Outer, None, [f"title={url}"])
    for bad in (f"title.5={url}", f"inner.names.7={url}", url.partition("=")[0]):
        with pytest.raises(ConfigError) as refused:
            load_config(Outer, None, ["title=x", "inner.names=[a]", bad])
        assert "wJalr" not in str(refused.value)
    assert "wJalr" not in redact(f"403 for url '{url}' at {url}: {url}")


@pytest.mark.parametrize(
    "url",
    ["postgresql://me:12/34@host/name", "mysql+pymysql://me:1234/@host", "s3://AKID:12/34@bucket/a", "sftp://me:12/34@host/a", "sftp://me:1234@host"],
)
def test_a_password_of_digits_is_no_port(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^title holds a credential") as refused:
        load_config(Outer, None, [f"title={url}"])
    assert "34" not in str(refused.value)
    assert redact(f"at '{url}'") == f"at '{url.partition('://')[0]}://…@{url.rpartition('@')[2]}'"


class WithSecret(Settings):
    database: SecretStr = SecretStr("")
    inner: Outer = Outer()


def test_only_a_setting_that_is_never_written_may_hold_a_credential() -> None:
    url = "postgresql+psycopg://me:word/12@host/name"
    config = load_config(WithSecret, None, [f"database={url}"])
    assert config.database.get_secret_value() == url
    assert "word" not in config.model_dump_json()
    for other in (f"inner.title={url}", f"database=[{url}]", f"databse={url}", f"database.url={url}"):
        with pytest.raises(ConfigError, match=r"^[a-z.0]+ holds a credential in its URL"):
            load_config(WithSecret, None, [other])


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/a@b:c", "https://host:8000/a@b", "https://[::1]:8000/a@b", "https://host/a?page=2&se=1", "sftp://user@host/a"),
        *("abfs://container@account.dfs.core.windows.net/a", "hf://datasets/me/set@main#train", "postgresql+psycopg://me@host:5432/name"),
        *("https://host/v1?key=objects/a.jsonl", "https://host/v1?api=1&keys=AIzaSy", "https://host:8000/12/34@main", "sftp://host:22/a/12@b"),
        *("postgresql://me@/name?host=/run/db", "postgresql://host:5432/name?user=a@b", "postgresql://[::1]:5432/name", "redis://host:6379/0"),
        *("why? sig=, or a@b", "/data/design=x&y/a.jsonl", "memory://a:1/b@c"),
    ],
)
def test_what_is_no_credential_passes(url: str) -> None:
    assert load_config(Outer, None, [f"title={url}"]).title == url
    assert redact(url) == url


def test_a_redacted_message_still_says_where() -> None:
    signed = "https://cdn.hub/a.parquet?X-Amz-Date=1&X-Amz-Signature=secret&x-id=GetObject"
    assert redact(f"403 Forbidden for url '{signed}' (s3://k:secret@b/a)") == "403 Forbidden for url 'https://cdn.hub/a.parquet?…' (s3://…@b/a)"


class Listed(Settings):
    steps: tuple[Outer, ...] = (Outer(),)


@pytest.mark.parametrize("typed", ["12345678", "01234567", "007", "2026-01-02", "true", "1e5", "abc"])
def test_a_text_is_taken_as_it_is_typed(typed: str) -> None:
    assert load_config(Outer, None, [f"title={typed}"]).title == typed
    assert load_config(Listed, None, ["steps=[{}]", f"steps.0.title={typed}"]).steps[0].title == typed
    assert load_config(Outer, None, [f"title='{typed}'"]).title == typed
    with pytest.raises(ConfigError):
        load_config(Outer, None, ["title=[a]"])
