"""Settings of the whole test session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several ranks share the cores

import pytest  # noqa: E402

from tests.ranks import close_pools  # noqa: E402

# Files that take longest begin first, so that the workers end together.
LONGEST = ("test_scripts.py", "test_layouts.py", "test_reward_model.py", "test_ilql.py", "test_faults.py")


def pytest_xdist_auto_num_workers(config):
    """Two for the whole suite; files or tests that the command names run in the process itself, where --pdb works."""
    return 0 if config.option.file_or_dir else 2


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def rank_pools():
    """Ends the ranks that this worker's tests have started."""
    yield
    close_pools()
