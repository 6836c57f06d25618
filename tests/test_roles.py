"""The launcher and roles: what becomes of a job when a process of this or that role ends. Without jax."""

import re
import sys
import time
import types
from pathlib import Path

import pytest

from jaxdist.cluster.attempt import Attempt, Signals
from jaxdist.cluster.launcher import Policy, launch, without
from jaxdist.cluster.members import Failure, Place
from jaxdist.runtime.role import Role

FOREVER = "import time; time.sleep(600)"

pytestmark = pytest.mark.processes


def place(
    role: str, on_exit: str, program: str, index: int = 0, log: Path | None = None, ends_job: bool = False
) -> Place:
    words = [sys.executable, "-c", program]
    return Place(Role(role, 1, 1, on_exit, ends_job), index, index, words, {"PATH": ""}, log)  # type: ignore[arg-type]


def attempt(*places: Place, max_restarts: int = 3) -> tuple[list[Failure], list[str]]:
    signals, said = Signals(), []
    with signals.listening() as wakeup:
        return Attempt(places, signals, wakeup, said.append, max_restarts).run(), said


def policy(**given: object) -> Policy:
    free = {"max_restarts": 3, "min_processes": 1, "fits": lambda n: True, "progress": lambda: 0}
    return Policy(**{**free, "record": lambda kind, **fields: None, **given})  # type: ignore[arg-type]


def test_the_others_are_ended_when_a_process_fails_that_ends_the_job():
    failures, _ = attempt(place("rank", "end_job", FOREVER), place("rank", "end_job", "raise SystemExit(1)", 1))
    assert [(f.member.place.index, f.code) for f in failures] == [(1, 1), (0, -9)]


def test_a_job_is_done_when_its_ranks_are_and_then_others_serve_nobody():
    failures, _ = attempt(place("trainer", "end_job", ""), place("server", "restart", FOREVER))
    assert failures == []


def test_a_process_of_a_role_that_restarts_is_started_again_alone(tmp_path: Path):
    twice = (
        f"import pathlib; mark = pathlib.Path({str(tmp_path / 'mark')!r}); before = mark.exists(); mark.touch()\n"
        f"if before: pathlib.Path({str(tmp_path / 'again')!r}).touch()\n"
        "raise SystemExit(1)"
    )
    until = f"import time, pathlib\nwhile not pathlib.Path({str(tmp_path / 'again')!r}).exists(): time.sleep(0.01)"
    failures, said = attempt(place("trainer", "end_job", until), place("server", "restart", twice))
    assert failures == []
    assert said[0].endswith("exit code 1; started again")


def test_only_the_first_of_a_role_that_shrinks_ends_the_job():
    lost = place("rank", "shrink", "raise SystemExit(1)", 1)
    failures, said = attempt(place("rank", "shrink", "import time; time.sleep(0.5)"), lost)
    assert failures == []
    assert "rank 1" in said[0]
    failures, _ = attempt(place("rank", "shrink", "raise SystemExit(1)"), place("rank", "shrink", FOREVER, 1))
    assert failures[0].member.place.index == 0


def test_output_is_whole_with_its_rank_in_front_and_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "logs").mkdir()
    program = "import sys; print('one'); sys.stdout.flush(); print('no end of line', end='', file=sys.stderr)"
    assert attempt(place("rank", "end_job", program, 3, tmp_path / "logs/rank-3.log"))[0] == []
    out, err = capfd.readouterr()
    assert out == "[rank 3] one\n"
    assert err == "[rank 3] no end of line\n"
    lines = (tmp_path / "logs/rank-3.log").read_text().splitlines()
    assert lines[0].startswith("==== rank 3 started ")
    assert sorted(lines[1:]) == ["no end of line", "one"]


def test_the_last_words_of_a_process_are_told_however_much_it_said_before():
    program = "import os; print('x\\n' * 200_000 + 'last words', flush=True); os.abort()"
    failures, _ = attempt(place("rank", "end_job", program))
    assert failures[0].code == -6
    assert failures[0].message.endswith("last words")


def test_processes_that_nobody_waits_for_run_to_their_end(tmp_path: Path):
    touch = f"import time, pathlib; time.sleep(0.3); pathlib.Path({str(tmp_path / 'end')!r}).touch()"
    failures, _ = attempt(place("silo", "ignore", touch))
    assert failures == []
    assert (tmp_path / "end").exists()


