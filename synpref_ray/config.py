"""YAML plus dotted overrides in, validated and frozen settings out.

Every setting is a field of a pydantic model that lives beside the code that uses it; YAML mirrors the models one to one, and the command line may
override any field as `section.key=value` (the value is read as YAML). A file may begin from another one: `base: other.yaml`, a path beside it; its
own settings are laid over those of its base, section by section.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from synpref_ray.credentials import redact, refuse_credentials
from synpref_ray.errors import ConfigError


class Settings(BaseModel):
    """Base of every configuration model: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


BASE = "base"
SettingsT = TypeVar("SettingsT", bound=Settings)


def load_config(cls: type[SettingsT], file: str | None, overrides: Sequence[str]) -> SettingsT:
    """Read `file` (YAML, may be None), apply `a.b=value` overrides in order, and validate.

    Raises:
        ConfigError: a file is missing, not a mapping or its own base, an override has no `=`, or a key or value is not valid; one line.
    """
    values = _read_with_base(Path(file)) if file is not None else {}
    for override in overrides:
        _apply(values, override, cls)
    _refuse_credentials_in(values, "", [cls])
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_line(error, cls, file, overrides)) from None


def _refuse_credentials_in(value: Any, key: str, kinds: Sequence[Any]) -> None:
    """Look through raw settings; `kinds` are the annotations that a value may be read by. What is a secret by these (SecretStr) is never written."""
    if isinstance(value, str) and not (kinds and all(kind is SecretStr for kind in kinds)):
        refuse_credentials(value, key)
    if isinstance(value, dict):
        models = [model for kind in kinds for model in models_in(kind)]
        for name, inner in value.items():
            fields = [model.model_fields[name] for model in models if name in model.model_fields]
            _refuse_credentials_in(inner, f"{key}.{name}" if key else str(name), [field.annotation for field in fields])
    if isinstance(value, list):
        for place, inner in enumerate(value):
            _refuse_credentials_in(inner, f"{key}.{place}", [kind for kind in kinds if kind is not SecretStr])


def _read_with_base(file: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    values = _read_yaml(file)
    if BASE not in values:
        return values
    base = values.pop(BASE)
    if not isinstance(base, str):
        raise ConfigError(f"{file}: base must be the path of another config, found {base!r}")
    if file.resolve() in above:
        raise ConfigError(f"{file} is its own base, by way of {', '.join(path.name for path in above)}")
    return _merge(_read_with_base(file.parent / base, (*above, file.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay one mapping over another: sections merge, everything else (lists too) is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {file}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = _load_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {redact(' '.join(str(error).split()))}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold a mapping of settings, found {type(values).__name__}")
    return values


def _load_yaml(text: str) -> Any:
    """Return the value of a YAML text, every alias a copy of its own, so that an override of one section changes no other."""
    try:
        return _without_sharing(yaml.safe_load(text))
    except RecursionError:
        raise ConfigError("the settings are nested too deeply, or a YAML alias refers to itself") from None


def _without_sharing(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sharing(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_sharing(inner) for inner in value]
    return value


def _apply(values: dict[str, Any], override: str, cls: type[BaseModel]) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"expected key=value or section.key=value, found {redact(override)!r}")
    try:
        value = _load_yaml(text) if text else ""
    except yaml.YAMLError:
        value = text
    *sections, key = path.split(".")
    if not isinstance(value, dict | list | str | None) and _is_text(cls, sections, key):
        value = text  # a fingerprint of digits alone, a name like 007: YAML would make a number of them
    where: Any = values
    for section in sections:
        where = where.setdefault(section, {}) if isinstance(where, dict) else where[_index(where, section, override)]
        if not isinstance(where, dict | list):
            raise ConfigError(f"{redact(override)!r}: {section!r} is a value, not a section")
    where[key if isinstance(where, dict) else _index(where, key, override)] = value


def _is_text(cls: type[BaseModel], sections: Sequence[str], key: str) -> bool:
    models = [cls]
    for section in sections:
        if not section.isdecimal():  # a place in a list of sections
            models = [inner for model in models if section in model.model_fields for inner in models_in(model.model_fields[section].annotation)]
    return any(model.model_fields[key].annotation is str for model in models if key in model.model_fields)


def _index(values: list[Any], text: str, override: str) -> int:
    if not text.isdecimal() or int(text) >= len(values):
        raise ConfigError(f"{redact(override)!r}: expected a number from 0 to {len(values) - 1} in place of {text!r}, as in judges.0.engine.model")
    return int(text)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the model that an annotation is, or those it holds (a tuple of models, an optional model, one of several kinds)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def _one_line(error: ValidationError, cls: type[BaseModel], file: str | None, overrides: Sequence[str]) -> str:
    problems, found = [], [problem for problem in error.errors() if not _follows_from_items(problem, error)]
    for problem in found[:3]:
        path = [str(part) for part in problem["loc"]]
        where = ".".join(path) or "config"
        is_own = problem["type"] == "value_error" and isinstance(problem["input"], dict)  # a section's own check says what it found
        value = "" if is_own or problem["type"] in {"missing", "extra_forbidden"} else f" (found {problem['input']!r})"
        what = f"unknown key{_near(cls, path)}" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {what}{value}")
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    given = {override.partition("=")[0] for override in overrides}
    places = {".".join(str(part) for part in problem["loc"]) for problem in found}
    by_line = bool(given) and all(any(f"{place}.".startswith(f"{one}.") for one in given) for place in places)
    source = " on the command line" if by_line and file else f" in {file}" if file else ""
    return f"bad settings{source}: {'; '.join(problems)}{more}"


def _follows_from_items(problem: Any, error: ValidationError) -> bool:
    """Whether a list is called too short only because its items are wrong, which pydantic counts as missing."""
    place = problem["loc"]
    return problem["type"] == "too_short" and any(other["loc"][: len(place)] == place and other["loc"] != place for other in error.errors())


def _near(cls: type[BaseModel], path: Sequence[str]) -> str:
    """Return which known key of a section may have been meant; nothing where none is near."""
    models = [cls]
    for part in path[:-1]:
        if not part.isdecimal():
            models = [inner for model in models if part in model.model_fields for inner in models_in(model.model_fields[part].annotation)]
    known = {name for model in models for name in model.model_fields}
    near = [] if path[-1] in known else difflib.get_close_matches(path[-1], sorted(known), n=1)  # of several kinds of section, another one's
    return f", perhaps {near[0]}" if near else ""
