"""Text for terminals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any


def clean(value: object) -> str:
    """Text that does nothing to a terminal: control characters are written as escapes."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(value))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Columns as wide as they need be; numbers to the right."""
    shown = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *shown, strict=True)]
    right = [all(_is_number(cell) for cell in column) for column in zip(*shown, strict=True)] or [False] * len(heads)
    for row in [list(heads), *shown]:
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _is_number(text: str) -> bool:
    return text[:1].isdigit() and not set(text) - set("0123456789.KMGT s")


def print_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, indent=1))


def octets(count: float) -> str:
    """`1.5M`."""
    for unit in ("", "K", "M", "G"):
        if count < 1024:
            return f"{count:.0f}{unit}" if not unit or count >= 10 else f"{count:.1f}{unit}"
        count /= 1024
    return f"{count:.1f}T"


def seconds(count: float) -> str:
    """`3.2s`, `12m`, `5h`."""
    if count < 60:
        return f"{count:.1f}s" if count < 10 else f"{count:.0f}s"
    if count < 3600:
        return f"{count / 60:.0f}m"
    return f"{count / 3600:.0f}h" if count < 86400 * 2 else f"{count / 86400:.0f}d"
