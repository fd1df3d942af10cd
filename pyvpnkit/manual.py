"""Writes the settings part of docs/manual.md from the definitions: `python -m pyvpnkit.manual docs/manual.md`.

What stands between the two marks belongs to this module; the rest of the page is written by hand.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from pyvpnkit import config
from pyvpnkit.config import OPTIONS, Option

BEGIN: Final = "<!-- settings: written by pyvpnkit.manual, do not edit -->"
END: Final = "<!-- end of settings -->"

TITLES: Final = {
    "": "Links, ports, process",
    "network": "The network",
    "limits": "Limits",
    "timeouts": "Times",
    "capture": "Capture",
    "dns": "Name resolution",
    "http_proxy": "HTTP proxy",
    "control": "Control API",
    "vpnkit": "VPNKit's sockets and files",
}


def paragraph(option: Option) -> str:
    """One option: key, flags, form, meaning, default, example."""
    flags = ", ".join(f"`{flag} {option.metavar}`" for flag in option.flags)
    facts = [f"default: `{config.default_text(option)}`", f"example: `{option.flags[-1]} {option.example}`"]
    if option.pairs:
        left, _, right = option.example.partition("=")
        facts.append(f"in the file: `{option.name}: {{'{left}': {right}}}`")
    elif option.many:
        facts.append(f"a list, in the file: `{option.name}: [{option.example}]`; the flag may be repeated")
    if option.reload:
        facts.append("taken over on SIGHUP")
    return f"**`{option.key}`** · {flags}  \n{config.documentation(option)}  \n{'; '.join(facts)}.\n"


def settings() -> str:
    """All options, by section."""
    parts = []
    for section, title in TITLES.items():
        where = f"under `{section}:`" if section else "at the top of the file"
        parts.append(f"### {title} ({where})\n")
        parts += [paragraph(option) for option in OPTIONS if option.section == section]
    return "\n".join(parts)


def renewed(page: str) -> str:
    """`page` with its settings part as the definitions say."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{settings()}\n{END}{after}"


if __name__ == "__main__":
    manual = Path(sys.argv[1])
    manual.write_text(renewed(manual.read_text()))
