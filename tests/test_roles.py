"""The launcher and roles: what becomes of a job when a process of this or that role ends. Without jax."""

import sys
from pathlib import Path

import pytest

from jaxdist.cluster.attempt import Attempt, Signals
from jaxdist.cluster.launcher import Policy, launch, without
from jaxdist.cluster.members import Failure, Place
from jaxdist.runtime.role import Role

FOREVER = "import time; time.sleep(600)"

pytestmark = pytest.mark.processes


def place(role: str, on_exit: str, program: str, index: int = 0, log: Path | None = None) -> Place:
    words = [sys.executable, "-c", program]
    return Place(Role(role, 1, 1, on_exit), index, index, words, {"PATH": ""}, log)  # type: ignore[arg-type]


def attempt(*places: Place) -> tuple[list[Failure], list[str]]:
    signals, said = Signals(), []
    with signals.listening() as wakeup:
        return Attempt(places, signals, wakeup, said.append).run(), said


def policy(**given: object) -> Policy:
    free = {"max_restarts": 3, "min_processes": 1, "fits": lambda n: True, "progress": lambda: 0}
    return Policy(**{**free, "record": lambda kind, **fields: None, **given})  # type: ignore[arg-type]


def test_the_others_are_ended_when_a_process_fails_that_ends_the_job():
    failures, _ = attempt(place("rank", "end_job", FOREVER), place("rank", "end_job", "raise SystemExit(1)", 1))
    assert [(f.member.place.index, f.code) for f in failures] == [(1, 1), (0, -9)]


def test_a_job_is_done_when_its_ranks_are_and_then_others_serve_nobody():
    failures, _ = attempt(place("trainer", "end_job", ""), place("server", "restart", FOREVER))
    assert failures == []


def test_a_process_that_may_be_lost_is_let_go(tmp_path: Path):
    until = f"import time, pathlib\nwhile not pathlib.Path({str(tmp_path / 'gone')!r}).exists(): time.sleep(0.01)"
    going = f"import pathlib; pathlib.Path({str(tmp_path / 'gone')!r}).touch(); raise SystemExit(1)"
    failures, said = attempt(place("trainer", "end_job", until), place("client", "ignore", going))
    assert failures == []
    assert len(said) == 1
    assert "client 0" in said[0]
    assert "exit code 1; the others go on without it" in said[0]


def test_a_process_of_a_role_that_restarts_is_started_again_alone(tmp_path: Path):
    twice = (
        f"import pathlib; mark = pathlib.Path({str(tmp_path / 'mark')!r}); before = mark.exists(); mark.touch()\n"
        f"if before: pathlib.Path({str(tmp_path / 'again')!r}).touch()\n"
        "raise SystemExit(1)"
    )
    until = f"import time, pathlib\nwhile not pathlib.Path({str(tmp_path / 'again')!r}).exists(): time.sleep(0.01)"
    failures, said = attempt(place("trainer", "end_job", until), place("server", "restart", twice))
    assert failures == []
    assert "started again in 1 s" in said[0]


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
