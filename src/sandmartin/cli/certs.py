"""`sandmartin certs NAME`: certificates for sandboxes at names below NAME.localhost."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from sandmartin.cli.extras import extra
from sandmartin.cli.options import add_json_flag
from sandmartin.cli.talk import print_json, say


def configure(verbs: Any) -> None:
    parser: argparse.ArgumentParser = verbs.add_parser(
        "certs",
        help="make certificates for NAME.localhost",
        description="Make a certificate for NAME.localhost and all names below it, and the issuer "
        "that clients are to trust, whose key is thrown away.",
    )
    parser.set_defaults(act=_make, parser=parser)
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--dir", type=Path, metavar="DIR", default=Path("certs"), help="default: certs, here"
    )
    add_json_flag(parser)


def _make(args: argparse.Namespace) -> int:
    with extra("control"):
        from sandmartin.control.certificates import Certificates  # noqa: PLC0415

    made = Certificates.make(args.name)
    files = {name: os.fspath(file) for name, file in made.write(args.dir.absolute()).items()}
    if args.json:
        print_json({"domain": made.domain, **files})
        return 0
    say("serve with:")
    print(f"--domain {made.domain} --tls-cert {files['cert']} --tls-key {files['key']}")
    say(f"clients trust it with SSL_CERT_FILE={files['issuer']}")
    return 0
