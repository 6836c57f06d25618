"""Who serves what: pure functions from the shards of a view to those of the next."""

from collections.abc import Sequence
from dataclasses import replace

from jaxdist.parameter_server.messages import Served

Shards = tuple[Served, ...]


def without(shards: Shards, name: str) -> Shards:
    """A server is lost. A backup that is ready takes the place of its primary; else the place is vacant."""

    def changed(served: Served) -> Served:
        if served.primary == name:
            return Served(served.backup, incarnation=served.backup_incarnation) if served.ready else Served(None)
        if served.backup == name:
            return Served(served.primary, incarnation=served.incarnation)
        return served

    return tuple(changed(served) for served in shards)


def filled(shards: Shards, servers: Sequence[tuple[str, int]], backups: bool) -> tuple[Shards, bool] | None:
    """(shards with vacant places given to servers that have none, whether data was lost); None if they are too few.

    Where data was lost, all shards begin anew, and so do their backups.

    Args:
      servers: (name, incarnation) of all that can be used, in order of preference.
    """
    lost = any(served.primary is None for served in shards)
    in_place = {served.primary for served in shards} | {served.backup for served in shards if served.ready}
    halfway = {served.backup for served in shards if not served.ready}
    free = [server for server in servers if server[0] not in in_place]
    free.sort(key=lambda server: server[0] in halfway)  # those have the least to lose, but for the spares
    if lost:
        if len(free) < sum(served.primary is None for served in shards):
            return None
        places = []
        for served in shards:
            name, incarnation = free.pop(0) if served.primary is None else (served.primary, served.incarnation)
            places.append(Served(name, incarnation=incarnation))
        primaries = {served.primary for served in places}
        free = [server for server in servers if server[0] not in primaries]
    else:
        places = list(shards)
        free = [server for server in free if server[0] not in halfway]
    for shard, served in enumerate(places):
        if backups and served.backup is None and free:
            name, incarnation = free.pop(0)
            places[shard] = replace(served, backup=name, backup_incarnation=incarnation)
    return tuple(places), lost
