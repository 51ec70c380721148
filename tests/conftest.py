"""How tests run. What needs torch is in `shared_fixtures`."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """The process that only hands tests to others takes five seconds to import what it has no use for."""
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("shared_fixtures")
