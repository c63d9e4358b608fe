"""What `ray up` does to a node before its container starts: its commands run here in a shell, with stand-ins for the tools that need root or a cloud.

The stand-ins write down how they were called; from that follows which folders the container's user may write into."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.command_runner import _with_interactive

from tests.cluster.test_launchers import CLUSTER, LAUNCHERS, load

USER = "1000"
TOOLS = ("apt-get", "aws", "chmod", "docker", "gcloud", "install", "mdadm", "mkdir", "mkfs.ext4", "mount.nfs", "systemctl")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """Return a folder that stands for a node: its tools, its disks by id, what it has mounted, and the calls of the tools."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "disks").mkdir()
    for file in ("calls", "mounted", ".bashrc"):
        (tmp_path / file).touch()
    noted = f'echo "${{0##*/}} $*" >> {tmp_path}/calls'
    scripts = {tool: noted for tool in TOOLS}
    scripts["mount"] = f'{noted}\nfor last; do :; done\necho "$last" >> {tmp_path}/mounted'
    scripts["mountpoint"] = f'exec {shutil.which("grep")} -qx "$2" {tmp_path}/mounted'
    scripts["sudo"] = 'exec "$@"'
    for tool, script in scripts.items():
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    return tmp_path


def set_up(node: Path, name: str) -> list[list[str]]:
    """Run the file's initialization commands as Ray wraps them; return the words of every call since the node was made."""
    for command in load(name)["initialization_commands"]:
        script = shlex.split(" ".join(_with_interactive(command.replace("/dev/disk/by-id", f"{node}/disks"))))[-1]
        bash = str(shutil.which("bash"))
        done = subprocess.run([bash, "-c", script], env={"PATH": f"{node}/bin", "HOME": str(node)}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
    return [line.split() for line in (node / "calls").read_text().splitlines()]


def writable(calls: list[list[str]]) -> set[str]:
    """Return the folders that the container's user may write into after the calls."""
    owners: dict[str, str] = {}
    for tool, *words in calls:
        if tool == "mount":  # what lay there is covered, and a new file system belongs to root
            owners = {folder: owner for folder, owner in owners.items() if not folder.startswith(words[-1])} | {words[-1]: "root"}
        elif tool == "mkdir":
            owners = {folder: "root" for folder in words if folder.startswith("/")} | owners
        elif tool == "chmod" and words[0] == "1777":
            owners |= dict.fromkeys(words[1:], "anybody")
        elif tool == "install":
            owners[words[-1]] = words[words.index("-o") + 1]
    return {folder for folder, owner in owners.items() if owner in {"anybody", USER}}


def volumes(name: str) -> dict[str, str]:
    """Return the container's folders and the host's folders that they are."""
    options = [option.split()[1].split(":") for option in load(name)["docker"]["run_options"] if option.startswith("--volume ")]
    return {inside: outside for outside, inside in options}


@pytest.mark.parametrize("disks", [0, 16])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_container_s_user_may_write_into_every_volume(name: str, disks: int, node: Path) -> None:
    for number in range(disks):
        (node / "disks" / f"google-local-nvme-ssd-{number}").touch()
    assert re.search(rf"^USER {USER}:{USER}$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert {*volumes(name).values()} <= writable(set_up(node, name))


def test_the_local_ssds_of_an_a3_machine_become_one_disk_at_the_cache(node: Path) -> None:
    disks = [f"{node}/disks/google-local-nvme-ssd-{number}" for number in range(16)]
    for disk in disks:
        Path(disk).touch()
    calls = set_up(node, "gcp")
    [made] = [call for call in calls if call[0] == "mdadm"]
    assert {*disks, "--raid-devices=16", "--level=0"} <= {*made}
    assert ["mount", "/dev/md0", volumes("gcp")["/cache"]] in calls
    again = set_up(node, "gcp")[len(calls) :]
    assert not [call for call in again if call[0] in {"mdadm", "mkfs.ext4", "mount"}], "a second time must not wipe the cache"


def test_other_machines_keep_their_cache_on_the_root_disk(node: Path) -> None:
    assert not [call for call in set_up(node, "gcp") if call[0] in {"mdadm", "mkfs.ext4"}]


def test_the_share_is_mounted_before_its_folder_is_made(node: Path) -> None:
    calls = set_up(node, "gcp")
    [mounted] = [number for number, call in enumerate(calls) if call[0] == "mount"]
    [made] = [number for number, call in enumerate(calls) if call[-1] == volumes("gcp")["/shared"]]
    assert mounted < made
    assert volumes("gcp")["/shared"].startswith(calls[mounted][-1] + "/")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_prometheus_on_the_host_reads_the_list_that_ray_writes_in_the_container(name: str) -> None:
    settings: dict[str, Any] = yaml.safe_load((CLUSTER / "monitoring" / "prometheus.yml").read_text())
    [file] = settings["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert volumes(name).get(str(Path(file).parent)) == str(Path(file).parent)
