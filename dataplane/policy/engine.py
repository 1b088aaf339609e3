"""The policy engine: objects and this node in, identities and policies in shared memory out.

Rule: update() is the only way in; it writes differences, and what it cannot do it says and leaves
as it was.

Theory. A turn: the directory says who holds which address; subjects say which policies select which
pods of this node; the distiller makes drafts of policy rows, for which the partition sorts peers
into groups; the publisher writes. Selectors that are no longer asked for are taken away after that,
in a second and smaller round, so that at no moment something is missing. An engine begins with what
its predecessor left in the tables (adopt.py), and begins anew in the same way after an error that
nobody expected.
"""

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataplane.objects.collect import Objects
from dataplane.policy import adopt
from dataplane.policy.backends import Backends
from dataplane.policy.directory import Directory
from dataplane.policy.distil import Distiller, Turn
from dataplane.policy.explain import Explainer
from dataplane.policy.lint import Linter
from dataplane.policy.names import Names
from dataplane.policy.options import LocalView, PolicyOptions
from dataplane.policy.partition import Partition
from dataplane.policy.parts import Parts
from dataplane.policy.publish import NoRow, Prepared, Publisher
from dataplane.policy.rulebook import Rulebook
from dataplane.policy.subjects import Subjects
from dataplane.policy.why import Why, question
from dataplane.tables.errors import TableFull
from dataplane.tables.names import NameWriter
from dataplane.tables.names_view import NameReader
from dataplane.tables.policies import CLOSED, OPEN, PolicyWriter
from xdp.abi import value

RETRY_S = 5.0  # what was refused is tried again so often, if something changed
TOLD_MOST = 10  # pods whose refusal is told one by one
HOST_IDENTITY = value("IDENTITY_HOST")


