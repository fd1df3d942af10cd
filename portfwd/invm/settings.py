"""Where the host is asked for ports: `vpnkit-expose-port.yaml` (json, toml) in /etc or the current directory (spec vpnkit 1.3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from netstack.errors import ConfigError

PLACES: Final = ("/etc", ".")
NAME: Final = "vpnkit-expose-port"
ENDINGS: Final = ("json", "toml", "yaml", "yml")


def control_setting(places: Sequence[str] = PLACES) -> str:
    """The value of `control` in the first file there is; empty where there is no file. Raises `ConfigError`."""
    for place in places:
        for ending in ENDINGS:
            path = os.path.join(place, f"{NAME}.{ending}")
            try:
                with open(path, encoding="utf-8") as file:
                    text = file.read()
            except FileNotFoundError:
                continue
            except (OSError, UnicodeError) as error:
                raise ConfigError(f"{path}: cannot be read: {error}") from None
            return _control(path, _parsed(path, ending, text))
    return ""


def _parsed(path: str, ending: str, text: str) -> Any:
    try:
        match ending:
            case "json":
                import json

                return json.loads(text)
            case "toml":
                import tomllib

                return tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        import yaml
    except ImportError:
        raise ConfigError(f"{path}: PyYAML is not installed here; write {NAME}.json or .toml instead") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _control(path: str, document: Any) -> str:
    found = document.get("control") if isinstance(document, dict) else None
    if found is None:
        return ""
    # VPNKit takes a string only; 4098 without quotes can mean nothing else.
    if not isinstance(found, (str, int)) or isinstance(found, bool) or found == "":
        raise ConfigError(
            f'{path}: control: {found!r} is no address; write control: "4098" or control: /run/control.sock'
        )
    return str(found)
