"""Scripts for clusters: what a shell or Kubernetes makes of them, and that launch/ holds what the renderers write."""

import argparse
import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdist.cluster.render import TARGETS
from jaxdist.config.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMAND = ["train", "gpt2_124m", "run.dir=/shared/runs/a"]
LAUNCH_FILES = {
    "slurm": ["slurm.sbatch"],
    "k8s": ["kubernetes_job.yaml", "kubernetes_jobset.yaml"],
    "ssh": ["ssh.sh"],
    "mpi": ["mpirun.sh"],
}
KUBERNETES = ["--image=registry/jaxdist:1", "--claim=shared"]
HOSTS = {"slurm": [], "k8s": KUBERNETES, "ssh": ["--hosts=h0,h1"], "mpi": ["--hosts=h0,h1"]}
WORDS = st.lists(
    st.text(
        st.characters(exclude_categories=("C", "Zl", "Zp", "Zs")) | st.sampled_from(" '\"$`\\{}()#*&|;!~%@:-"),
        min_size=1,
    ),
    min_size=1,
    max_size=4,
)
CASES = [
    ["slurm"],
    [
        "slurm",
        "--gpus-per-node=0",
        "--nodes=3",
        "--time=1-0:30",
        "--partition=main",
        "--account=me",
        "--setup=module load cuda",
    ],
    ["slurm", "--process-per-gpu", "--cpus-per-task=8", "--container=nvcr.io#nvidia/jax:26.07", "--mount=/shared"],
    ["slurm", "--container=/images/jax's.sif", "--mount=/shared", "--mount=/data", "--sbatch=--qos=high"],
    ["ssh", "--hosts=h0,h1", "--user=me", "--workdir=/my work", "--venv=/shared/venv", "--gpus-per-node=8"],
    ["mpi", "--hosts=h0,h1", "--process-per-gpu", "--setup=module load 'open mpi'"],
    ["mpi", "--hostfile=my hosts", "--gpus-per-node=0"],
    ["k8s", *KUBERNETES],
    ["k8s", *KUBERNETES, "--jobset", "--namespace=research", "--service=peers", "--gpus-per-node=0", "--nodes=3"],
]


