"""Contexts: kernels by name, each with its directory and its turn.

Each language has one that is used when none is named; it is started when it is first asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path

from code_interpreter import items, languages
from code_interpreter.items import Item
from code_interpreter.kernel import Kernel, KernelDied
from code_interpreter.languages import Change, Language
from code_interpreter.surroundings import Surroundings


class UnknownContext(Exception):
    """There is no context of that name."""


class Unusable(Exception):
    """A context cannot be made as it is asked for."""


class Context:
    """A kernel that keeps its state, and runs one piece of code after the other."""

    def __init__(self, language: Language, called: str, cwd: str) -> None:
        self.id = str(uuid.uuid4())
        #: The language as the caller named it.
        self.called = called
        self.cwd = cwd
        self._kernel = Kernel(language, cwd)
        self._language = language
        self._turn = asyncio.Lock()
        self._removed = False
        #: What its kernel was told of the sandbox.
        self._told = Surroundings()

    def describe(self) -> dict[str, str]:
        return {"id": self.id, "language": self.called, "cwd": self.cwd}

    async def start(self) -> None:
        """Start its kernel unless it runs. Raises KernelDied."""
        async with self._turn:
            await self._ensure_kernel()

    async def _ensure_kernel(self) -> None:
        if self._removed:
            raise KernelDied("the context was removed")
        if not await self._kernel.alive():
            await self._begin_anew()

    async def _begin_anew(self) -> None:
        await self._kernel.stop()
        self._kernel = Kernel(self._language, self.cwd)
        self._told = Surroundings()
        await self._kernel.start()

    async def restart(self) -> None:
        """Begin anew without the state, whatever it does just now. Raises KernelDied."""
        # Not in its turn: what runs may run for ever.
        await self._kernel.kill()
        async with self._turn:
            await self._begin_anew()

    async def stop(self) -> None:
        """End it, whatever it does just now."""
        self._removed = True
        await self._kernel.kill()
        async with self._turn:
            await self._kernel.stop()

    async def execute(
        self, code: str, envs: Mapping[str, str], here: Surroundings
    ) -> AsyncGenerator[Item, None]:
        """Run code; what it gives as it comes. `envs` are there for this code alone.

        Who stops to listen has it interrupted.
        """
        async with self._turn:
            try:
                await self._kernel.settle()
                await self._ensure_kernel()
                change = self._change(here, envs)
                if change:
                    # The code itself need not wait for the answer.
                    self._kernel.send(self._language.change(change), silent=True)
                    self._told = here
                try:
                    sent = self._kernel.send(code)
                    async with contextlib.aclosing(self._kernel.listen(sent)) as messages:
                        async for message in messages:
                            if (item := items.item_of(message)) is not None:
                                yield item
                finally:
                    if change.during:
                        with contextlib.suppress(KernelDied):
                            self._kernel.send(self._language.restore(), silent=True)
            except KernelDied as error:
                reason = f"{error}; what it knew is lost, and the next code gets a new one"
                yield items.error("KernelDied", reason)
        yield items.END

    def _change(self, here: Surroundings, envs: Mapping[str, str]) -> Change:
        """What its kernel has to be told before it runs code."""
        told = self._told
        new = {name: value for name, value in here.envs.items() if told.envs.get(name) != value}
        return Change(
            set=new,
            unset=tuple(name for name in told.envs if name not in here.envs),
            during=dict(envs),
            # One that was started here has drawn its own numbers, but may be a copy all the same.
            reseed=told.machine_id != here.machine_id,
        )

    async def forget(self) -> None:
        """Know nothing any more of what was run so far; the kernel stays. Raises KernelDied."""
        sent = self._kernel.send(languages.FORGET, silent=True)
        async with contextlib.aclosing(self._kernel.listen(sent)) as messages:
            async for _ in messages:
                pass


class Contexts:
    """All contexts of a sandbox."""

    def __init__(self, home: str) -> None:
        self._home = home
        self._contexts: dict[str, Context] = {}
        #: Of each language, the one that is used when none is named.
        self._defaults: dict[str, Context] = {}

    def all(self) -> list[Context]:
        return list(self._contexts.values())

    def get(self, context_id: str) -> Context:
        """Raises UnknownContext."""
        context = self._contexts.get(context_id)
        if context is None:
            raise UnknownContext(f"Context {context_id[:80]} not found")
        return context

    def default(self, called: str) -> Context:
        """The context of a language. Raises UnknownLanguage."""
        language = languages.find(called)
        if language.name not in self._defaults:
            self._defaults[language.name] = self._new(language, language.name, self._home)
        return self._defaults[language.name]

    def _new(self, language: Language, called: str, cwd: str) -> Context:
        context = Context(language, called, cwd)
        self._contexts[context.id] = context
        return context

    async def create(self, called: str, cwd: str) -> Context:
        """A new context. Raises UnknownLanguage, Unusable, KernelDied."""
        language = languages.find(called)
        context = self._new(language, called, _directory(self._home, cwd))
        try:
            await context.start()
        except BaseException:
            await self.remove(context.id)
            raise
        return context

    async def remove(self, context_id: str) -> None:
        """End a context. Raises UnknownContext."""
        context = self.get(context_id)
        del self._contexts[context_id]
        self._defaults = {k: each for k, each in self._defaults.items() if each is not context}
        await context.stop()

    async def close(self) -> None:
        """End them all."""
        await asyncio.gather(*(context.stop() for context in self.all()))
        self._contexts.clear()
        self._defaults.clear()


def _directory(home: str, cwd: str) -> str:
    """A directory that is named as a shell would. Raises Unusable."""
    if cwd == "~" or cwd.startswith("~/"):
        cwd = home + cwd[1:]
    directory = Path(home, cwd)
    if not directory.is_dir() or not os.access(directory, os.X_OK):
        raise Unusable(f"cwd {cwd[:200]!r} is not a directory that can be entered")
    return os.fspath(directory)
