"""Settings of the whole test session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: several ranks share the cores

import pytest  # noqa: E402

from tests.ranks import close_pools  # noqa: E402

# Files that take longest begin first, so that the workers end together.
LONGEST = "layouts scripts plan ilql kernels_compiled order zero faults reward_model stories".split()


def pytest_xdist_auto_num_workers(config):
    """Two for the whole suite; files or tests that the command names run in the process itself, where --pdb works."""
    return 2 if all(map(os.path.isdir, config.option.file_or_dir)) else 0


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def rank_pools():
    """Ends the ranks that this worker's tests have started."""
    yield
    close_pools()
