"""The built-in templates on real VMs: each boots and does what it is there for."""

from __future__ import annotations

import pytest

from sandmartin.client.sandbox import AsyncSandbox
from tests.vm.conftest import RunningAgent, execute

pytestmark = pytest.mark.timeout(300)


async def said(sandbox: AsyncSandbox, script: str, *, user: str = "user") -> str:
    """What a script of the shell says; it must succeed."""
    done = await execute(sandbox, "/bin/sh", "-ec", script, user=user, timeout_s=120)
    assert done.exit_code == 0, (done.text, done.stderr.decode(errors="replace"), done.error)
    return done.text


@pytest.mark.template("minimal")
async def test_minimal_has_a_shell_and_certificates_and_little_else(agent: RunningAgent) -> None:
    async with agent.sandbox(template="minimal") as sandbox:
        assert (await sandbox.info()).memory_mb == 128
        assert await said(sandbox, "id -un; pwd; hostname") == (
            f"user\n/home/user\n{sandbox.sandbox_id}\n"
        )
        assert await said(sandbox, "echo words >kept; wc -c <kept; ls -ld kept | cut -c1-10") == (
            "6\n-rw-r--r--\n"
        )
        assert int(await said(sandbox, "grep -c BEGIN /etc/ssl/certs/ca-certificates.crt")) > 100
        # Static: nothing in it needs a library, and neither apt nor bash is there.
        assert await said(
            sandbox, "ls /lib /usr/lib /usr/bin/apt /bin/bash 2>/dev/null || echo"
        ) == ("\n")
        assert (
            int(await said(sandbox, "du -sk /usr /etc /home | awk '{n+=$1} END {print n}'")) < 4096
        )
        content = [chunk async for chunk in sandbox.read_file("/home/user/kept")]
        assert b"".join(content) == b"words\n"
        await agent.transport.pause(sandbox.sandbox_id)
        await agent.transport.resume(sandbox.sandbox_id, None)
        assert await said(sandbox, "cat /home/user/kept; id -un", user="root") == "words\nroot\n"


_EXTENSION = r"""
mkdir built && cd built
cat >answer.c <<'END'
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *args) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "answer", "", -1, methods};
PyMODINIT_FUNC PyInit_answer(void) { return PyModule_Create(&module); }
END
gcc -shared -fPIC $(pkg-config --cflags python3) answer.c -o answer.so
python -c 'import answer; print(answer.answer())'
"""


@pytest.mark.full
@pytest.mark.template("python311")
async def test_python_installs_and_builds(agent: RunningAgent) -> None:
    async with agent.sandbox(template="python311") as sandbox:
        assert (await said(sandbox, "python --version; python3 --version")).split() == [
            *("Python", "3.11.2"),
            *("Python", "3.11.2"),
        ]
        assert await said(sandbox, _EXTENSION) == "42\n"
        # A package of our own, without a network: as the user, and in an environment.
        project = (
            "mkdir -p own && cd own && echo 'value = 7' >own.py && printf '%s\n' "
            "'from setuptools import setup' 'setup(name=\"own\", py_modules=[\"own\"])' >setup.py"
        )
        await said(sandbox, project)
        install = "install --quiet --no-index --no-build-isolation --no-warn-script-location ."
        await said(sandbox, f"cd own && pip {install}")
        assert await said(sandbox, "cd / && python -c 'import own; print(own.value)'") == "7\n"
        await said(sandbox, "python -m venv env && env/bin/pip --version")


@pytest.mark.full
@pytest.mark.template("node")
async def test_node_serves_and_npm_installs(agent: RunningAgent) -> None:
    async with agent.sandbox(template="node") as sandbox:
        assert (await sandbox.info()).memory_mb == 1024
        version = await said(sandbox, "node --version")
        assert int(version.lstrip("v").partition(".")[0]) >= 22, version
        served = (
            "const server = require('http').createServer((_, r) => r.end('served'))\n"
            "server.listen(0, async () => {\n"
            "  const answer = await fetch(`http://127.0.0.1:${server.address().port}`)\n"
            "  console.log(await answer.text()); server.close() })\n"
        )
        assert await said(sandbox, f"node -e \"$(cat <<'END'\n{served}END\n)\"") == "served\n"
        packed = (
            "mkdir -p own app && cd own && npm init -y >/dev/null && echo 'module.exports = 7' "
            ">index.js && npm pack --silent >/dev/null && cd ../app && npm init -y >/dev/null && "
            "npm install --silent --offline ../own/own-1.0.0.tgz && node -p 'require(\"own\")'"
        )
        assert await said(sandbox, packed) == "7\n"
        assert await said(sandbox, "npx --version | cut -d. -f1; command -v npm") != ""
