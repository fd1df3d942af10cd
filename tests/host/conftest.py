"""Drills here use the fixtures of `tests.support.plugin`."""

from tests.support.plugin import d, drill, pytest_runtest_makereport

__all__ = ["d", "drill", "pytest_runtest_makereport"]
