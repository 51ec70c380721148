"""How tests run. What needs torch is in `shared_fixtures`."""

from __future__ import annotations

import gc

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """No garbage is collected while modules are imported and tests run, but after each file (see `shared_fixtures`).

    The process that only hands tests to others would take five seconds to import what it has no use for.
    """
    gc.disable()
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out:
        config.pluginmanager.import_plugin("shared_fixtures")
