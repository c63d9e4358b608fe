"""The settings of a job for `--help`: names, defaults and meanings, the meanings read from the text under (or behind) each field in the source."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from enum import Enum
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from synpref_ray.config import models_in

WIDTH = 150  # ours: the line length of the sources
_CODE = re.compile(r"\s*#\s*(noqa|type:).*$")


class SettingHelp(NamedTuple):
    """One setting; a section (a model of its own, whose settings follow) has no default."""

    key: str
    default: str | None
    meaning: str
    choices: tuple[str, ...] = ()


def help_lines(cls: type[BaseModel]) -> list[str]:
    """Return the lines of `--help` for a config: `section.key = default`, and under it what the setting means."""
    lines = []
    for setting in describe_settings(cls):
        choices = f"  ({' | '.join(setting.choices)})" if setting.choices else ""
        lines.append(f"  {setting.key}" if setting.default is None else f"  {setting.key} = {setting.default}{choices}")
        lines += textwrap.wrap(setting.meaning, WIDTH, initial_indent="      ", subsequent_indent="      ")
    return lines


def describe_settings(cls: type[BaseModel], prefix: str = "") -> list[SettingHelp]:
    """Return every setting of a config, in order; lists of sections show their first entry, and of several kinds of a section each key once."""
    settings = []
    for name, field in cls.model_fields.items():
        key, meaning = f"{prefix}{name}", _meaning(cls, name)
        models = models_in(field.annotation)
        if models and not (isinstance(field.default, tuple) and field.default):
            many = "0." if get_origin(field.annotation) is tuple else ""
            about = meaning or " ".join((models[0].__doc__ or "").split()) * (len(models) == 1)
            settings += [SettingHelp(key, None, about)] if about else []
            first: dict[str, SettingHelp] = {}
            for model in models:
                for setting in describe_settings(model, f"{key}.{many}"):
                    first[setting.key] = _joined(first.get(setting.key, setting), setting)
            settings += first.values()
            continue
        default = field.get_default(call_default_factory=True) if not field.is_required() else "REQUIRED"
        settings.append(SettingHelp(key, f"{_plain(default)}", meaning, _choices(field.annotation)))
    return settings


def _joined(one: SettingHelp, other: SettingHelp) -> SettingHelp:
    """Return one line for a setting that several kinds of a section have."""
    choices = tuple(dict.fromkeys((*one.choices, *other.choices)))
    return SettingHelp(one.key, one.default, one.meaning or other.meaning, choices)


def _plain(value: Any) -> Any:
    """Return a default as a person would write it: an enum's value, also as a mapping's key."""
    return {_plain(key): _plain(inner) for key, inner in value.items()} if isinstance(value, dict) else getattr(value, "value", value)


def _choices(annotation: Any) -> tuple[str, ...]:
    """Return the words that a setting may be, where they are few and named."""
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    return tuple(str(member.value) for member in annotation) if isinstance(annotation, type) and issubclass(annotation, Enum) else ()


def _meaning(cls: type[BaseModel], name: str) -> str:
    """Return what the nearest class of the inheritance that declares a field says about it."""
    return next((meanings[name] for base in cls.__mro__ if base is not BaseModel and name in (meanings := _meanings(base))), "")


@cache
def _meanings(cls: type) -> dict[str, str]:
    """Return by field the comment at its end and the text under it, as the class's own source has them; nothing where there is no source."""
    if cls.__module__.partition(".")[0] in ("builtins", "pydantic", "typing", "abc"):
        return {}
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    (definition,) = ast.parse(source).body
    if not isinstance(definition, ast.ClassDef):
        return {}
    comments = dict(_comments(source))
    found = {}
    for statement, after in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            behind = {line: comments[line] for line in (statement.lineno, statement.end_lineno) if line in comments}
            found[statement.target.id] = ". ".join(text.strip().removesuffix(".") for text in (_text(after), *behind.values()) if text)
    return found


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and (comment := _CODE.sub("", token.string).lstrip("# ")):
            yield token.start[0], comment


def _text(statement: ast.stmt | None) -> str:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    return " ".join(str(statement.value.value).split()) if is_text else ""  # type: ignore[union-attr]