@pytest.mark.parametrize(
    ("ends", "code", "started"),
    [("raise SystemExit(2)", 2, 1), ("raise SystemExit(3)", 3, 1), ("raise SystemExit(75)", 75, 3), ("1/0", 1, 3)],
)
def test_mistakes_are_not_tried_again_and_all_else_is(
    ends: str, code: int, started: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxdist.cluster.launcher.LONGEST_WAIT", 0.01)
    count = f"open({str(tmp_path / 'starts')!r}, 'a').write('x')\n{ends}"
    assert launch(lambda slots: [place("rank", "end_job", count)], [0], policy(max_restarts=2)) == code
    assert len((tmp_path / "starts").read_text()) == started


def test_a_slot_is_given_up_only_for_a_number_of_processes_that_the_job_can_run_on():
    halves = policy(min_processes=2, fits=lambda n: 8 % n == 0)
    assert without(range(8), 5, halves) == [0, 1, 2, 3]
    assert without([0, 1], 1, halves) is None


# Jobs of a coordinator, servers and workers: each is started again alone, and the job is the coordinator's.

PRELUDE = """
import json, os, pathlib, signal, sys, time
notes = pathlib.Path({notes!r})
def say(word):
    with notes.open("a") as file: file.write({name!r} + " " + word + chr(10))
def hear(words, times=1):
    while notes.read_text().count(words) < times: time.sleep(0.01)
def when_told(act):
    signal.signal(signal.SIGTERM, lambda *_: (say("told"), act()))
    say("ready")
def leave(code, again=True, message=""):
    about = dict(code=code, again=again, message=message, time=time.time())
    pathlib.Path(os.environ["JAXDIST_ERROR_FILE"]).write_text(json.dumps(about))
    sys.exit(code)
def signal_launcher(): os.kill(os.getppid(), signal.SIGTERM)
def crash(): os.kill(os.getpid(), signal.SIGKILL)
def sleep(): time.sleep(600)
again = int(os.environ["JAXDIST_RESTARTS"])
say("began")
"""


class Job:
    """Programs by name of their process; what they and the launcher said, in order."""

    def __init__(self, directory: Path, **programs: str):
        self.notes = directory / "notes"
        self.notes.touch()
        self.places = []
        for name, program in programs.items():
            role, _, index = name.partition("_")
            prelude = PRELUDE.format(notes=str(self.notes), name=f"{role} {index or 0}")
            on_exit = {"trainer": "end_job", "client": "ignore"}.get(role, "restart")
            is_first = role == "coordinator"
            self.places.append(place(role, on_exit, prelude + program, int(index or 0), ends_job=is_first))

    def say(self, line: str) -> None:
        with self.notes.open("a") as file:
            file.write(f"launcher: {line}\n")

    def run(self, max_restarts: int = 3) -> list[tuple[str, int]]:
        """Why it ended before its time: (process, code)."""
        signals = Signals()
        with signals.listening() as wakeup:
            self.attempt = Attempt(self.places, signals, wakeup, self.say, max_restarts)
            return [(failure.member.place.name, failure.code) for failure in self.attempt.run()]

    def launch(self, max_restarts: int = 3) -> int:
        return launch(lambda slots: self.places, [0], policy(max_restarts=max_restarts))

    def said(self, words: str) -> int:
        """How often."""
        return self.notes.read_text().count(words)


def test_a_process_that_may_be_lost_is_let_go(tmp_path: Path):
    job = Job(tmp_path, trainer="hear('the others go on without it')", client="sys.exit(1)")
    assert job.run() == []
    assert job.said("launcher: client 0") == job.said("exit code 1; the others go on without it") == 1
    assert job.said("client 0 began") == 1


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launcher waits for before it ends a process is short."""
    monkeypatch.setattr("jaxdist.cluster.attempt.AGREED_SECONDS", 0.3)
    monkeypatch.setattr("jaxdist.cluster.attempt.STOP_SECONDS", 0.6)


@pytest.fixture
def fast_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's clock: what it waits for comes 20 times as soon."""
    clock = types.SimpleNamespace(monotonic=lambda: 20 * time.monotonic())
    monkeypatch.setattr("jaxdist.cluster.attempt.time", clock)


def test_when_the_coordinator_has_ended_the_others_have_time_to_end_and_nothing_is_started(tmp_path: Path, brief):
    ended = "hear('coordinator 0 ends')\n"
    job = Job(
        tmp_path,
        coordinator="hear('began', 4); say('ends')",
        server="sleep()",
        worker_0=ended + "time.sleep(0.2); sys.exit(1)",
        worker_1=ended + "time.sleep(0.2); say('saved')",
    )
    assert job.run() == []
    assert job.attempt.done
    assert job.said("began") == 4
    assert job.said("worker 1 saved") == 1
    assert job.said("launcher") == 0


def test_when_somebody_has_told_the_coordinator_to_stop_the_job_ends_and_nothing_is_started(tmp_path: Path, brief):
    """The others leave before it does."""
    left = "hear('began', 3); say('leaves'); sys.exit(75)"
    job = Job(tmp_path, coordinator="hear('leaves', 2); time.sleep(0.1); sys.exit(75)", server=left, worker=left)
    assert job.run() == [("coordinator 0", 75)]
    assert job.said("began") == 3
    assert job.said("launcher") == 0


def test_a_signal_is_passed_on_once_and_no_worker_can_fail_what_is_saved(tmp_path: Path, brief):
    """A scheduler and a launcher may both send theirs."""
    job = Job(
        tmp_path,
        coordinator="when_told(lambda: None); hear('ready', 3); signal_launcher(); signal_launcher()\n"
        "hear('worker 0 told'); hear('saved'); time.sleep(0.2); sys.exit(75)",
        server="when_told(lambda: say('saved')); hear('saved'); sys.exit(75)",
        worker="when_told(lambda: sys.exit(1)); sleep()",
    )
    assert job.run() == [("coordinator 0", 75)]
    assert [job.said(f"{name} 0 told") for name in ("coordinator", "server", "worker")] == [1, 1, 1]
    assert (job.said("began"), job.said("launcher: SIGTERM")) == (3, 1)


def test_where_a_server_dies_while_it_saves_nothing_more_can_be_saved_and_the_job_ends(tmp_path: Path, brief):
    job = Job(
        tmp_path,
        coordinator="when_told(lambda: None); hear('ready', 3); signal_launcher(); sleep()",
        server="when_told(lambda: sys.exit(1)); sleep()",
        worker="when_told(lambda: None); sleep()",
    )
    assert job.run()[0] == ("server 0", 1)
    assert job.said("began") == 3


def test_a_second_signal_ends_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxdist.cluster.attempt.TOGETHER", 0.05)
    both = "when_told(lambda: (time.sleep(0.2), signal_launcher())); hear('ready', 3); signal_launcher(); sleep()"
    stays = "when_told(lambda: None); sleep()"
    job = Job(tmp_path, coordinator=both, server=stays, worker=stays)
    assert ("coordinator 0", -9) in job.run()
    assert job.said("0 told") == 3


def test_a_job_that_is_stopped_while_a_server_is_to_be_started_again_ends_without_it(tmp_path: Path, brief):
    job = Job(
        tmp_path,
        coordinator="when_told(lambda: None); hear('ready', 2); hear('again in 1 s'); signal_launcher(); sleep()",
        server="sys.exit(1)",
        worker="when_told(lambda: sys.exit(0)); sleep()",
    )
    assert job.run() == [("coordinator 0", -9)]
    assert (job.said("server 0 began"), job.said("worker 0 told")) == (2, 1)


def test_a_job_that_is_stopped_while_a_worker_is_to_be_started_again_saves_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("jaxdist.cluster.attempt.STOP_SECONDS", 0.1)
    job = Job(
        tmp_path,
        coordinator="when_told(lambda: (time.sleep(0.5), sys.exit(75)))\n"
        "hear('ready', 2); hear('again in 1 s'); signal_launcher(); sleep()",
        server="when_told(lambda: (hear('coordinator 0 told'), sys.exit(75))); sleep()",
        worker="sys.exit(1)",
    )
    assert job.run() == [("coordinator 0", 75)]
    assert job.said("worker 0 began") == 2


def test_what_fails_again_is_started_later_each_time_and_then_it_is_given_up_with_the_job(
    tmp_path: Path, fast_clock, capfd: pytest.CaptureFixture[str]
):
    job = Job(tmp_path, coordinator="sleep()", server="sys.exit(1)", worker="sleep()")
    assert job.launch() == 1
    said = capfd.readouterr().err
    assert re.findall(r"server 0 .*exit code 1; started again(.*)", said) == ["", " in 1 s", " in 3 s"]
    assert "server 0 is given up after 3 restarts, and with it the job" in said
    assert "first to fail: server 0" in said
    assert (job.said("server 0 began"), job.said("began")) == (4, 6)


def test_without_a_worker_that_is_given_up_the_others_go_on_and_with_the_last_the_job_ends(
    tmp_path: Path, fast_clock
):
    job = Job(
        tmp_path,
        coordinator="sleep()",
        server="sleep()",
        worker_0="sys.exit(1)",
        worker_1="hear('worker 0', 3); hear('the others go on without it'); crash()",
    )
    assert job.run(max_restarts=1) == [("worker 1", -9)]
    assert job.said("given up after 1 restarts, the others go on without it") == 1
    assert (job.said("worker 0 began"), job.said("worker 1 began")) == (2, 2)


@pytest.mark.parametrize("of", ["server", "worker_0"])
def test_a_mistake_of_the_users_is_not_tried_again(of: str, tmp_path: Path, brief):
    programs = {"coordinator": "sleep()", "server": "sleep()", "worker_0": "sleep()", "worker_1": "sleep()"}
    job = Job(tmp_path, **{**programs, of: "leave(2, message='strategy.servers: no')"})
    assert job.launch() == 2
    assert job.said("began") == 4


def test_restarts_of_long_ago_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxdist.cluster.attempt.RESTARTS_FORGOTTEN", 0.0)
    job = Job(
        tmp_path, coordinator="hear('server 0 began', 4)", server="crash() if not again else time.sleep(0.1); crash()"
    )
    assert job.run(max_restarts=1) == []
    assert job.said("started again in") == 0


@pytest.mark.parametrize("end", ["sys.exit(1)", "crash()"])
def test_a_coordinator_that_crashes_is_started_again_and_the_others_go_on(end: str, tmp_path: Path, brief):
    program = f"hear('began', 3)\nif not again: {end}"
    job = Job(tmp_path, coordinator=program, server="sleep()", worker="sleep()")
    assert job.run() == []
    assert (job.said("coordinator 0 began"), job.said("began")) == (2, 4)


def test_a_run_that_has_failed_for_good_ends_the_job_at_once_and_the_coordinator_says_why(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The others were told to end, and do so first: they are not started before it has had the time to say more."""
    told = "hear('began', 3); say('leaves'); leave(1, again=False, message='the coordinator has ended the run')"
    final = "hear('leaves', 2); time.sleep(0.3); leave(1, again=False, message='a loss that is not finite')"
    job = Job(tmp_path, coordinator=final, server=told, worker=told)
    assert job.launch() == 1
    said = capfd.readouterr().err
    assert job.said("began") == 3
    assert said.count("[launch]") == 2
    assert "first to fail: coordinator 0" in said
    assert "a loss that is not finite" in said


def test_all_begin_again_when_the_coordinator_has_told_them_to_end_and_may_go_on_itself(tmp_path: Path, brief):
    told = "hear('began', 3)\nif not again: leave(1, again=False)\nsleep()"
    job = Job(
        tmp_path,
        coordinator="hear('began', 3)\nif not again: sys.exit(1)\nhear('began', 6)",
        server=told,
        worker=told,
    )
    assert job.run() == []
    assert job.said("started again") == 3


def test_where_the_coordinator_is_on_another_host_what_it_has_told_one_process_ends_all(tmp_path: Path, brief):
    told, by = place("server", "restart", "raise SystemExit(75)"), time.monotonic()
    failures, said = attempt(told, place("worker", "restart", FOREVER))
    assert [(failure.member.place.name, failure.code) for failure in failures] == [("server 0", 75)]
    assert said == []
    assert time.monotonic() - by < 30
