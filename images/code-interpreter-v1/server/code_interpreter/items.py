"""What a kernel says, in the words of the protocol: one JSON object for each thing told."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

Item = dict[str, Any]

_MAIN_TYPES = {
    "text/plain": "text",
    "text/html": "html",
    "text/markdown": "markdown",
    "image/svg+xml": "svg",
    "image/png": "png",
    "image/jpeg": "jpeg",
    "application/pdf": "pdf",
    "text/latex": "latex",
    "application/json": "json",
    "application/javascript": "javascript",
    "e2b/data": "data",
    "e2b/chart": "chart",
}

KEEPALIVE: Item = {"type": "keepalive"}
END: Item = {"type": "end_of_execution"}


def item_of(message: Mapping[str, Any]) -> Item | None:
    """The item that a message of a kernel is told as; None for what nobody is told."""
    content = message["content"]
    match message["msg_type"]:
        case "stream":
            return output(content["name"], content["text"])
        case "execute_input":
            return {
                "type": "number_of_executions",
                "execution_count": content["execution_count"],
            }
        case "execute_result":
            return _result(content["data"], main=True)
        case "display_data" | "update_display_data":
            return _result(content["data"], main=False)
        case "error":
            # A shell's errors are only numbers.
            name = content["ename"] or "ExitStatus"
            return error(name, content["evalue"], "\n".join(content["traceback"]))
    return None


def output(stream: str, text: str) -> Item:
    """Something written to `stdout` or `stderr`."""
    return {"type": stream, "text": text, "timestamp": time.time_ns()}


def error(name: str, value: str, traceback: str = "") -> Item:
    return {"type": "error", "name": name, "value": value, "traceback": traceback}


def _result(data: Mapping[str, Any], *, main: bool) -> Item:
    item: Item = {"type": "result", "is_main_result": main}
    extra = {}
    for mime, value in data.items():
        # The format lets long texts be lists of lines.
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "".join(value)
        if (key := _MAIN_TYPES.get(mime)) is None:
            extra[mime] = value
        else:
            item[key] = value
    if "text" in item:
        item["text"] = _unquoted(item["text"])
    if extra:
        item["extra"] = extra
    return item


def _unquoted(text: str) -> str:
    """A text without one pair of quotes around it: of a string itself is wanted."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text
