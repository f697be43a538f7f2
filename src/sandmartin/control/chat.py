"""Messages to chat services, by the `apprise` library, in a child process of its own.

The library makes its own connections, so the child reaches the world through our guarded proxy
alone. Addresses come from users: only services that speak HTTP are allowed, and only options that
read no file. The child gets address and text on its standard input, never in its arguments, and
answers with its exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from urllib.parse import parse_qsl, quote, urlsplit

from sandmartin.control.guarded import Outgoing
from sandmartin.errors import Invalid, Unavailable

_DEADLINE_S = 30.0
_SENT, _REFUSED, _UNKNOWN = 0, 3, 4
#: Services of the generic kind: each of them asks over HTTP and nothing else.
SCHEMES = frozenset(
    {
        *("discord", "gchat", "gotify", "gotifys", "lark", "matrix", "matrixs", "mmost", "mmosts"),
        *("ntfy", "ntfys", "opsgenie", "pagerduty", "pover", "rocket", "rockets", "slack"),
        *("tgram", "workflows", "zulip"),
    }
)
#: Options that change how a message looks; others may read files or loosen TLS.
_OPTIONS = frozenset(["format", "priority", "tags", "click", "avatar", "footer", "mode"])
_MAX_URL = 2000


def _pattern(pattern: str, hint: str, options: str = "") -> Callable[[Mapping[str, str]], str]:
    compiled, allowed = re.compile(pattern), frozenset(options.split())

    def url_of(config: Mapping[str, str]) -> str:
        url = _field(config, "url")
        if not compiled.fullmatch(url):
            raise Invalid("the address is none of this service", hint=f"use {hint}")
        _check_options(urlsplit(url).query, allowed)
        return url

    return url_of


def _check_options(query: str, allowed: frozenset[str]) -> None:
    for name, _ in parse_qsl(query, keep_blank_values=True):
        if name.lower() not in allowed:
            raise Invalid(
                f"the option {name[:20]!r} cannot be used",
                hint=f"use one of {', '.join(sorted(allowed))}",
            )


def _field(config: Mapping[str, str], name: str) -> str:
    value = config.get(name, "")
    if not value or len(value) > _MAX_URL or any(char.isspace() for char in value):
        raise Invalid(f"the channel's config needs {name!r}", hint="see docs/operations.md")
    return value


def _telegram(config: Mapping[str, str]) -> str:
    token = _field(config, "bot_token")
    if not re.fullmatch(r"[0-9]{5,20}:[A-Za-z0-9_-]{10,100}", token):
        raise Invalid("bot_token is none", hint="use the token that @BotFather gave")
    return f"tgram://{token}/{quote(_field(config, 'chat_id'), safe='')}/"


def _matrix(config: Mapping[str, str]) -> str:
    server = urlsplit(_field(config, "homeserver"))
    if server.scheme != "https" or not server.hostname or server.username:
        raise Invalid("homeserver is no address", hint="use https://HOST")
    room, token = _field(config, "room_id"), _field(config, "access_token")
    return f"matrixs://{quote(token, safe='')}@{server.netloc}/{quote(room, safe='')}"


def _generic(config: Mapping[str, str]) -> str:
    url = _field(config, "url")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise Invalid("the address cannot be read") from error
    if parts.scheme.lower() not in SCHEMES:
        raise Invalid(
            f"the service {parts.scheme[:20]!r} cannot be used",
            hint=f"use one of {', '.join(sorted(SCHEMES))}",
        )
    _check_options(parts.query, _OPTIONS)
    return url


#: How each kind of channel says where a message goes.
KINDS: Mapping[str, Callable[[Mapping[str, str]], str]] = {
    "slack": _pattern(
        r"https://hooks\.slack\.com/services/[A-Za-z0-9/]{10,200}",
        "https://hooks.slack.com/services/…",
    ),
    "discord": _pattern(
        r"https://(discord|discordapp)\.com/api/webhooks/[0-9]+/[A-Za-z0-9_-]+",
        "https://discord.com/api/webhooks/…",
    ),
    "teams": _pattern(
        r"https://[a-z0-9.-]+\.(logic\.azure\.com|powerplatform\.com)(:443)?/[^\s]+",
        "the address of a workflow, https://….logic.azure.com/…",
        "api-version sp sv sig",
    ),
    "googlechat": _pattern(
        r"https://chat\.googleapis\.com/v1/spaces/[^\s]+",
        "https://chat.googleapis.com/v1/spaces/…",
        "key token",
    ),
    "telegram": _telegram,
    "matrix": _matrix,
    "apprise": _generic,
}


async def send(outgoing: Outgoing, url: str, title: str, body: str) -> None:
    """Send a message. Raises Unavailable when it did not arrive, Invalid for no address at all."""
    async with outgoing.proxy() as proxy:
        code = await _run({"url": url, "title": title, "body": body}, proxy)
    if code == _UNKNOWN:
        raise Invalid("the chat service cannot be told from the address")
    if code != _SENT:
        raise Unavailable("the chat service did not take the message")


async def _run(message: Mapping[str, str], proxy: str) -> int:
    # Nothing of our own environment: a message's sender needs none of it.
    environment = {
        "PATH": os.defpath,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        **dict.fromkeys(("http_proxy", "https_proxy"), proxy),
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sandmartin.control.chat",
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        # What it says may hold the address.
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await child.communicate(json.dumps(message).encode())
    except TimeoutError as error:
        raise Unavailable(f"the chat service did not answer within {_DEADLINE_S:g} s") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    return child.returncode or 0


def _main() -> int:
    """The child: send what stands on standard input."""
    import apprise  # noqa: PLC0415 - slow, and only the child needs it.

    message = json.load(sys.stdin)
    asset = apprise.AppriseAsset(
        http_redirects=False, storage_mode=apprise.PersistentStoreMode.MEMORY, plugin_paths=[]
    )
    service = apprise.Apprise.instantiate(message["url"], asset=asset, suppress_exceptions=True)
    if service is None:
        return _UNKNOWN
    sender = apprise.Apprise(asset=asset)
    sender.add(service)
    sent = sender.notify(title=message["title"], body=message["body"], interpret_escapes=False)
    return _SENT if sent else _REFUSED


if __name__ == "__main__":
    sys.exit(_main())
