"""KubeRay's manifests: every field against the excerpt of the CRDs beside this file, and Ray's own reading of the resource for its autoscaler."""

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from synpref_ray.config import load_config
from synpref_ray.pipeline.job import parse_arguments
from synpref_ray.pipeline.stage2 import Stage2Config

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "cluster" / "kuberay"
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay_excerpt.yaml").read_text(encoding="utf-8"))


def load(name: str) -> dict[str, Any]:
    manifest: dict[str, Any] = yaml.safe_load((MANIFESTS / f"{name}.yaml").read_text(encoding="utf-8"))
    return manifest


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_every_field_is_one_of_the_resource(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(load(name), SCHEMA)


def test_the_excerpt_refuses_a_misspelt_field() -> None:
    manifest = load("raycluster")
    manifest["spec"]["workerGroupSpecs"][0]["minReplica"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, SCHEMA)


def test_ray_reads_the_groups_as_meant() -> None:
    manifest = load("raycluster")
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)  # validated by Ray in there
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert (types["cpu"]["resources"]["CPU"], types["gpu"]["resources"]["GPU"]) == (16, 8)
    assert [types[name]["min_workers"] for name in ("cpu", "gpu")] == [0, 0]
    assert config["idle_timeout_minutes"] == 10.0


def test_a_job_s_cluster_is_that_of_the_cluster_manifest() -> None:
    assert load("rayjob")["spec"]["rayClusterSpec"] == load("raycluster")["spec"]


def test_the_ray_of_the_manifest_is_the_locked_one_and_asks_for_tokens() -> None:
    spec = load("raycluster")["spec"]
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token"}


def test_every_pod_mounts_only_volumes_that_it_has_and_limits_what_it_asks_for() -> None:
    spec = load("raycluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} == volumes
            limits = container["resources"]["limits"]
            assert {name: limits[name] for name in ("cpu", "memory")} == {
                name: container["resources"]["requests"][name] for name in ("cpu", "memory")
            }


def gigabytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Ti)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": 1, "Ti": 1024}[unit]


def test_the_caches_of_all_pods_are_writable_for_the_image_s_user_and_within_the_pod_s_limit() -> None:
    image = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    [user] = re.findall(r"^USER (\d+):\1$", image, re.MULTILINE)
    places = re.findall(r"(?:XDG_CACHE_HOME|HF_HOME|VLLM_CACHE_ROOT)=(\S+)", image)
    spec = load("raycluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert all(any(place == path or place.startswith(f"{path}/") for path in mounts) for place in places)
        [cache] = [volume for volume in pod["volumes"] if volume["name"] == mounts["/cache"]]
        assert {*cache} <= {"name", "emptyDir", "ephemeral", "persistentVolumeClaim"}, "fsGroup does nothing to others: root alone could write"
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["fsGroup"]) == (int(user), int(user))
        limit = gigabytes(container["resources"]["limits"]["ephemeral-storage"])
        assert gigabytes(cache["emptyDir"].get("sizeLimit", "0Gi")) <= limit
        assert gigabytes(container["resources"]["requests"]["ephemeral-storage"]) <= limit


def test_gpu_pods_have_room_for_the_largest_models_of_the_configs() -> None:
    [gpu] = [group for group in load("raycluster")["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    asked = gigabytes(gpu["template"]["spec"]["containers"][0]["resources"]["requests"]["ephemeral-storage"])
    assert asked > 470 + 145, "Qwen3-235B and Qwen2.5-72B in bfloat16"


def test_gpu_nodes_have_the_label_of_the_launchers() -> None:
    manifest = load("raycluster")
    manifest["metadata"]["namespace"] = "default"
    types = _derive_autoscaling_config_from_ray_cr(manifest)["available_node_types"]
    assert {name: kind["labels"] for name, kind in types.items()} == {"headgroup": {}, "cpu": {}, "gpu": {"synpref/node": "gpu"}}


def test_the_entrypoint_of_the_job_is_a_job_with_a_valid_config() -> None:
    python, script, *arguments = shlex.split(load("rayjob")["spec"]["entrypoint"])
    assert python == "python"
    assert (ROOT / script).is_file()
    parsed = parse_arguments(arguments)
    load_config(Stage2Config, str(ROOT / str(parsed.config)), parsed.overrides)


def test_the_pod_monitor_scrapes_the_port_that_every_pod_has() -> None:
    [endpoint] = load("podmonitor")["spec"]["podMetricsEndpoints"]
    spec = load("raycluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert endpoint["port"] in {port["name"] for container in group["template"]["spec"]["containers"] for port in container["ports"]}
