"""Services kept in force: what changed is compiled, and only differences are written.

Rule: after `update` the tables say what the objects say, however they got there; what does not fit
is told and leaves the rest in force.

Theory. An update has five steps: what changed is found (follow.py) and compiled (compile.py);
claims on frontends are settled (claims.py); rows are written; frontends are led to them; what is
over goes. So a frontend that moves between services leads to one of them at any time. After a
restart the first update takes over what stands and then removes the rest. A service whose Maglev
table has no room is served by hash meanwhile; what does not fit at all is tried again.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dataplane.objects.collect import Objects
from dataplane.objects.services import Service
from dataplane.services.claims import NO_AGE, Claims, Wish, shown
from dataplane.services.compile import CLUSTER_IP, compile_host_port, compile_service
from dataplane.services.follow import Follower, Subject
from dataplane.services.model import (
    CLUSTER_ADDRESSES,
    OUTSIDE_ADDRESSES,
    Address,
    Compiled,
    HealthCheck,
    HostPort,
    ServiceOptions,
    halves,
)
from dataplane.services.names import NamesFile
from dataplane.tables.errors import TableFull
from dataplane.tables.frontends import Key
from dataplane.tables.services import ServiceRow, ServiceWriter
from xdp.abi import CONST

ADDRESS = CONST["SERVICE_ADDRESS"]
RETRY_S = 1.0  # what did not fit is tried again so often,
RETRY_MOST = 50  # and so much of it
PROBLEMS_MOST = 100  # that are told one by one

Wishes = tuple[tuple[Key, Wish], ...]


@dataclass(frozen=True, slots=True)
class _Unfit:
    """A row that could not be written, or not with its tables."""

    says: ServiceRow
    subject: Subject | None
    why: str


class ServiceEngine:
    """Drives a ServiceWriter by objects."""

    def __init__(
        self,
        writer: ServiceWriter,
        options: ServiceOptions,
        names_file: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """names_file: where the names of rows are kept for who has no agent to ask."""
        self._writer, self._clock = writer, clock
        self._names = NamesFile(names_file, clock)
        self._follower = Follower(options)
        self._compiled: dict[Subject, Compiled] = {}
        self._wishes: dict[Subject, Wishes] = {}
        self._claims = Claims()
        self._nodes: tuple[object, object] = (None, None)
        self._node_ips: set[tuple[int, int]] = set()
        self._told: dict[Subject, tuple[str, ...]] = {}
        self._unfit: dict[str, _Unfit] = {}
        self._unfit_frontends: dict[Key, str] = {}
        self._tried_at = 0.0
        self._health: dict[Subject, tuple[int, HealthCheck]] = {}
        self._names_problem = ""
        self._started = False

    # --- what others call -------------------------------------------------------------------------

    def update(
        self,
        objects: Objects,
        node_name: str,
        node_addresses: Collection[Address],
        host_ports: Iterable[HostPort] = (),
    ) -> list[str]:
        """Bring services in force; return what is wrong, for people.

        node_addresses: all addresses of this node that others reach. host_ports: those that pods
        got by CNI. Costs a few milliseconds where nothing changed, at 10 000 services.
        """
        dirty = self._follower.follow(objects, node_name, node_addresses, host_ports)
        self._follow_nodes(objects)
        changed: dict[str, tuple[ServiceRow, Subject | None]] = {}
        if not self._started:
            changed[CLUSTER_ADDRESSES] = (ServiceRow(ADDRESS | CLUSTER_IP), None)
            changed[OUTSIDE_ADDRESSES] = (ServiceRow(ADDRESS), None)
        gone: list[str] = []
        for name, subject in dirty.items():
            fresh = self._compile(subject)
            before = self._compiled.get(name, Compiled())
            self._claim(name, subject, fresh)
            for row, says in fresh.rows.items():
                if before.rows.get(row) != says:
                    changed[row] = (says, name)
            gone += before.rows.keys() - fresh.rows.keys()
            self._keep(name, subject, fresh)
        for row in gone:
            self._unfit.pop(row, None)
        self._retry(changed)
        self._write(changed, gone)
        return self.problems()

    def problems(self) -> list[str]:
        """Return what is wrong now; of very many the first ones."""
        found = [text for texts in self._told.values() for text in texts]
        found += self._claims.problems()
        found += [unfit.why for unfit in self._unfit.values()]
        found += self._unfit_frontends.values()
        if len(found) > PROBLEMS_MOST:
            more = len(found) - PROBLEMS_MOST
            found = [*found[:PROBLEMS_MOST], f"and {more} more problems of services"]
        return [*found, self._names_problem] if self._names_problem else found

    def health_checks(self) -> dict[int, HealthCheck]:
        """Return what health check node ports answer, by port."""
        found: dict[int, HealthCheck] = {}
        for _, (port, check) in sorted(self._health.items(), key=lambda item: str(item[0])):
            found.setdefault(port, check)
        return found

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of each table."""
        return self._writer.usage()

    def flush(self) -> bool:
        """Write the names that wait for their time; call it now and then, and at the end."""
        return self._write_names(now=True)

    # --- compiling --------------------------------------------------------------------------------

    def _compile(self, subject: Service | HostPort | None) -> Compiled:
        here = self._follower.here
        if isinstance(subject, Service):
            return compile_service(subject, self._follower.slices_of(subject), here)
        if isinstance(subject, HostPort):
            return compile_host_port(subject, here)
        return Compiled()

    def _keep(self, name: Subject, subject: Service | HostPort | None, fresh: Compiled) -> None:
        self._told.pop(name, None)
        self._health.pop(name, None)
        if subject is None:
            self._compiled.pop(name, None)
            return
        self._compiled[name] = fresh
        if fresh.problems:
            self._told[name] = fresh.problems
        if fresh.health is not None:
            self._health[name] = fresh.health

    def _claim(self, name: Subject, subject: Service | HostPort | None, fresh: Compiled) -> None:
        before = self._wishes.pop(name, ())
        created, owner = NO_AGE, ""
        if isinstance(subject, Service):
            created = subject.created or NO_AGE
            owner = f"Service {subject.namespace}/{subject.name}"
        elif isinstance(subject, HostPort):
            owner = f"host port of {subject.owner}"
        wishes = tuple(
            (claim.key, Wish(claim.rank, created, owner, claim.row)) for claim in fresh.claims
        )
        if wishes:
            self._wishes[name] = wishes
        if wishes == before:
            return
        stood, stands = set(before), set(wishes)
        for key, wish in stands - stood:
            self._claims.add(key, wish)
        for key, wish in stood - stands:
            self._claims.remove(key, wish)

    def _follow_nodes(self, objects: Objects) -> None:
        """An address of a node is never a service's alone."""
        here = self._follower.here
        if objects.nodes is self._nodes[0] and here.host_ports_at == self._nodes[1]:
            return
        self._nodes = (objects.nodes, here.host_ports_at)
        ips = {halves(at) for node in objects.nodes.values() for at in node.internal_ips}
        ips.update(at for family in here.host_ports_at for at in family)
        changed = {(*at, 0, 0) for at in ips ^ self._node_ips}
        self._claims.touched |= changed.intersection(self._claims.wanted())
        self._node_ips = ips

    # --- writing ----------------------------------------------------------------------------------

    def _retry(self, changed: dict[str, tuple[ServiceRow, Subject | None]]) -> None:
        now = self._clock()
        if now - self._tried_at < RETRY_S or not (self._unfit or self._unfit_frontends):
            return
        self._tried_at = now
        for row, unfit in list(self._unfit.items())[:RETRY_MOST]:
            changed.setdefault(row, (unfit.says, unfit.subject))
        self._claims.touched |= set(list(self._unfit_frontends)[:RETRY_MOST])

    def _write(
        self, changed: dict[str, tuple[ServiceRow, Subject | None]], gone: list[str]
    ) -> None:
        writer = self._writer
        likely: dict[str, list[Key]] = {}
        if not self._started:
            for key in self._claims.wanted():
                likely.setdefault(self._claims.row(key), []).append(key)
        for row, (says, subject) in changed.items():
            self._set_row(row, says, subject, likely.get(row, ()))
        for key in self._claims.touched:
            self._lead(key)
        self._claims.touched.clear()
        for row in gone:
            if row not in changed:
                self._names.dirty |= writer.remove_service(row)
        if not self._started:
            writer.settle()
            self._started = True
        writer.commit()
        self._write_names()

    def _set_row(
        self, row: str, says: ServiceRow, subject: Subject | None, likely: Iterable[Key]
    ) -> None:
        writer = self._writer
        is_new = not writer.row_of(row)
        unfit = self._unfit.pop(row, None)
        try:
            writer.set_service(row, says, likely)
        except TableFull as error:
            self._unfit[row] = _Unfit(says, subject, f"{row}: {error}")
            if says.inside_table is None and says.outside_table is None:
                return
            try:
                plain = replace(says, inside_table=None, outside_table=None)
                writer.set_service(row, plain, likely)
            except TableFull:
                return
            why = f"{row}: served by hash, not by Maglev: {error}"
            self._unfit[row] = _Unfit(says, subject, why)
        self._names.dirty |= is_new
        if unfit is not None and is_new and subject is not None:
            wishes = self._wishes.get(subject, ())
            self._claims.touched |= {key for key, wish in wishes if wish.row == row}

    def _lead(self, key: Key) -> None:
        """Lead a frontend to who has it."""
        row = self._claims.row(key)
        self._unfit_frontends.pop(key, None)
        if not key[3] and key[:2] in self._node_ips:
            row = ""
        if not row or not self._writer.row_of(row):
            self._writer.drop_frontend(key)
            return
        try:
            self._writer.set_frontend(key, row)
        except TableFull as error:
            self._unfit_frontends[key] = f"{row}: {shown(key)}: {error}"

    def _write_names(self, now: bool = False) -> bool:
        try:
            written = self._names.write(self._writer.names, now)
        except OSError as error:
            self._names_problem = f"names of services cannot be written: {error}"
            return False
        self._names_problem = ""
        return written