def render(target: str, *words: str, command: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser()
    TARGETS[target].add_arguments(parser)
    return TARGETS[target].render(parser.parse_args(words), COMMAND if command is None else command)


def bash(script: str, *arguments: str, **environment: str) -> list[str]:
    """Lines that `script` prints."""
    result = subprocess.run(
        ["bash", "-c", script, "bash", *arguments],
        capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"], **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\0")[:-1]


def pod_spec(manifest: str) -> dict[str, Any]:
    last = list(yaml.safe_load_all(manifest))[-1]
    if last["kind"] == "JobSet":
        last = last["spec"]["replicatedJobs"][0]["template"]
    return last["spec"]["template"]["spec"]


def kubelet_expands(text: str, environment: dict[str, str]) -> str:
    """Kubernetes' rule: $(NAME) is the variable if there is one, $$ is $, everything else stands for itself."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))",
        lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0]),
        text,
    )


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, names in LAUNCH_FILES.items() for name in names]
)
def test_the_scripts_in_launch_are_what_the_command_in_their_head_renders(target, name):
    text = (ROOT / "launch" / name).read_text()
    words = shlex.split(re.search(r"^#   (jaxdist launch .*)$", text, re.MULTILINE)[1])
    cut = words.index("--")
    assert words[:3] == ["jaxdist", "launch", target]
    assert render(target, *(word for word in words[3:cut] if word != "--render"), command=words[cut + 1 :]) == text


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_the_head_names_the_command_that_renders_the_same_again(words):
    text = render(*words)
    head = shlex.split(re.search(r"^#   (.*)$", text, re.MULTILINE)[1])
    cut = head.index("--")
    assert render(words[0], *(word for word in head[3:cut] if word != "--render"), command=head[cut + 1 :]) == text


@pytest.mark.parametrize("target", ["slurm", "ssh", "mpi"])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command=WORDS)
def test_a_shell_gets_back_exactly_the_arguments(target, command):
    script = render(target, *HOSTS[target], command=command)
    default = re.search(r"^if \[ \$# -eq 0 \]; then\n.*\nfi$", script, re.MULTILINE)[0]
    assert bash(f'{default}\nprintf "%s\\0" "$@"') == command
    assert bash(f'{default}\nprintf "%s\\0" "$@"', "eval", "runs/a") == ["eval", "runs/a"]


@settings(max_examples=40, deadline=None)
@given(command=WORDS)
def test_a_host_behind_ssh_gets_exactly_the_arguments(command):
    quoted = re.search(r"^quoted\(\) \{.*?^\}$", render("ssh", "--hosts=a"), re.MULTILINE | re.DOTALL)[0]
    sent = bash(f'{quoted}\nprintf "%s\\0" "$(quoted "$@")"', *command)[0]
    assert shlex.split(sent) == command


@settings(max_examples=60, deadline=None)
@given(command=WORDS, jobset=st.booleans())
def test_a_container_gets_exactly_the_arguments(command, jobset):
    container = pod_spec(render("k8s", *KUBERNETES, *["--jobset"] * jobset, command=command))["containers"][0]
    environment = {entry["name"]: entry.get("value", "0") for entry in container["env"]} | {"HOSTNAME": "x"}
    assert [kubelet_expands(argument, environment) for argument in container["args"]] == command
    script = container["command"][2]
    assert kubelet_expands(script, environment) == script


@pytest.mark.parametrize("words", CASES[:7], ids=" ".join)
def test_shell_scripts_parse_and_pass_shellcheck_where_it_is_installed(words, tmp_path):
    script = tmp_path / "script"
    script.write_text(render(*words, command=["train", "it's {a: 1}"]))
    subprocess.run(["bash", "-n", script], check=True)
    if shellcheck := shutil.which("shellcheck"):
        checked = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
        assert checked.stdout == ""


@pytest.mark.parametrize("words", CASES[:7], ids=" ".join)
def test_what_a_rank_runs_parses_too(words, tmp_path):
    script = render(*words)
    if words[0] == "slurm":
        rank = bash(re.search(r"^task=.*$", script, re.MULTILINE)[0] + '\nprintf "%s\\0" "$task"')[0]
    else:
        rank = re.search(r"<<'RANK'\n(.*?)^RANK$", script, re.MULTILINE | re.DOTALL)[1]
    subprocess.run(["bash", "-n", "-c", rank], check=True)


def test_a_slurm_task_knows_its_process_and_its_gpu():
    script = render("slurm", "--process-per-gpu", "--gpus-per-node=4")
    assert "#SBATCH --ntasks-per-node=4\n" in script
    task = re.search(r"^task=.*$", script, re.MULTILINE)[0].replace("exec jaxdist", "exec env -0 #")
    found = bash(f'{task}\nbash -c "$task"', SLURM_NTASKS="8", SLURM_PROCID="5", SLURM_LOCALID="1")
    assert {"JAXDIST_NUM_PROCESSES=8", "JAXDIST_PROCESS_ID=5", "JAXDIST_LOCAL_DEVICE_IDS=1"} <= set(found)
    assert "LOCAL_DEVICE_IDS" not in render("slurm")


@pytest.mark.parametrize("jobset", [False, True])
def test_manifests_are_valid_for_kubernetes(jobset):
    validate = pytest.importorskip("kubernetes_validate")
    documents = list(yaml.safe_load_all(render("k8s", *KUBERNETES, *["--jobset"] * jobset, "--nodes=4")))
    if jobset:  # the validator has no schema for it: its Job is checked alone
        template = documents.pop()["spec"]["replicatedJobs"][0]["template"]
        documents.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "ranks"}, **template})
    for document in documents:
        validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("jobset", [False, True])
def test_enumerations_of_a_manifest_are_kubernetes_own(jobset):
    last = list(yaml.safe_load_all(render("k8s", *KUBERNETES, *["--jobset"] * jobset)))[-1]
    job = last["spec"]
    if jobset:
        policy = job["failurePolicy"]["rules"]
        assert [rule["action"] for rule in policy] == ["FailJobSet"]
        assert policy[0]["onJobFailureReasons"] == ["PodFailurePolicy"]
        job = job["replicatedJobs"][0]["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"]
    assert {rule["action"] for rule in job["podFailurePolicy"]["rules"]} <= {"FailJob", "Ignore", "Count"}
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # which podFailurePolicy demands
    rule = job["podFailurePolicy"]["rules"][-1]["onExitCodes"]
    assert rule == {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2, 3]}
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for mount in pod["containers"][0]["volumeMounts"]
    }


def test_the_first_pod_of_a_job_is_the_coordinator_by_its_name_in_the_headless_service():
    service, job = yaml.safe_load_all(render("k8s", *KUBERNETES, "--job-name=big", "--service=peers", "--nodes=4"))
    pod = job["spec"]["template"]["spec"]
    environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert service["spec"] == {"clusterIP": "None", "selector": {"job-name": job["metadata"]["name"]}}
    assert service["metadata"]["name"] == pod["subdomain"] == "peers"
    assert environment["JAXDIST_COORDINATOR"] == "big-0.peers:9476"
    assert environment["JAXDIST_NUM_PROCESSES"] == "4"


@pytest.mark.parametrize(
    ("statuses", "expected", "runs"),
    [
        ([0, 0], 0, ["doctor", "train"]),
        ([1], 2, ["doctor"]),  # a finding: FailJob
        ([0, 2], 2, ["doctor", "train"]),
        ([0, 75, 0, 0], 0, ["doctor", "train", "doctor", "train"]),
        ([0, 75, 1, 0, 0], 0, ["doctor", "train", "doctor", "doctor", "train"]),
        ([0, 137, 0, 75, 0, 75], 75, ["doctor", "train"] * 3),
    ],
)
def test_a_pod_starts_again_in_place_when_a_peer_was_lost(statuses, expected, runs, tmp_path):
    container = pod_spec(render("k8s", *KUBERNETES, "--max-restarts=2", "--gpus-per-node=0"))["containers"][0]
    fake(
        tmp_path, "jaxdist", 'echo "$1 $JAXDIST_COORDINATOR" >>log; n=$(wc -l <log); exit $(sed -n "${n}p" statuses)'
    )
    fake(tmp_path, "getent", "exit 0")
    fake(tmp_path, "sleep", "exit 0")
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "JAXDIST_COORDINATOR": "a-0.a:9476", "JAXDIST_NUM_PROCESSES": "2"
    }  # fmt: skip
    ended = subprocess.run([*container["command"], *COMMAND], cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == expected
    ports = {"doctor": "9477", "train": "9476"}
    assert (tmp_path / "log").read_text().splitlines() == [f"{run} a-0.a:{ports[run]}" for run in runs]


@pytest.mark.parametrize(
    ("statuses", "state", "restarts", "expected", "requeued"),
    [
        ([0, 0], "RUNNING", 0, 0, False),
        ([0, 75], "RUNNING", 0, 75, True),
        ([0, 137], "RUNNING", 1, 137, True),
        ([0, 2], "RUNNING", 0, 2, False),
        ([0, 3], "RUNNING", 0, 3, False),
        ([1], "RUNNING", 0, 1, False),  # the doctor found something
        ([0, 75], "COMPLETING", 0, 75, False),  # cancelled
        ([0, 75], "RUNNING", 2, 75, False),  # often enough
    ],
)
def test_a_slurm_job_is_requeued_when_that_can_help(statuses, state, restarts, expected, requeued, tmp_path):
    fake(tmp_path, "srun", 'echo "$*" >>log; n=$(wc -l <log); exit $(sed -n "${n}p" statuses)')
    fake(tmp_path, "scontrol", '[ "$1" = requeue ] && echo "$2" >requeued; echo node0')
    fake(tmp_path, "squeue", f"echo {state}")
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    (tmp_path / "job").write_text(render("slurm", "--max-restarts=2"))
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_RESTART_COUNT": str(restarts), "SLURM_GPUS_PER_NODE": "h100:8",
    }  # fmt: skip
    ended = subprocess.run(["bash", "job"], cwd=tmp_path, env=environment, check=False, capture_output=True)
    assert ended.returncode == expected
    assert (tmp_path / "requeued").exists() == requeued
    first, *_ = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("doctor --timeout 300 --expect-devices 8 gpt2_124m run.dir=/shared/runs/a")


def fake(directory: Path, name: str, body: str) -> None:
    """A command that stands in for the cluster's."""
    (directory / name).write_text(f"#!/bin/bash\n{body}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["slurm", "--nodes=0"], "--nodes: 0 must be at least 1"),
        (["slurm", "--time=soon"], "--time: 'soon'"),
        (["slurm", "--time=1:30"], "not longer than --grace"),
        (["slurm", "--gpus-per-node=0", "--process-per-gpu"], "there is no GPU"),
        (["slurm", "--gpus-per-node=-1"], "at least 0"),
        (["slurm", "--job-name=a b"], "--job-name"),
        (["slurm", "--mount=/shared"], "has no effect without --container"),
        (["slurm", "--container=a", "--mount=shared"], "absolute path"),
        (["slurm", "--container=a", "--venv=/v"], "--venv"),
        (["slurm", "--setup=a\nb"], "printable"),
        (["slurm", "--max-restarts=-1"], "--max-restarts"),
        (["k8s", "--claim=c"], "--image: is missing"),
        (["k8s", "--image=i"], "--claim: is missing"),
        (["k8s", *KUBERNETES, "--job-name=Big_Job"], "--job-name"),
        (["k8s", *KUBERNETES, "--mount=/other"], "is not under /other"),
        (["k8s", *KUBERNETES, "--port=80"], "--port"),
        (["ssh"], "give one of the two"),
        (["ssh", "--hosts=,"], "names no host"),
        (["ssh", "--hosts=a,b,a"], "a is there twice"),
        (["ssh", "--hosts=a,-oProxyCommand=x"], "host's name"),
        (["ssh", "--hostfile=/nowhere"], "cannot be read"),
        (["mpi", "--hosts=a", "--hostfile=b"], "give one of the two"),
        (["mpi", "--hosts=a,a"], "a is there twice"),
        (["mpi", "--hosts=a", "--gpus-per-node=0", "--process-per-gpu"], "there is no GPU"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, says):
    with pytest.raises(UserError, match=re.escape(says)):
        render(*words)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("command", [[], ["train", "a\nrm -rf ~"], ["train", "a\u2028#SBATCH --x"], [""]])
def test_a_command_that_could_end_a_comment_is_refused(target, command):
    with pytest.raises(UserError):
        render(target, *HOSTS[target], command=command)


@pytest.mark.parametrize(
    ("time", "seconds"), [("90", 5400), ("3:00", 180), ("12:30:00", 45000), ("1-12", 129600), ("1-0:30", 88200)]
)
def test_times_are_read_as_slurm_reads_them(time, seconds):
    assert f"--time={time}\n" in render("slurm", f"--time={time}", f"--grace={seconds - 1}")
    with pytest.raises(UserError, match="not longer"):
        render("slurm", f"--time={time}", f"--grace={seconds}")


def test_a_file_of_hosts_is_read_line_by_line(tmp_path):
    (tmp_path / "hosts").write_text("# ours\nhost0\n\nhost1 # the other\n")
    assert "${HOSTS:-host0 host1}" in render("ssh", f"--hostfile={tmp_path / 'hosts'}")


@pytest.mark.parametrize("target", TARGETS)
def test_a_script_that_lies_somewhere_is_submitted_by_its_clusters_command(target):
    assert TARGETS[target].submit(Path("dir/a b"))[-1] == "dir/a b"


def test_settings_appear_once_and_only_where_there_are_gpus():
    for target, gpus in itertools.product(("slurm", "k8s", "mpi"), (0, 8)):
        script = render(target, *HOSTS[target], f"--gpus-per-node={gpus}")
        assert script.count("xla_gpu_enable_latency_hiding_scheduler") == (1 if gpus else 0)


def test_a_directive_of_the_user_s_own_stands_after_ours_as_slurm_takes_the_last():
    script = render("slurm", "--nodes=2", "--sbatch=--output=/logs/%j")
    outputs = [line for line in script.splitlines() if line.startswith("#SBATCH --output")]
    assert outputs == ["#SBATCH --output=%x-%j.log", "#SBATCH --output=/logs/%j"]
