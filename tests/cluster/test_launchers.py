"""The cluster launcher's files: valid for Ray itself, and Ray's own scheduler takes from them the nodes that they are meant to give."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator

from synpref_ray.config import load_config
from synpref_ray.pipeline.cluster import RayConfig
from synpref_ray.pipeline.stage2 import Stage2Config
from synpref_ray.pipeline.tasks import window_size
from tests.pipeline.test_configs import CONFIGS, FAMILY, family_config

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHERS = ("aws", "gcp")
NOT_ON_GPU_NODES = [[("synpref/node", LabelSelectorOperator.LABEL_OPERATOR_NOT_IN, ["gpu"])]]
"""What Ray makes of `label_selector={"synpref/node": "!gpu"}`."""


def load(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))
    return config


def launched(name: str, demand: list[dict[str, float]], unavailable: tuple[str, ...] = (), selectors: Any = None) -> dict[str, int]:
    """Return how many nodes of each type Ray's autoscaler (v2) would start for a demand on an empty cluster."""
    config = AutoscalingConfig(load(name), skip_content_hash=True)
    request = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_worker_nodes(),
        disable_launch_config_check=True,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(wanted, label_selectors=selectors) for wanted in demand]),
        recoverable_resource_availabilities=dict.fromkeys(unavailable, 0.0),
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_itself_finds_the_file_valid(name: str) -> None:
    validate_config(prepare_config(load(name)))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_head_takes_no_work_and_all_workers_scale_from_zero(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0 --num-gpus=0" in config["head_start_ray_commands"][-1]
    assert [kind.get("min_workers", 0) for kind in types.values()] == [0] * len(types)
    assert launched(name, []) == {}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_gpus_are_spot_first_and_on_demand_where_spot_is_not_to_be_had(name: str) -> None:
    two_nodes = [{"GPU": 1.0, "CPU": 1.0}] * 16
    assert launched(name, two_nodes) == {"gpu.spot": 2}
    assert launched(name, two_nodes, unavailable=("gpu.spot",)) == {"gpu.ondemand": 2}
    assert launched(name, [{"CPU": 1.0}] * 20) == {"cpu.spot": 2}, "CPU work must not start GPU nodes"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_cpu_nodes_are_spot_first_and_on_demand_where_spot_is_not_to_be_had(name: str) -> None:
    two_nodes = [{"CPU": 1.0}] * 20
    assert launched(name, two_nodes) == {"cpu.spot": 2}
    assert launched(name, two_nodes, unavailable=("cpu.spot",)) == {"cpu.ondemand": 2}


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("tasks", [400, 2000])
def test_work_that_avoids_gpu_nodes_starts_none_however_much_of_it_waits(name: str, tasks: int) -> None:
    assert launched(name, [{"CPU": 1.0}] * tasks, selectors=NOT_ON_GPU_NODES) == {"cpu.spot": 8, "cpu.ondemand": 8}
    types = load(name)["available_node_types"]
    assert {kind for kind, its in types.items() if its.get("labels") == {"synpref/node": "gpu"}} == {
        kind for kind in types if "GPU" in types[kind]["resources"]
    }


@pytest.mark.parametrize("name", LAUNCHERS)
def test_all_groups_may_be_up_at_once(name: str) -> None:
    config = load(name)
    assert config["max_workers"] == sum(kind["max_workers"] for kind in config["available_node_types"].values())


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("cpus_of_task", [1.0, 2.0, 6.0, 16.0])
def test_as_many_cpu_tasks_as_are_ever_asked_for_start_no_gpu_node(name: str, cpus_of_task: float) -> None:
    most = window_size({"CPU": 10**6}, RayConfig().max_cpus, cpus_of_task)
    assert most == RayConfig().max_cpus // 2 ** math.ceil(math.log2(cpus_of_task))
    beside = [{"CPU": 2.0}]  # an index in memory
    assert all(kind.startswith("cpu.") for kind in launched(name, [{"CPU": cpus_of_task}] * most + beside))


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("model", FAMILY)
def test_every_model_of_the_family_fits(name: str, model: str) -> None:
    train = family_config(model).train
    assert launched(name, [{"GPU": 1.0, "CPU": 1.0}] * train.num_workers) == {"gpu.spot": -(-train.num_workers // 8)}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_judges_of_stage_2_begin_on_one_node_and_fit_on_eight(name: str) -> None:
    for judge in (judge for judge in load_config(Stage2Config, str(CONFIGS / "stage2.yaml"), []).judges if judge.num_gpus_per_worker):
        one = {"GPU": judge.num_gpus_per_worker, "CPU": 1.0}
        assert launched(name, [one] * judge.min_workers) == {"gpu.spot": 1}
        assert launched(name, [one] * judge.num_workers) == {"gpu.spot": 8}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_spot_and_on_demand_nodes_are_otherwise_the_same(name: str, kind: str) -> None:
    types = load(name)["available_node_types"]
    spot, paid = (dict(types[f"{kind}.{market}"]["node_config"]) for market in ("spot", "ondemand"))
    spot_keys = {"aws": ["InstanceMarketOptions"], "gcp": ["scheduling"]}[name]
    assert [spot.pop(key) for key in spot_keys] != [paid.pop(key, None) for key in spot_keys]
    assert spot == paid
    assert types[f"{kind}.spot"]["resources"] == types[f"{kind}.ondemand"]["resources"]
    assert types[f"{kind}.spot"]["priority"] > types[f"{kind}.ondemand"]["priority"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_tokens_are_asked_for_on_every_node(name: str) -> None:
    config = load(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray": "~/.ray/synpref"}, "a folder of its own: what else is in ~/.ray is not for the nodes"
    assert "disabled" not in (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8")
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1], "reached through ray dashboard, an SSH tunnel"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_model_caches_are_on_a_disk_of_the_node(name: str) -> None:
    options = load(name)["docker"]["run_options"]
    places = [option.partition("=")[2] for option in options if option.startswith("--env") and "=/cache" in option]
    assert sorted(places) == ["/cache", "/cache/huggingface", "/cache/vllm"]
    assert any(option.startswith("--volume ") and option.endswith(":/cache") for option in options)


def statements(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((CLUSTER / "aws" / f"{name}.json").read_text(encoding="utf-8"))["Statement"]
    return found


@pytest.mark.parametrize("name", ["head-policy", "worker-policy"])
def test_roles_may_no_more_than_they_must(name: str) -> None:
    for statement in statements(name):
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        if statement["Resource"] == "*":  # what has no resources to name
            assert all(action.startswith("ec2:Describe") or action == "ecr:GetAuthorizationToken" for action in actions)


def test_the_head_may_only_start_and_end_nodes_of_this_cluster() -> None:
    cluster = load("aws")["cluster_name"]
    by_sid = {statement["Sid"]: statement for statement in statements("head-policy")}
    assert by_sid["LaunchWorkersOfThisClusterOnly"]["Condition"] == {"StringEquals": {f"aws:RequestTag/{TAG_RAY_CLUSTER_NAME}": cluster}}
    assert by_sid["TagAndEndNodesOfThisClusterOnly"]["Condition"] == {"StringEquals": {f"ec2:ResourceTag/{TAG_RAY_CLUSTER_NAME}": cluster}}
    profiles = {kind["node_config"]["IamInstanceProfile"]["Arn"].rsplit("/", 1)[-1] for kind in load("aws")["available_node_types"].values()}
    assert profiles == {"synpref-head", "synpref-worker"}
    assert by_sid["GiveWorkersTheirRole"]["Resource"].endswith(":role/synpref-worker")
