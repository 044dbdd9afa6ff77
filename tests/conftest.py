"""Settings of the whole test session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several ranks share the cores

import pytest  # noqa: E402

from tests.ranks import close_pools  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def rank_pools():
    """Ends the ranks that tests have started."""
    yield
    close_pools()
