"""The manual, the parser and the settings say the same."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyvpnkit import cli, manual
from pyvpnkit.config import OPTIONS

PAGE = Path(__file__).parents[2] / "docs" / "manual.md"
OF_THE_COMMAND_ONLY = {"--config", "--ready-fd", "--help", "-h"}


def flags_of(command: str) -> set[str]:
    (commands,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {flag for action in commands.choices[command]._actions for flag in action.option_strings}


def test_the_manual_is_what_the_definitions_say() -> None:
    page = PAGE.read_text()
    assert page == manual.renewed(page), "run `make manual`"


def test_run_takes_every_option_and_no_other() -> None:
    defined = {flag for option in OPTIONS for flag in option.flags}
    assert flags_of("run") - OF_THE_COMMAND_ONLY == defined


def test_shell_takes_every_option_that_concerns_a_guest() -> None:
    missing = flags_of("run") - flags_of("shell")
    assert missing == {"--link", "--pid-file", "--user", "--ready-fd"}


def test_every_command_is_in_the_manual() -> None:
    page = PAGE.read_text()
    (commands,) = (action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices:
        assert f"`pyvpnkit {command}" in page
    assert "--ready-fd" in page
