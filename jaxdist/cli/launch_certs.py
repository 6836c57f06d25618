"""`jaxdist launch certs DIR --hosts a,b,...`: certificates and a token for the hosts of a job."""

import argparse
from pathlib import Path

from jaxdist.cli.output import say


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("certs", help="certificates and a token for a job that crosses a network")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write them; nothing is written over")
    parser.add_argument("--hosts", required=True, metavar="A,B,...", help="names or addresses, one certificate each")
    parser.add_argument("--days", type=float, default=30.0, help="how long the certificates are valid (30)")


def run(args: argparse.Namespace) -> int:
    """Raises UserError for hosts and days that cannot be, and for files that are there already."""
    from jaxdist.transport.certificates import make_certificates

    files = make_certificates(args.directory, [host.strip() for host in args.hosts.split(",")], args.days)
    say(
        [
            *(str(path) for path in files),
            "each host needs ca.pem, token and its own certificate, readable by its owner alone",
            f"they are valid for {args.days:g} days",
        ]
    )
    return 0
