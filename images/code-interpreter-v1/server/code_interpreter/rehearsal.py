"""Everything done once before anybody asks: what is read, allocated or worked out on first use is
there then, in each sandbox that is restored from here, and under emulation that is what takes long.
"""

from __future__ import annotations

import json
import logging

from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from code_interpreter.contexts import Contexts

_log = logging.getLogger(__name__)

#: What is done once is there; the second time shows what that left to do.
_TIMES = 2
_DEADLINE_S = 120.0
#: One of each kind of result; where a library is not there, an error.
_CODES = (
    "1 + 1",
    "print(1); None",
    "import pandas; pandas.DataFrame({'a': [1.5, 2.5], 'b': ['x', 'y']})",
    "import matplotlib.pyplot; matplotlib.pyplot.plot([1, 2], [3, 4]); matplotlib.pyplot.show()",
)


async def rehearse(web: Application, contexts: Contexts) -> None:
    """Be asked for what comes first, over a port of its own; nothing of it is left."""
    server = HTTPServer(web)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/execute"
    try:
        for _ in range(_TIMES):
            for code in _CODES:
                body = json.dumps({"code": code, "env_vars": {"REHEARSAL": "1"}})
                await AsyncHTTPClient().fetch(
                    url, method="POST", body=body, request_timeout=_DEADLINE_S
                )
    except (HTTPClientError, OSError) as error:
        _log.warning("the rehearsal was broken off: %r", error)
    finally:
        server.stop()
        await server.close_all_connections()
    await contexts.default("python").forget()
