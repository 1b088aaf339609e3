"""The CNI operations: order, roll-back and recovery.

Rule: an ADD that does not answer with success leaves nothing but what its DEL removes.

Theory. ADD: reserve addresses, make the veth pair, save the endpoint, wait until the forwarder
takes packets from it, answer. Each step is undone in reverse when a later one fails. DEL runs the
same way back and succeeds on what is gone. After a crash recover() removes what has no record:
pairs and reservations of an interrupted ADD, and records whose pair a reboot took away. Whether the
node can take pods is the agent's to say: without node addressing ADD answers "try again later".
Operations on one container are serialised by the server, GC runs alone.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from dataplane.cni import check, result, wire
from dataplane.cni.deletes import Deletes
from dataplane.cni.endpoints import Endpoint, Endpoints, Key
from dataplane.cni.errors import CniError, Code
from dataplane.cni.model import Attachment, NodeAddressing, host_name
from dataplane.cni.protocol import Request
from ipam.errors import AllocationExhausted, IpamError
from ipam.model import Lease
from ipam.service import Ipam

READY_S = 40.0  # the shim waits 60 s


class Backend:
    """ADD, DEL, CHECK, STATUS and GC over the kernel, the addresses and the endpoint records."""

    def __init__(
        self,
        ipam: Ipam,
        endpoints: Endpoints,
        node: Callable[[], NodeAddressing | None],
        ready: Callable[[Endpoint], Awaitable[None]],
        queue_count: int,
        deletes: Deletes | None = None,
    ) -> None:
        """node() is None while the node cannot take pods; ready() returns when packets pass."""
        self.ipam = ipam
        self.endpoints = endpoints
        self.node = node
        self.ready = ready
        self.queue_count = queue_count
        self.deletes = deletes

    async def handle(self, request: Request) -> dict[str, Any] | None:
        """Carry out one request; returns what the runtime gets. Raises CniError."""
        match request.command:
            case "ADD":
                return await self.add(request)
            case "DEL":
                await self.delete(request.key)
            case "CHECK":
                await self.check(request)
            case "GC":
                await self.collect(request)
            case _:
                self._require_node(Code.NOT_AVAILABLE)
        return None

    async def add(self, request: Request) -> dict[str, Any]:
        """Attach a container; returns the result. Raises CniError, leaving nothing behind."""
        node = self._require_node(Code.TRY_LATER)
        await self._forget_remembered(request)
        async with AsyncExitStack() as undo:
            lease = self._allocate(request, undo)
            attachment = Attachment.plan(
                request.container_id,
                request.ifname,
                request.netns,
                tuple(lease.addresses[family] for family in sorted(lease.addresses)),
                node,
                self.queue_count,
            )
            if not attachment.addresses:
                message = f"no address of {lease.addresses} has a router address on this node"
                raise CniError(Code.TRY_LATER, message)
            index = await _in_thread(wire.attach, attachment)
            undo.push_async_callback(_in_thread, wire.detach, attachment.host_ifname)
            endpoint = self._record(request, attachment, index)
            undo.callback(self.endpoints.delete, endpoint.key)
            self.endpoints.save(endpoint)
            await self._wait_ready(endpoint)
            undo.pop_all()
        return result.build(request.version, attachment, request.previous)

    async def delete(self, key: Key) -> None:
        """Detach; succeeds when there is nothing left to do."""
        host_ifname = host_name(key[1], key[2])
        await _in_thread(wire.detach, host_ifname)
        self.endpoints.delete(key)
        self.endpoints.forget_broken(host_ifname)
        self.ipam.release(key)

    async def check(self, request: Request) -> None:
        """Compare the kernel with the result of the ADD. Raises CniError CHECK_FAILED."""
        node = self._require_node(Code.TRY_LATER)
        endpoint = self.endpoints.get(request.key)
        lease = next((lease for lease in self.ipam.leases() if lease.key == request.key), None)
        if endpoint is None or lease is None:
            missing = "endpoint" if endpoint is None else "address reservation"
            raise CniError(
                Code.CHECK_FAILED,
                f"container {request.container_id} has no {missing} for {request.ifname}: "
                "delete the pod, so that it is made again",
            )
        attachment = Attachment.plan(
            request.container_id,
            request.ifname,
            request.netns,
            tuple(a for a in (endpoint.address4, endpoint.address6) if a is not None),
            node,
            endpoint.queue_count,
        )
        attachment = replace(attachment, hook=endpoint.hook)  # as it was attached
        found = check.differences(
            attachment, request.previous or {}, *await _in_thread(check.look, attachment)
        )
        if found:
            message = f"{request.ifname} of {request.container_id}: {found[0]}"
            raise CniError(Code.CHECK_FAILED, message, "; ".join(found))

    async def collect(self, request: Request) -> None:
        """GC: detach what this network has and the runtime no longer knows."""
        valid = request.valid_attachments
        keys = {endpoint.key for endpoint in self.endpoints}
        keys |= {lease.key for lease in self.ipam.leases()}
        failures = []
        for key in sorted(keys):
            if key[0] == request.network and key[1:] not in valid:
                try:
                    await self.delete(key)
                except (CniError, IpamError, OSError) as error:
                    failures.append(f"{key[1]}/{key[2]}: {error}")
        if failures:
            message = f"{len(failures)} attachments could not be removed"
            raise CniError(Code.KERNEL_REFUSED, message, "; ".join(failures))

    async def recover(self) -> list[str]:
        """At the agent's start: remove what a crash or a reboot left half. Returns the names."""
        ends = await _in_thread(wire.host_ends)
        gone = [endpoint.key for endpoint in self.endpoints if endpoint.host_ifname not in ends]
        known = {endpoint.host_ifname for endpoint in self.endpoints} | set(self.endpoints.broken)
        strays = sorted(set(ends) - known)
        for host_ifname in strays:
            await _in_thread(wire.detach, host_ifname)
        recorded = {endpoint.key for endpoint in self.endpoints} - set(gone)
        unrecorded = [
            lease.key
            for lease in self.ipam.leases()
            if lease.key not in recorded and host_name(*lease.key[1:]) not in self.endpoints.broken
        ]
        for key in {*gone, *unrecorded}:
            await self.delete(key)
        return strays + sorted("/".join(key) for key in {*gone, *unrecorded})

    async def replay(self) -> int:
        """Do the DELs that were remembered while the agent was away; returns how many."""
        count = 0
        for path, request in self.deletes.pending() if self.deletes else ():
            await self.delete(request.key)
            path.unlink(missing_ok=True)
            count += 1
        return count

    def take_unreadable(self) -> dict[str, str]:
        """Files that were no DEL and have been removed: name -> reason; each is told once."""
        found = dict(self.deletes.unreadable) if self.deletes else {}
        if self.deletes:
            self.deletes.unreadable.clear()
        return found

    async def _forget_remembered(self, request: Request) -> None:
        found = self.deletes.of(request.container_id, request.ifname) if self.deletes else None
        if found is not None:
            path, remembered = found
            await self.delete(remembered.key)
            path.unlink(missing_ok=True)

    def _require_node(self, code: Code) -> NodeAddressing:
        node = self.node()
        if node is None:
            message = "this node cannot take pods yet; `penstock status` says what it waits for"
            raise CniError(code, message)
        return node

    def _allocate(self, request: Request, undo: AsyncExitStack) -> Lease:
        owner = {
            "namespace": request.arguments.get("K8S_POD_NAMESPACE", ""),
            "name": request.arguments.get("K8S_POD_NAME", ""),
            "uid": request.arguments.get("K8S_POD_UID", ""),
        }
        held = any(lease.key == request.key for lease in self.ipam.leases())
        try:
            lease = self.ipam.allocate(*request.key, owner)
        except AllocationExhausted as error:
            raise CniError(Code.POOL_EXHAUSTED, str(error)) from error
        if not held:  # a repeated ADD must not give away what the standing attachment uses
            undo.callback(self.ipam.release, request.key)
        return lease

    def _record(self, request: Request, attachment: Attachment, index: int) -> Endpoint:
        before = self.endpoints.get(request.key)
        by_family = {address.version: address for address in attachment.addresses}
        return Endpoint(
            number=before.number if before else self.endpoints.next_number(),
            network=request.network,
            container_id=request.container_id,
            ifname=request.ifname,
            netns=request.netns,
            host_ifname=attachment.host_ifname,
            host_ifindex=index,
            mac=attachment.mac,
            host_mac=attachment.host_mac,
            mtu=attachment.mtu,
            queue_count=attachment.queue_count,
            address4=by_family.get(4),  # type: ignore[arg-type]
            address6=by_family.get(6),  # type: ignore[arg-type]
            pod_namespace=request.arguments.get("K8S_POD_NAMESPACE", ""),
            pod_name=request.arguments.get("K8S_POD_NAME", ""),
            pod_uid=request.arguments.get("K8S_POD_UID", ""),
            port_mappings=request.port_mappings,
            hook=attachment.hook,
        )

    async def _wait_ready(self, endpoint: Endpoint) -> None:
        try:
            async with asyncio.timeout(READY_S):
                await self.ready(endpoint)
        except TimeoutError as error:
            message = (
                f"the forwarder did not take {endpoint.host_ifname} in time "
                f"({error or f'{READY_S:g} s'}); `penstock status` shows whether it runs"
            )
            raise CniError(Code.TRY_LATER, message) from None


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Kernel work outside the event loop, whose outcome is never lost.

    A cancellation is put off until the work is done and its undoing can be noted.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return work.result()
