"""An agent that only serves CNI, for tests: run it inside the node's network namespace.

Rule: address management, backend, wiring and server are the real ones; only the forwarder is not.

Theory. `python -m tests.cni_agent FOLDER`. FOLDER/hold, while it exists, keeps ADDs waiting for the
forwarder; FOLDER/unready makes the node refuse pods. FOLDER/agent.ready says that it listens.
"""

import asyncio
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

from dataplane.cni.backend import Backend
from dataplane.cni.deletes import Deletes
from dataplane.cni.endpoints import Endpoint, Endpoints
from dataplane.cni.model import NodeAddressing
from dataplane.cni.server import CniServer
from ipam.service import Ipam

NODE = NodeAddressing(
    ip_address("10.77.0.1"),
    ip_address("fd77::1"),
    (ip_network("10.77.0.0/27"), ip_network("fd77::/64")),
    1450,
    "02:50:0a:4d:00:01",
)
QUEUES = 2


async def main(folder: Path) -> None:
    """Serve until killed."""

    async def ready(endpoint: Endpoint) -> None:
        while (folder / "hold").exists():
            await asyncio.sleep(0.02)

    ipam = Ipam.open(folder / "ipam.db", rest_s=0)
    ipam.set_node_pools({cidr.version: cidr for cidr in NODE.local_cidrs})
    backend = Backend(
        ipam,
        Endpoints(folder),
        lambda: None if (folder / "unready").exists() else NODE,
        ready,
        QUEUES,
        Deletes(folder / "deletes"),
    )
    server = CniServer(folder / "cni.sock", backend)
    await server.start()
    (folder / "agent.ready").touch()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
