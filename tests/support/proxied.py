"""`python proxied.py COMMAND ...`: runs pyvpnkit with an HTTP proxy beside it, told by PROXY_FILE and PROXY_API.

COMMAND is the command line of `pyvpnkit run`; its interpreter and module are ours already.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import TracebackType

sys.path.insert(0, str(Path(__file__).parents[2]))

from aiohttp import web

from pyvpnkit import cli, daemon
from pyvpnkit.proxy.api import routes
from pyvpnkit.proxy.service import HttpProxy
from pyvpnkit.service import Service


class Proxied(Service):
    """A service with an HTTP proxy."""

    _more: contextlib.AsyncExitStack

    async def __aenter__(self) -> Proxied:
        async with contextlib.AsyncExitStack() as undo:
            await super().__aenter__()
            undo.push_async_exit(super().__aexit__)
            proxy = HttpProxy(
                self.stack,
                self.settings.network,
                path=os.environ.get("PROXY_FILE"),
                environment=os.environ if "PROXY_ENV" in os.environ else None,
            )
            proxy.start()
            undo.push_async_callback(proxy.close)
            if "PROXY_API" in os.environ:
                app = web.Application()
                app.add_routes(routes(proxy))
                runner = web.AppRunner(app, access_log=None)
                await runner.setup()
                undo.push_async_callback(runner.cleanup)
                await web.UnixSite(runner, os.environ["PROXY_API"]).start()
            self._more = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._more.aclose()


if __name__ == "__main__":
    assert sys.argv[2:4] == ["-m", "pyvpnkit"], sys.argv
    daemon.Service = Proxied  # type: ignore[misc]
    raise SystemExit(cli.main(sys.argv[4:]))
