"""The architecture: imports point one way, and ray, vllm, faiss, deepspeed, fastapi and sqlalchemy stay in their rooms; read from the source, so
lazy imports count."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "synpref_ray"

BASE = {"schema", "errors", "credentials", "config", "bundled", "versions"}
FOUNDATION = {"tables", "rules"}
MIDDLE = {"ingest", "llm", "reward", "retrieval", "human", "evaluation", "reporting", "planning"}
MAY_IMPORT = {
    "schema": set(),
    "errors": set(),
    "credentials": {"errors"},
    "config": {"errors", "credentials"},
    "bundled": {"errors", "credentials"},
    "versions": set(),
    "priority": set(),
    "rules": BASE - {"bundled"},
    "tables": BASE | {"rules"},
    **{room: BASE | FOUNDATION for room in MIDDLE},
    "reward": BASE | FOUNDATION | {"priority"},
    "pipeline": BASE | FOUNDATION | MIDDLE | {"priority"},
    "jobs": BASE | FOUNDATION | MIDDLE | {"pipeline"},
}
ROOMS_OF = {
    "ray": (f"{PACKAGE}.pipeline.", f"{PACKAGE}.reward.ray_trainer"),
    "vllm": (f"{PACKAGE}.llm.",),
    "faiss": (f"{PACKAGE}.retrieval.",),
    "deepspeed": (f"{PACKAGE}.reward.",),
    **{library: (f"{PACKAGE}.human.",) for library in ("fastapi", "sqlalchemy", "starlette", "uvicorn")},
}
HEAVY = set(ROOMS_OF)
# No module outside these may load Ray, not even through what it imports: the cores run in one process without it.
WITH_RAY = (f"{PACKAGE}.pipeline", f"{PACKAGE}.reward.ray_trainer", "jobs.")


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for folder in (PACKAGE, "jobs") for file in sorted((ROOT / folder).rglob("*.py"))}
PACKAGES = {name for name, file in FILES.items() if file.name == "__init__.py"}


def imports_of(source: str, module: str, *, is_package: bool = False) -> set[str]:
    """Return the full names of all that `source` imports at any depth; `from a import b` gives a, and a.b if that is a module of ours."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            found.add(target)
            found |= {f"{target}.{alias.name}" for alias in node.names} & set(FILES)
    return found


@cache
def direct(module: str) -> frozenset[str]:
    return frozenset(imports_of(FILES[module].read_text(encoding="utf-8"), module, is_package=module in PACKAGES))


def loaded_by(module: str) -> set[str]:
    """Return everything that importing `module` may load, the packages above each module included."""
    seen: set[str] = set()
    queue = [module]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in FILES:
            queue += direct(name)
        if name.startswith(f"{PACKAGE}."):
            queue.append(name.rpartition(".")[0])
    return seen


def room_of(module: str) -> str:
    parts = module.split(".")
    return "jobs" if parts[0] == "jobs" else parts[1] if len(parts) > 1 else PACKAGE


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_one_way(module: str) -> None:
    room = room_of(module)
    ours = {room_of(name) for name in direct(module) if name.split(".")[0] == PACKAGE and name != PACKAGE}
    allowed = set() if room == PACKAGE else MAY_IMPORT[room] | {room}
    assert ours <= allowed, f"{module} imports {sorted(ours - allowed)}"
    assert not any(name.split(".")[0] in {"jobs", "examples", "tests"} for name in direct(module))


@pytest.mark.parametrize("module", sorted(FILES))
def test_heavy_libraries_stay_in_their_rooms(module: str) -> None:
    heavy = {name.split(".")[0] for name in direct(module)} & HEAVY
    strangers = {library for library in heavy if not f"{module}.".startswith(ROOMS_OF[library])}
    assert not strangers, f"{module} imports {sorted(strangers)}"


@pytest.mark.parametrize("module", sorted(name for name in FILES if not f"{name}.".startswith(WITH_RAY)))
def test_the_cores_run_without_ray(module: str) -> None:
    assert "ray" not in {name.split(".")[0] for name in loaded_by(module)}


@pytest.mark.parametrize("module", sorted(name for name in FILES if room_of(name) in {"rules", "evaluation"} or name.endswith((".loss", ".packing"))))
def test_rules_loss_packing_and_metrics_load_nothing_heavy(module: str) -> None:
    assert not HEAVY & {name.split(".")[0] for name in loaded_by(module)}


def test_every_imported_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    declared = {re.split(r"[\[<>=,; ]", line)[0].lower().replace("_", "-") for line in wanted}
    libraries = {name.split(".")[0] for module in FILES for name in direct(module)} - set(sys.stdlib_module_names) - {PACKAGE}
    distributions = packages_distributions()
    missing = {library for library in libraries if not declared & {name.lower().replace("_", "-") for name in distributions.get(library, ())}}
    assert not missing, f"imported but not in pyproject.toml: {sorted(missing)}"


def test_the_reader_sees_lazy_relative_and_submodule_imports() -> None:
    source = "import os.path\ndef f():\n    from . import schema\n    from ..errors import InputError\n    from synpref_ray import config\n"
    found = imports_of(source, "synpref_ray.rules.gate")
    assert found >= {"os.path", "synpref_ray.rules", "synpref_ray.errors", "synpref_ray", "synpref_ray.config"}
    assert "synpref_ray.errors" in imports_of("from . import errors", "synpref_ray", is_package=True)
