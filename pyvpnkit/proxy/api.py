"""VPNKit's API for the HTTP proxy (spec vpnkit 6.6), for a unix socket of its own and for the control server.

    GET  /http_proxy.json    200 and the document that holds now; 404 "None set"
    POST /http_proxy.json    200, and the document of the body holds; 400 with what is wrong with it

The document that is read can be posted again, unlike VPNKit's. It has the credentials of the proxies: for users of the host.
"""

from __future__ import annotations

import json
from typing import Final

from aiohttp import web

from netstack.errors import ConfigError
from pyvpnkit.proxy.service import HttpProxy

PATH: Final = "/http_proxy.json"


def routes(proxy: HttpProxy) -> list[web.RouteDef]:
    """Of an aiohttp application in the proxy's loop. Bodies are bounded by the application (`client_max_size`)."""

    async def get(_: web.Request) -> web.Response:
        document = proxy.document()
        if document is None:
            return web.Response(status=404, text="None set\n")
        return web.Response(text=json.dumps(document) + "\n", content_type="application/json")

    async def post(request: web.Request) -> web.Response:
        try:
            proxy.post(await request.read())
        except ConfigError as error:
            return web.Response(status=400, text=f"{error}\n")
        return web.Response()

    return [web.get(PATH, get), web.post(PATH, post), web.put(PATH, post)]
