"""The order of an examination: look at the machine, meet, start JAX, measure, judge."""

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxdist.cluster.doctor import facts, machines, network
from jaxdist.cluster.doctor.findings import Facts, Finding, Ranks, Report, known, merged
from jaxdist.cluster.doctor.meeting import Meeting, NotMet, meet
from jaxdist.config.schema import Config
from jaxdist.runtime.resolve_cluster import Cluster


@dataclass
class Examination:
    """One rank's part of it. `report()` is whole on process 0, and on a rank that could not meet it."""

    cluster: Cluster
    given: Mapping[str, Any]  # of it on the command line, for `join`
    config: Config | None
    expected_devices: int | None  # of each process
    timeout: float  # seconds for the others to come, and for each thing that is done
    ranks: dict[int, Facts] = field(default_factory=dict)
    meeting: Meeting | None = None

    def run(self) -> int:
        """Examine; returns the exit code, the same on all ranks that met."""
        place = self.cluster
        mine = facts.gather(self._of_the_machine())
        self.ranks[place.process_id] = {"errors": {}}
        try:
            self.meeting = meet(place.coordinator, place.process_id, place.num_processes, self.timeout)
            return self._together(self.meeting, mine)
        except NotMet as error:
            mine["lost"] = str(error)
        self.meeting = None
        self.ranks = {place.process_id: mine}
        return self.report().exit_code

    @property
    def reports(self) -> bool:
        return self.meeting is None or self.meeting.index == 0

    def report(self) -> Report:
        return Report(judge(self.ranks), dict(known(self.ranks, "host")), self.cluster.num_processes)

    def leave(self) -> None:
        """To be called before the process ends."""
        if self.meeting is not None and self.meeting.index == 0:
            self.meeting.wait_until_others_left()

    @property
    def _directory(self) -> Path:
        return Path("runs") if self.config is None else self.config.run_dir

    def _of_the_machine(self) -> dict[str, Callable[[], Any]]:
        place = self.cluster
        host = (place.coordinator or "").rpartition(":")[0].strip("[]")
        where = {
            "processes": place.num_processes,
            "source": place.source,
            "why": place.why,
            "coordinator": host or None,
            "coordinator_addresses": facts.resolved(host) if host else None,
            "local_device_ids": place.local_device_ids,
        }
        return {
            "cluster": lambda: where,
            "expected_devices": lambda: self.expected_devices,
            "host": socket.gethostname,
            "versions": facts.versions,
            "gpus": facts.gpus,
            "addresses": lambda: facts.resolved(socket.gethostname()),
            "interfaces": facts.interfaces,
            "infiniband": facts.infiniband,
            "environment": facts.environment,
            "limits": facts.limits,
            "shared_memory": facts.shared_memory,
            "memory": facts.available_memory,
            "directory": lambda: facts.directory(self._directory),
            "compile_cache": self._compile_cache,
        }

    def _compile_cache(self) -> Any:
        from jaxdist.telemetry.compile_cache import enable_compile_cache

        where = enable_compile_cache("auto" if self.config is None else self.config.telemetry.compile_cache)
        return None if where is None else facts.directory(where)

    def _together(self, meeting: Meeting, mine: Facts) -> int:
        def share(new: Facts, conclude: Callable[[], Any] = lambda: None) -> Any:
            def note_and_conclude(everyones: dict[int, Facts]) -> Any:
                self._note(meeting, everyones)
                return conclude()

            return meeting.together(new, note_and_conclude)

        meeting.compare_clocks()
        word = facts.nearest(self._directory) / f".jaxdist-doctor-{secrets.token_hex(8)}"
        try:
            told = share(mine, lambda: {"hosts": sorted({host for _, host in known(self.ranks, "host")}),
                                        "word": _write(word)})  # fmt: skip
            sight: dict[str, Callable[[], Any]] = {}
            if meeting.index or meeting.lines:
                sight["resolves"] = lambda: {host: facts.resolved(host) for host in told["hosts"]}
                if told["word"]:
                    sight["sees_first"] = (facts.nearest(self._directory) / told["word"]).is_file
            all_here = share(facts.gather(sight), lambda: not meeting.lost)
        finally:
            with contextlib.suppress(OSError):  # the others have written none
                word.unlink()
        if all_here:
            devices = facts.gather({"devices": self._devices}, self.timeout)
            if share(devices, self._all_have("devices")):
                self._measure(share)
        return share({}, lambda: self.report().exit_code)

    def _devices(self) -> dict[str, Any]:
        from jaxdist.cluster.doctor.measure import devices
        from jaxdist.runtime.topology import join

        if self.cluster.num_processes > 1:  # a rank that is lost is a finding, and no reason for others to leave
            os.environ["JAXDIST_HEARTBEAT_SECONDS"] = "3600"
        join(**self.given)
        return devices()

    def _measure(self, share: Callable[..., Any]) -> None:
        """With devices on all ranks: the state of the run, and all-reduces on its mesh."""
        import jax

        from jaxdist.cluster.doctor.measure import all_reduce_rates
        from jaxdist.mesh import build_mesh

        mesh = build_mesh({"data": -1}, jax.devices())
        if (config := self.config) is not None:
            meshes: list[Any] = []
            state = facts.gather({"state": lambda: _state(config, meshes)}, self.timeout)
            if share(state, self._all_have("state")) and meshes:
                mesh = meshes[0]
        share(facts.gather({"all_reduce": lambda: all_reduce_rates(mesh)}, self.timeout))

    def _all_have(self, name: str) -> Callable[[], bool]:
        return lambda: len(dict(known(self.ranks, name))) == self.cluster.num_processes

    def _note(self, meeting: Meeting, everyones: dict[int, Facts]) -> None:
        for rank, new in everyones.items():
            own = self.ranks.setdefault(rank, {"errors": {}})
            own.update(new, errors={**own["errors"], **new.get("errors", {})})
        for rank, clock in meeting.clocks.items():
            self.ranks[rank]["clock"] = clock
        for rank, why in meeting.lost.items():
            self.ranks.setdefault(rank, {"errors": {}})["lost"] = why


def judge(ranks: Ranks) -> list[Finding]:
    """Everything that the ranks' facts say; pure."""
    checks = (*network.CHECKS, *machines.CHECKS, network.all_reduce)
    return merged(finding for check in checks for finding in check(ranks))


def _write(path: Path) -> str | None:
    with contextlib.suppress(OSError):  # that it cannot be written is found elsewhere
        path.touch()
        return path.name
    return None


def _state(config: Config, meshes: list[Any]) -> dict[str, int]:
    """Bytes of the run's state, how many checkpoints are kept, bytes of those that are there."""
    from jaxdist.cluster.doctor.measure import state_bytes
    from jaxdist.run import build

    strategy = build(config).strategy
    if (mesh := getattr(strategy, "mesh", None)) is not None:
        meshes.append(mesh)
    best = config.checkpoint.keep_best
    return {
        **state_bytes(strategy.abstract_state()),
        "kept": config.checkpoint.keep + (best.number if best is not None else 0),
        "saved": facts.bytes_in(config.run_dir / "checkpoints"),
    }
