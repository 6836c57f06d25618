"""What the targets share: checks of options, quoting, templates, and the settings of NCCL and XLA."""

import argparse
import json
import re
import shlex
import string
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jaxdist.config.errors import UserError

DEFAULT_GRACE = 120


@dataclass(frozen=True)
class Setting:
    """An environment variable of NCCL or XLA whose default is not the right one for a job on several hosts."""

    name: str
    value: str
    why: str
    appended: bool = False  # to what the user has in it


SETTINGS = (
    Setting(
        "NCCL_DEBUG",
        "WARN",
        "NCCL says why it fails; its default is silence.\n"
        "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-debug",
    ),
    Setting(
        "XLA_FLAGS",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "Collectives run beside the computation; XLA's default is off, for the sake of compile time.\n"
        "https://docs.jax.dev/en/latest/gpu_performance_tips.html",
        appended=True,
    ),
    Setting(
        "XLA_CLIENT_MEM_FRACTION",
        "0.9",
        "JAX takes 75% of a GPU's memory by default. NCCL and cuDNN need some too: 0.8 if they run out.\n"
        "https://docs.jax.dev/en/latest/201/gpu-memory.html",
    ),
)
INTERFACE = (
    "Hosts with several networks: the interface that the hosts reach each other by; see `ip address`.\n"
    "https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html#nccl-socket-ifname"
)


class _Template(string.Template):
    delimiter = "@@"  # `$` is the shell's


def fill(template: str, /, **values: str) -> str:
    """The template with its `@@{name}`s filled in.

    One that is alone in its line takes that line's indent for all its own lines, and goes with the line if empty.
    """
    lines = []
    for line in (resources.files("jaxdist.cluster") / "templates" / template).read_text().splitlines():
        alone = re.fullmatch(r"( *)@@\{(\w+)\}", line)
        if alone is None:
            lines.append(_Template(line).substitute(values))
        elif values[alone[2]]:
            lines.append(textwrap.indent(values[alone[2]], alone[1]))
    return "\n".join(lines) + "\n"


def comment(text: str) -> str:
    return textwrap.indent(text, "# ", lambda line: True)


def shell_settings() -> str:
    """Lines that export `SETTINGS`; a value that the user has exported stays."""
    lines = []
    for setting in SETTINGS:
        before = f"${{{setting.name}:-}} " if setting.appended else ""
        value = f"{before}{setting.value}" if setting.appended else f"${{{setting.name}:-{setting.value}}}"
        lines += [comment(setting.why), f'export {setting.name}="{value}"']
    return "\n".join([*lines, comment(INTERFACE), "# export NCCL_SOCKET_IFNAME=eth0"])


def yaml_settings() -> str:
    """The same as items of a container's `env`."""
    lines = []
    for setting in SETTINGS:
        lines += [comment(setting.why), f"- {{name: {setting.name}, value: {yaml_text(setting.value)}}}"]
    return "\n".join([*lines, comment(INTERFACE), "# - {name: NCCL_SOCKET_IFNAME, value: eth0}"])


def shell_words(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def yaml_text(text: str) -> str:
    """A YAML string, quoted as JSON is; `text` is printable, as `check_command` sees to."""
    return json.dumps(text, ensure_ascii=False)


def setup_lines(venv: str | None, setup: Sequence[str]) -> str:
    lines = list(setup)
    if venv:
        lines.append(f"source {shlex.quote(str(Path(venv) / 'bin' / 'activate'))}")
    return "\n".join(lines)


def add_setup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--venv", metavar="DIR", help="virtual environment to activate, on a path that all hosts see")
    parser.add_argument(
        "--setup", metavar="LINE", action="append", default=[], help="shell line to run first, such as a module load"
    )


def add_restart_arguments(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument(
        "--max-restarts", type=int, metavar="R", default=default, help=f"restarts of the job; {default} by default"
    )


def add_grace_argument(parser: argparse.ArgumentParser) -> None:
    help = f"time for the last checkpoint when the job is told to stop; {DEFAULT_GRACE} by default"
    parser.add_argument("--grace", type=int, metavar="SECONDS", default=DEFAULT_GRACE, help=help)


def check_restarts(options: argparse.Namespace) -> None:
    check_count("--max-restarts", options.max_restarts, least=0)
    if hasattr(options, "grace"):
        check_count("--grace", options.grace)


def check_count(option: str, value: int, least: int = 1) -> None:
    if value < least:
        raise UserError(f"{option}: {value} must be at least {least}")


def check_printable(option: str, *texts: str | None) -> None:
    """Raises UserError for line breaks and the like, which could end the comment or directive that they stand in."""
    for text in texts:
        if text is not None and not (text and text.isprintable()):
            raise UserError(f"{option}: {text!r} must be printable text in one line")


def check_name(option: str, text: str | None, pattern: str, allowed: str) -> None:
    if text is not None and not re.fullmatch(pattern, text):
        raise UserError(f"{option}: {text!r} must be {allowed}")


def check_command(command: Sequence[str]) -> None:
    if not command:
        raise UserError("no command to launch: end the line with `-- train CONFIG a.b=value ...`")
    check_printable("the command after --", *command)


def check_process_per_gpu(options: argparse.Namespace) -> None:
    if options.process_per_gpu and options.gpus_per_node < 1:
        raise UserError(f"--process-per-gpu: there is no GPU with --gpus-per-node {options.gpus_per_node}")


def add_hosts_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", metavar="HOST,...", help="the hosts' names; the first holds the coordinator")
    parser.add_argument("--hostfile", metavar="FILE", help="the same, one in a line")
    parser.add_argument("--port", type=int, default=9476, help="of the coordinator, and free there; 9476 by default")


def check_hosts_given(options: argparse.Namespace) -> None:
    if (options.hosts is None) == (options.hostfile is None):
        raise UserError("--hosts, --hostfile: give one of the two")


def host_list(text: str, option: str = "--hosts") -> list[str]:
    """Raises UserError if there is none, one twice, or one that is no host's name."""
    hosts = [host for host in re.split(r"[,\s]+", text) if host]
    if not hosts:
        raise UserError(f"{option}: names no host")
    for host in hosts:
        check_name(option, host, r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a host's name or IPv4 address")
        if hosts.count(host) > 1:
            raise UserError(f"{option}: {host} is there twice; each host gets one entry")
    return hosts


def check_port(port: int) -> None:
    if not 1024 <= port < 65535:
        raise UserError(f"--port: {port} must be from 1024 to 65534")


def launch_line(
    target: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    options: argparse.Namespace,
    command: list[str],
) -> str:
    """The command that renders this script again: options that differ from their defaults, then the command."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["jaxdist", "launch", target, "--render"]
    for name, default in vars(parser.parse_args([])).items():
        value, option = getattr(options, name), "--" + name.replace("_", "-")
        if value == default:
            continue
        if value is True:
            words.append(option)
        else:  # joined by `=`: argparse takes a value that begins with - for an option
            words += [f"{option}={item}" for item in (value if isinstance(value, list) else [value])]
    return shell_words([*words, "--", *command])
