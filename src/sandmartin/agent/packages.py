"""The programs of the host that Sandmartin relies on, and the packages that bring them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sandmartin.agent import proc
from sandmartin.errors import ToolFailed

_INSTALL_DEADLINE_S = 1200.0
_LOCK_WAIT = ["-o", "DPkg::Lock::Timeout=300"]


@dataclass(frozen=True)
class Package:
    """A Debian or Ubuntu package, and a program or an absolute path that proves its presence."""

    name: str
    proof: str

    def present(self) -> bool:
        if self.proof.startswith("/"):
            return Path(self.proof).exists()
        return shutil.which(self.proof, path=proc.clean_environment()["PATH"]) is not None


PACKAGES = (
    Package("qemu-system-x86", "qemu-system-x86_64"),
    Package("qemu-utils", "qemu-img"),
    Package("seabios", "/usr/share/seabios/bios-256k.bin"),
    Package("e2fsprogs", "mke2fs"),
    Package("iproute2", "ip"),
    Package("nftables", "nft"),
    Package("conntrack", "conntrack"),
    Package("mmdebstrap", "mmdebstrap"),
    Package("util-linux", "setpriv"),
    Package("util-linux", "nsenter"),
    Package("dpkg", "dpkg-deb"),
    Package("kmod", "depmod"),
    # By which OCI images are taken in.
    Package("skopeo", "skopeo"),
    Package("umoci", "umoci"),
    # Debian's suites are verified on Ubuntu too.
    Package("debian-archive-keyring", "/usr/share/keyrings/debian-archive-keyring.gpg"),
)


def find_missing() -> list[str]:
    """Names of the packages that are not there."""
    return sorted({package.name for package in PACKAGES if not package.present()})


def require(*names: str) -> None:
    """Raises ToolFailed when one of these packages is not there."""
    if missing := sorted(set(names) & set(find_missing())):
        raise ToolFailed(
            f"these packages are missing: {', '.join(missing)}",
            hint=f"run: {install_line(missing)}",
        )


def install_line(missing: list[str]) -> str:
    """What a person has to run to install them."""
    return "sudo apt-get install --no-install-recommends " + " ".join(missing)


async def install(missing: list[str]) -> None:
    """Install packages by apt as root, or by sudo if it asks for no password.

    Raises ToolFailed with the line to run when neither will do.
    """
    prefix: list[str] = []
    if os.geteuid() != 0:
        prefix = ["sudo", "-n"]
        if not shutil.which("sudo") or (await proc.run([*prefix, "true"], check=False)).returncode:
            raise ToolFailed(
                f"these packages are missing: {', '.join(missing)}",
                hint=f"run: {install_line(missing)}",
            )
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    apt = [*prefix, "apt-get", "-y", "-q", *_LOCK_WAIT]
    try:
        await proc.run([*apt, "update"], env=env, deadline_s=_INSTALL_DEADLINE_S)
        command = [*apt, "install", "--no-install-recommends", *missing]
        await proc.run(command, env=env, deadline_s=_INSTALL_DEADLINE_S)
    except ToolFailed as error:
        raise ToolFailed(error.message, hint=f"run: {install_line(missing)}") from error
