"""What holds for every test: our `dns` before dnspython's, no test skipped behind CI's back, and who may run at once."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import netstack  # noqa: F401  # first: it makes our `dns` importable beside dnspython's

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

EXPECTED = "expected:"
"""A skip whose reason begins so is right on this kind of machine (another operating system, say)."""


# Who is started in the background of a shell has SIGINT and SIGQUIT ignored, and so would have every program of the tests.
for _number in (signal.SIGINT, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL)


_ONE_AT_A_TIME = ("tests/kernel/", "tests/qemu/")
"""Tests that want a processor or two for themselves, with a kernel's time-outs or a whole machine's boot."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Of `pytest -n`: the tests of one file run in one process, as do all that boot something; the rest runs beside them."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "machines" if nodeid.startswith(_ONE_AT_A_TIME) else nodeid.partition("::")[0]

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _log_levels() -> Iterator[None]:
    """A test that runs a program's start in this process, or a fuzzer, leaves the next one's log as it was."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("pyvpnkit", "pyvpnkit.dns", "asyncio"))]
    before = [(logger, logger.level, logger.disabled) for logger in loggers]
    yield
    for logger, level, disabled in before:
        logger.setLevel(level)
        logger.disabled = disabled


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def _unexpected(reporter: object) -> list[str]:
    stats = getattr(reporter, "stats", {})
    skipped = [(report.nodeid, _reason(report)) for report in stats.get("skipped", ())]
    return [f"{name}: {reason}" for name, reason in skipped if not reason.startswith(EXPECTED)]


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if in_ci() and exitstatus == pytest.ExitCode.OK:
        if _unexpected(session.config.pluginmanager.get_plugin("terminalreporter")):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unexpected = _unexpected(terminalreporter) if in_ci() else []
    if unexpected:
        terminalreporter.section("skipped, which CI does not allow", red=True)
        for line in unexpected:
            terminalreporter.line(line)
