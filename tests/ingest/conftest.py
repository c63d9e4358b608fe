"""Sources and files for the ingest tests."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real human pairs beside the checkout."""
    if not (SHARED_DATA / "hh_rlhf" / "train.parquet").is_file():
        pytest.skip(f"the real data is not here: no {SHARED_DATA}/hh_rlhf/train.parquet")
    return SHARED_DATA
