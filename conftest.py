"""What pytest reads first: `pytest test_all.py` runs tests/ too; fixtures: tests/common.py."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"     # one process a core, or threads wait for each other

pytest.register_assert_rewrite("tests.common")
pytest_plugins = ["tests.common"]


def pytest_configure(config):
    if config.args == ["test_all.py"]:
        config.args.append("tests")
