"""Blocking faces of asynchronous things, made from these and typed as these are.

A class says of each method from which it is made, and nothing twice:

    class Commands(Facade[AsyncCommands]):
        kill = blocking(AsyncCommands.kill)

Documentation, signature and errors are those of the original.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from sandmartin.client.portal import Callback, portal

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Inner = TypeVar("_Inner")
_Outer = TypeVar("_Outer")


class Facade(Generic[_Inner]):
    """The blocking face of one asynchronous thing."""

    def __init__(self, inner: _Inner) -> None:
        self._inner = inner

    def __repr__(self) -> str:
        return repr(self._inner).replace("Async", "", 1)


def blocking(
    method: Callable[Concatenate[_Inner, _P], Coroutine[Any, Any, _R]],
) -> Callable[Concatenate[Facade[_Inner], _P], _R]:
    """`method` for whoever waits for its end."""
    return wrapping(method, _as_it_is)


def wrapping(
    method: Callable[Concatenate[_Inner, _P], Coroutine[Any, Any, _R]],
    outer: Callable[[_R], _Outer],
) -> Callable[Concatenate[Facade[_Inner], _P], _Outer]:
    """The same, and what it gives has a face of its own, which `outer` makes."""

    @functools.wraps(method)
    def wait(self: Facade[_Inner], /, *args: _P.args, **kwargs: _P.kwargs) -> _Outer:
        return outer(_wait(functools.partial(method, self._inner), *args, **kwargs))

    return wait


def making(
    method: Callable[_P, Coroutine[Any, Any, _R]], outer: Callable[[_R], _Outer]
) -> Callable[_P, _Outer]:
    """A way to make a thing, for a class whose face is made by `outer`."""

    @functools.wraps(method)
    def wait(*args: _P.args, **kwargs: _P.kwargs) -> _Outer:
        return outer(_wait(method, *args, **kwargs))

    return wait


def iterating(
    method: Callable[Concatenate[_Inner, _P], AsyncIterator[_R]],
) -> Callable[Concatenate[Facade[_Inner], _P], Iterator[_R]]:
    """What gives things one after the other, for whoever waits for each."""

    @functools.wraps(method)
    def iterate(self: Facade[_Inner], /, *args: _P.args, **kwargs: _P.kwargs) -> Iterator[_R]:
        return portal().iterate(lambda: method(self._inner, *args, **kwargs))

    return iterate


def iterating_all(
    method: Callable[_P, AsyncIterator[_R]],
) -> Callable[_P, Iterator[_R]]:
    """The same for what belongs to a class."""

    @functools.wraps(method)
    def iterate(*args: _P.args, **kwargs: _P.kwargs) -> Iterator[_R]:
        return portal().iterate(lambda: method(*args, **kwargs))

    return iterate


def _wait(method: Callable[..., Coroutine[Any, Any, _R]], /, *args: object, **kwargs: object) -> _R:
    """Do it on the portal. The caller's functions, whose names begin with `on_`, run here."""

    async def work(callback: Callback) -> _R:
        for name, value in kwargs.items():
            if name.startswith("on_") and callable(value):
                kwargs[name] = callback(value)
        return await method(*args, **kwargs)

    return portal().call(work)


def _as_it_is(result: _R) -> _R:
    return result
