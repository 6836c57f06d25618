"""`launch k8s`: an Indexed Job with its headless service, or a JobSet."""

import argparse
import re
from pathlib import PurePosixPath

from jaxdist.cluster.render_arguments import (
    add_grace_argument,
    add_restart_arguments,
    check_command,
    check_count,
    check_name,
    check_port,
    check_printable,
    check_restarts,
    fill,
    launch_line,
    yaml_settings,
    yaml_text,
)
from jaxdist.config.errors import UserError

_LABEL = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"  # the pods' names, 63 letters at most, are longer
_LABEL_ALLOWED = "1 to 40 of a-z, 0-9 and -, from a letter to a letter or digit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", help="container image in which jaxdist is installed")
    parser.add_argument("--claim", help="PersistentVolumeClaim (ReadWriteMany) for the run directory")
    parser.add_argument("--mount", metavar="DIR", default="/shared", help="where the pods see it; /shared by default")
    parser.add_argument("--nodes", type=int, default=1, help="pods; 1 by default")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", default=8, help="8 by default, 0 for CPUs")
    parser.add_argument("--jobset", action="store_true", help="a JobSet in place of an Indexed Job")
    parser.add_argument("--job-name", default="jaxdist", help="jaxdist by default")
    parser.add_argument("--namespace", help="kubectl's by default")
    parser.add_argument("--service", help="name of the headless service; the job's by default")
    parser.add_argument("--port", type=int, default=9476, help="of the coordinator; 9476 by default")
    add_restart_arguments(parser, default=10)
    add_grace_argument(parser)


def render(options: argparse.Namespace, command: list[str]) -> str:
    """Raises UserError for options that Kubernetes would refuse or that lose the run directory."""
    _check(options, command)
    service = options.service or options.job_name
    pods = f"{options.job_name}-ranks-0-" if options.jobset else f"{options.job_name}-"
    return fill(
        "kubernetes_jobset.yaml" if options.jobset else "kubernetes_job.yaml",
        launch_line=launch_line("k8s", add_arguments, options, command),
        name=options.job_name,
        namespace="" if options.namespace is None else f"namespace: {options.namespace}",
        service=service,
        nodes=str(options.nodes),
        max_restarts=str(options.max_restarts),
        pod=fill(
            "kubernetes_pod.yaml",
            service=service,
            grace=str(options.grace + 30),
            image=yaml_text(options.image),
            attempts=str(1 if options.jobset else options.max_restarts + 1),
            arguments="\n".join(f"- {_argument(word)}" for word in command),
            coordinator=yaml_text(f"{pods}0.{service}:{options.port}"),
            pods=pods,
            nodes=yaml_text(str(options.nodes)),
            port=str(options.port),
            doctor_port=str(options.port + 1),
            settings=yaml_settings() if options.gpus_per_node else "",
            resources=_resources(options.gpus_per_node),
            expected=f" --expect-devices {options.gpus_per_node}" if options.gpus_per_node else "",
            mount=yaml_text(options.mount),
            claim=options.claim,
        ).rstrip("\n"),
    )


def _check(options: argparse.Namespace, command: list[str]) -> None:
    for option, what in (("image", "an image that has jaxdist"), ("claim", "a claim for the run directory")):
        if not getattr(options, option):
            raise UserError(f"--{option}: is missing; the pods need {what}")
    check_printable("--image", options.image)
    check_count("--nodes", options.nodes)
    check_count("--gpus-per-node", options.gpus_per_node, least=0)
    check_port(options.port)
    check_restarts(options)
    check_name("--job-name", options.job_name, _LABEL, _LABEL_ALLOWED)
    check_name("--service", options.service, _LABEL, _LABEL_ALLOWED)
    check_name("--namespace", options.namespace, r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a namespace's name")
    check_name("--claim", options.claim, r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "a claim's name")
    check_name("--mount", options.mount, r"/[^:]*", "an absolute path without a colon")
    check_printable("--mount", options.mount)
    check_command(command)
    for word in command:
        if match := re.fullmatch(r"run\.dir=(['\"]?)(.*)\1", word):
            run_dir = PurePosixPath(options.mount, match[2])
            if not run_dir.is_relative_to(options.mount):
                raise UserError(f"{word}: is not under {options.mount}, where the pods share the claim; see --mount")


def _argument(word: str) -> str:
    """Kubernetes expands $(NAME) in arguments, and takes $$ for $."""
    return yaml_text(word.replace("$", "$$"))


def _resources(gpus: int) -> str:
    return f'resources:\n  limits: {{nvidia.com/gpu: "{gpus}"}}' if gpus else ""
