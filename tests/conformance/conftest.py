"""Drills here use the fixtures of `tests.support.plugin`."""

from tests.support.plugin import d, direction, drill, established, pytest_runtest_makereport

__all__ = ["d", "direction", "drill", "established", "pytest_runtest_makereport"]