class PolicyEngine:
    """Keeps identities and policies of this node in line with objects and endpoints."""

    def __init__(
        self,
        writer: PolicyWriter,
        options: PolicyOptions,
        rules_file: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """rules_file: where numbers of rules are kept, beside the tables."""
        self.options, self._writer, self._clock = options, writer, clock
        self.names = NameWriter(writer.shm, writer.clock)
        self.book = Rulebook(rules_file)
        self._problems: list[str] = []
        self._reset()

    def _reset(self) -> None:
        """Forget everything but the tables."""
        options = self.options
        self._objects, self._local = Objects(), LocalView("")
        self.partition = Partition(options.cidr_match == "kubernetes", options.wide_from)
        self.backends = Backends()
        self.partition.selection.resolve = self.backends.addresses
        self.partition.selection.names = Names(self.names)
        self.directory = Directory(self.partition)
        self.parts = Parts(self.partition.selection, self.book, options)
        self.subjects = Subjects(options)
        self.distiller = Distiller(self.partition, self.parts, self.subjects, options.entries_max)
        self._publisher = Publisher(self._writer, self.partition, self.book)
        self._first = True
        self._retry_at = 0.0
        self._explainer: Explainer | None = None

    @property
    def objects(self) -> Objects:
        """The objects that are in force."""
        return self._objects

    @property
    def local(self) -> LocalView:
        """This node as it is in force."""
        return self._local

    def update(self, objects: Objects, local: LocalView) -> list[str]:
        """Bring the tables in line; return problems, each with value, limit and fix.

        While the node's own object is missing nothing is known to be true, and nothing is changed.
        """
        if local.node not in objects.nodes:
            return [f"no Node {local.node!r} among the objects: policies stay as they are"]
        if objects is self._objects and local == self._local and not self._first:
            return self._problems
        collecting = self._first and gc.isenabled()
        if collecting:  # a third of the time goes to looking for garbage that is not there
            gc.disable()
        try:
            self._update(objects, local)
        except Exception:
            self._reset()  # the tables are as good as they were; the next turn works it all out
            raise
        finally:
            if collecting:
                gc.enable()
        return self._problems

    def _update(self, objects: Objects, local: LocalView) -> None:
        self._objects, host_before = objects, self._local.host_port
        self._local = local
        ports = self.directory.update(objects, local)
        for port in ports:
            self.subjects.set_endpoint(port, self.directory.holders.get(port))
        ports |= self.subjects.set_policies(objects)
        selection = self.partition.selection
        if self.backends.update(objects, bool(selection.services)):
            for selected in selection.services:
                addresses = self.backends.addresses(selected.what)  # type: ignore[arg-type]
                self.partition.networks.set_addresses(selected, addresses)
        if self.distiller.refused and self._clock() >= self._retry_at:
            ports |= self.distiller.refused.keys()
        with self._writer.changing():
            changed = self._turn(ports)
            changed |= self._set_host(host_before, local.host_port)
            changed |= self._purge()
            if self._first:
                selection.names.keep()
            if selection.names.publish() or changed:
                self._writer.rejudge()
        if self._first:
            self.book.release_all_but(self.parts.rules())
        self.book.flush()
        members = self.partition.members
        self.book.forget_identities(lambda: {kind.number for kind in members.values()})
        self._first = False
        self._problems = self._say()

    # --- a turn -----------------------------------------------------------------------------------

    def _turn(self, ports: set[int]) -> bool:
        """Write what follows for these ports and from the peers; return whether that was news."""
        turn = self.distiller.begin(ports)
        regrouped = self.partition.regroup()
        heritage = adopt.peers(self._writer, self.partition) if self._first else None
        self._publisher.number(regrouped, heritage)
        self.distiller.distil(turn, regrouped)
        if heritage is not None:
            adopt.policies(heritage, self._writer, turn)
        prepared = self._prepare(turn, heritage)
        self.book.flush()
        changed = self.partition.selection.names.publish()
        changed |= self._publisher.publish(turn, prepared, regrouped, heritage)
        after = turn.now(self.distiller.of_port)
        touched = ports | turn.assign.keys() | turn.closed
        late = self.distiller.joining(turn, after)
        changed |= self._publisher.publish_subjects(after, self.subjects, touched - late)
        emptied = self.distiller.finish(turn)
        changed |= self._publisher.narrow(prepared)
        changed |= self._publisher.publish_subjects(after, self.subjects, touched & late)
        changed |= self._publisher.remove(turn, emptied)
        if heritage is not None:
            rows = {row.number for row in self.distiller.rows.values()}
            mine = set(self.directory.endpoints)
            if self._local.host_port is not None:
                mine.add(self._local.host_port)
            changed |= adopt.tidy(self._writer, self.partition, prepared.wanted, rows, mine)
        if self.distiller.refused:
            self._retry_at = self._clock() + RETRY_S
        return changed

    def _prepare(self, turn: Turn, heritage: adopt.Heritage | None) -> Prepared:
        """Give up drafts until the rest fits."""
        everything = set(turn.drafts)
        room = self._publisher.room if heritage is None else self._writer.entries.most
        while True:
            self.distiller.fit(turn, room)
            try:
                prepared = self._publisher.prepare(turn, heritage)
                break
            except NoRow as error:
                row, why = error.row, str(error)
            except TableFull as error:
                if not turn.drafts:
                    raise
                row, why = max(turn.drafts, key=lambda one: turn.drafts[one].growth), str(error)
            self.distiller.refuse(turn, row, f"has no place: {why}")
        for row in everything - turn.drafts.keys():
            if not row.stands:
                self._publisher.give_up(row)
        return prepared

    def _purge(self) -> bool:
        """Take away what nobody asks for any more; return whether addresses changed by that."""
        self.parts.purge()
        self.partition.selection.purge()
        regrouped = self.partition.regroup()
        if not (regrouped.fresh or regrouped.moved or regrouped.gone or self.partition.moves):
            return False
        self._publisher.number(regrouped)
        turn = Turn()
        self.distiller.distil(turn, regrouped)
        prepared = self._publisher.prepare(turn)
        changed = self._publisher.publish(turn, prepared, regrouped, None)
        self.distiller.finish(turn)
        self._publisher.narrow(prepared)
        self._publisher.remove(turn, ())
        return changed

    def _set_host(self, before: int | None, port: int | None) -> bool:
        """The node's own stack is the host, and open."""
        changed = False
        if before not in (None, port) and before not in self.directory.endpoints:
            changed = self._writer.set_subject(before, 0, CLOSED)  # type: ignore[arg-type]
        if port is not None:
            changed |= self._writer.set_subject(port, HOST_IDENTITY, OPEN)
        return changed

    def _say(self) -> list[str]:
        refused = [text for _, text in sorted(self.distiller.refused.items())]
        if len(refused) > TOLD_MOST:
            refused[TOLD_MOST:] = [f"{len(refused)} pods in all have no policy that fits"]
        problems = [*self._publisher.problems(), *self.partition.selection.names.problems()]
        return [*refused, *problems, *self.directory.problems()]

    # --- questions --------------------------------------------------------------------------------

    def ready_for(self, port: int) -> bool:
        """Return whether an endpoint's policy is in force: its pod may send and receive."""
        return port in self.distiller.of_port

    def explainer(self) -> Explainer:
        """Return who explains the objects that are in force."""
        if self._explainer is None or self._explainer.objects is not self._objects:
            names = NameReader(self._writer.shm)
            self._explainer = Explainer(self._objects, self.options, self._local, names)
        return self._explainer

    def why(self, source: str, target: str, what: str) -> dict[str, Any]:
        """Return whether one may talk to another, and why; what: PORT/PROTOCOL. Raises Unknown."""
        return Why(self.explainer()).answer(question(source, target, what))

    def lint(self) -> list[dict[str, str]]:
        """Return what is surprising in the policies."""
        return [one.plain() for one in Linter(self.explainer()).findings()]

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (in use, limit) of each table."""
        return self._writer.usage()

    def close(self) -> None:
        """Close the book of rules."""
        self.book.close()
