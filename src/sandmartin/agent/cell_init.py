"""`python -I -S cell_init.py < ORDER`: the first process of a cell, which becomes its program.

Started as root by `agent/cell.py`; what it is to do comes as JSON on its standard input, so that
no secret is in a command line. It stands alone: nothing but the standard library is imported, as
it may be started where the package cannot be found.

Two children are between us and the program. The first leaves for its namespaces and is given its
range of users by us; the second is the first process of a namespace of processes, so that nothing
of a program outlives it. Each ends with the one above it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import stat
import sys
from collections.abc import Mapping
from typing import Any

#: The program could not be started; it says why on standard error.
NOT_STARTED = 125

_NEWNS, _NEWUTS, _NEWIPC = 0x20000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_BIND, _REC, _PRIVATE = 0x1000, 0x4000, 0x40000
_DETACH = 2
_SET_PDEATHSIG, _CAPBSET_DROP, _SET_NO_NEW_PRIVS = 1, 24, 38
_PIVOT_ROOT = 155  # on x86_64, the one architecture there is
#: chown, dac_override, fowner, fsetid and setfcap: what unpacking and reading a tree takes.
_KEPT = {0, 1, 3, 4, 31}
_IDS = 65536
#: Sandboxes come first.
_NICE = 10
#: What programs are made of; in another root each is what it is here.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
_CONFIGURATION = (
    *("/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/alternatives", "/etc/ld.so.cache"),
    *("/etc/mke2fs.conf", "/etc/containers", "/etc/docker/certs.d"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    # Nothing outlives an agent that is killed either.
    _end_with_parent()
    order: Mapping[str, Any] = json.load(sys.stdin)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        _guarded(lambda: _leave(order, ready[1], go[0]))
    os.close(ready[1])
    if os.read(ready[0], 1):
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write(f"0 {order['uid']} {_IDS}")
        os.write(go[1], b"x")
    return _wait(child)


def _leave(order: Mapping[str, Any], ready: int, go: int) -> int:
    """Be root of namespaces, where that is nobody of ours, and wait for the program."""
    network = order["network"]
    if network is not None:
        handle = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
        _call("setns", handle, _NEWNET)
    apart = 0 if network is not None else _NEWNET
    _call("unshare", _NEWUSER | _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | apart)
    os.write(ready, b"x")
    os.read(go, 1)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    _end_with_parent()
    program = os.fork()
    if program == 0:
        _guarded(lambda: _become(order))
    return _wait(program)


def _end_with_parent() -> None:
    # After the change of user, which would undo it.
    parent = os.getppid()
    _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(NOT_STARTED)


def _become(order: Mapping[str, Any]) -> int:
    _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _enter_root(order["work"], order["files"])
    for name, limit in order["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    for capability in range(_last_capability() + 1):
        if capability not in _KEPT:
            _call("prctl", _CAPBSET_DROP, capability, 0, 0, 0)
    _call("prctl", _SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    os.nice(_NICE)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.umask(0o022)
    os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606
    return NOT_STARTED


def _enter_root(work: str, files: Mapping[str, str]) -> None:
    """A root of its own: the system's programs, and one directory of this host's."""
    _call("mount", b"none", b"/", None, _REC | _PRIVATE, None)
    # Opened before anything hides it.
    kept = os.open(work, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    root = "/tmp"  # noqa: S108  # its own from here on
    _call("mount", b"tmpfs", os.fsencode(root), b"tmpfs", 0, b"size=64m,mode=755")
    for path in (*_SYSTEM, *_CONFIGURATION, *_DEVICES):
        _have(path, root)
    os.makedirs(root + work, exist_ok=True)
    _call("mount", f"/proc/self/fd/{kept}".encode(), os.fsencode(root + work), None, _BIND, None)
    for name in ("proc", "run", "tmp"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    _mount_proc(root)
    for name, content in files.items():
        with open(f"{root}/run/{name}", "x", opener=_private) as file:
            file.write(content)
    os.chdir(root)
    # The old root is put over the new one, and taken off (pivot_root(2)).
    _call("syscall", _PIVOT_ROOT, b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir(work)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _have(path: str, root: str) -> None:
    """Have something of the system's in the new root, if it is there."""
    try:
        kind = stat.S_IFMT(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    target = root + path
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if kind == stat.S_IFLNK:
        os.symlink(os.readlink(path), target)
        return
    if kind == stat.S_IFDIR:
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _call("mount", os.fsencode(path), os.fsencode(target), None, _BIND | _REC, None)


def _mount_proc(root: str) -> None:
    target = os.fsencode(f"{root}/proc")
    try:
        _call("mount", b"proc", target, b"proc", 0, None)
    except PermissionError:
        # In a container whose own is covered in part a new one is refused.
        _call("mount", b"/proc", target, None, _BIND | _REC, None)


def _last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _guarded(work: Any) -> None:
    """End as `work` says, or tell why it could not."""
    try:
        os._exit(work())
    except BaseException as error:  # noqa: BLE001  # a child must never return into its parent's code
        os.write(2, f"{error}\n".encode())
        os._exit(NOT_STARTED)


def _call(function: str, *arguments: Any) -> None:
    if _libc[function](*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


if __name__ == "__main__":
    _guarded(main)
