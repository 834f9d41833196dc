"""The suite itself is run as it is meant to be."""

from __future__ import annotations

import os

import pytest


@pytest.mark.ray
def test_tests_that_start_ray_are_on_one_worker(request: pytest.FixtureRequest) -> None:
    """Groups of pytest-xdist show in the names of tests; without them two Rays start at once."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("all tests are in one process")
    assert request.node.nodeid.endswith("@ray")
