"""`pyvpnkit run` that follows its host's network, with times short enough for tests.

    watched.py EVERY_S [mtu] PYTHON -m pyvpnkit run ...

`EVERY_S` is how often missed time is looked for; `mtu` has guests told the way out's MTU. It goes before the command line of a
daemon (`Daemon(wrap=...)`), and the process stays the daemon.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from pyvpnkit import cli, daemon  # noqa: E402
from pyvpnkit.hostnet.follow import Follow  # noqa: E402
from pyvpnkit.service import Service  # noqa: E402


def main(words: list[str]) -> int:
    every_s = float(words.pop(0))
    mtu = words[0] == "mtu"

    class Watched(Service):
        follow: Follow

        async def __aenter__(self) -> Service:
            await super().__aenter__()
            files = (self.settings.dns.resolv_conf,)
            self.follow = Follow(self.stack, self._dns.network_changed, mtu=mtu, files=files, every_s=every_s)
            self.follow.start(asyncio.get_running_loop())
            return self

        async def __aexit__(
            self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
        ) -> None:
            self.follow.close()
            await super().__aexit__(kind, error, traceback)

    daemon.Service = Watched  # type: ignore[misc]
    return cli.main(words[words.index("pyvpnkit") + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
