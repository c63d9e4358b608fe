"""`make setup` after a kill: a half-made .venv is made anew."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Stands for the interpreter inside and outside of .venv: logs how it is called; `-m venv` copies it to where it belongs.
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python;; esac
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def setup(folder: Path) -> list[str]:
    """Run `make setup` with a stand-in for Python; return how that was called."""
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    (folder / "requirements").mkdir()
    (folder / "requirements" / "cpu.txt").write_text("setuptools==1\ndeepspeed==1\nother==1\n")
    python = executable(folder / "python", PYTHON.format(log=folder / "log"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return (folder / "log").read_text().splitlines()


def test_a_venv_without_pip_is_made_anew(tmp_path: Path) -> None:
    executable(tmp_path / ".venv" / "bin" / "python", "#!/bin/sh\nexit 1\n")
    assert setup(tmp_path)[0] == "-m venv --clear .venv"


def test_a_venv_with_pip_is_kept(tmp_path: Path) -> None:
    executable(tmp_path / ".venv" / "bin" / "python", PYTHON.format(log=tmp_path / "log"))
    calls = setup(tmp_path)
    assert calls[0] == "-m pip --version"
    assert not any(call.startswith("-m venv") for call in calls)
