"""What a wheel holds, and whether the locks keep what pyproject.toml asks for."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(variant: str) -> dict[str, Version]:
    """Return the versions of a lock by normalised name."""
    lines = (ROOT / "requirements" / f"{variant}.txt").read_text(encoding="utf-8").splitlines()
    pinned = (re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", found[1]).lower(): Version(found[2]) for found in pinned if found}


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_a_lock_keeps_every_bound_of_pyproject(variant: str) -> None:
    locked = pins(variant)
    extras = PROJECT["optional-dependencies"]
    for line in (*PROJECT["dependencies"], *extras[variant], *extras["dev"]):
        wanted = Requirement(line)
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert name in locked, f"{line} is not in requirements/{variant}.txt"
        assert wanted.specifier.contains(locked[name], prereleases=True), f"{line}, locked at {locked[name]}"


def test_both_locks_have_the_same_versions_of_what_both_name() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    different = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert different <= {"apache-tvm-ffi", "triton"}  # vllm and the CUDA build of torch pin these themselves


@pytest.mark.slow
def test_a_wheel_holds_the_package_with_its_pages_and_its_catalogue(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "."]
    tree = tmp_path / "tree"  # setuptools leaves a build folder where it builds
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(tree)], check=True)
    subprocess.run(command, cwd=tree, check=True)
    [wheel] = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.split("/")[0].endswith(".dist-info")}
    tracked = subprocess.run(["git", "ls-files", "synpref_ray"], cwd=tree, check=True, capture_output=True, text=True).stdout.split()
    assert held == set(tracked)
    assert any(name.endswith(".html") for name in held)
    assert any(name.startswith("synpref_ray/ingest/catalogue/") and name.endswith(".yaml") for name in held)


@pytest.mark.slow
def test_the_gpu_variant_resolves_for_a_cuda_machine_to_its_lock(tmp_path: Path) -> None:
    """Nothing is installed: the command at the top of the lock, on whatever machine."""
    uv = Path(sys.executable).parent / "uv"
    lock = ROOT / "requirements" / "gpu.txt"
    command = [
        *(str(uv), "pip", "compile", str(ROOT / "pyproject.toml"), "--extra", "gpu", "--extra", "dev", "--constraint", str(lock)),
        *("--override", str(ROOT / "requirements" / "overrides.txt"), "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_31"),
        *("--no-annotate", "--no-header", "--quiet", "--output-file", str(tmp_path / "resolved.txt")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "failed to fetch" in done.stderr.lower() or "connect" in done.stderr.lower():
        pytest.skip("no package registry is within reach")
    assert done.returncode == 0, done.stderr[-2000:]
    names = ((tmp_path / "resolved.txt").read_text(), lock.read_text())
    resolved, locked = ({line for line in text.splitlines() if re.match(r"[a-z0-9].*==", line, re.IGNORECASE)} for text in names)
    assert resolved == locked
    assert any(line.startswith("nvidia-") for line in resolved), "CUDA libraries"
