"""Health check node ports: what kube-proxy answers, and ports that cannot be had."""

import asyncio
import json
import socket

import aiohttp
import pytest

from dataplane.services.health import HealthServer
from dataplane.services.model import HealthCheck

HERE = HealthCheck("shop", "web", 2)
ELSEWHERE = HealthCheck("shop", "db", 0)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("0.0.0.0", 0))
        return one.getsockname()[1]


async def get(port: int, host: str = "127.0.0.1", path: str = "/"):
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{host}:{port}{path}") as answer:
            return answer.status, answer.headers, json.loads(await answer.text() or "null")


def serving(test, **options) -> None:
    async def main():
        server = HealthServer(**options)
        try:
            await test(server)
        finally:
            await server.close()

    asyncio.run(main())


def test_it_answers_as_kube_proxy_does():
    one, other = free_port(), free_port()

    async def test(server):
        await server.follow({one: HERE, other: ELSEWHERE})
        assert server.problems == []
        status, headers, body = await get(one, path="/any/path")
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (200, "2")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Type"].startswith("application/json")
        assert body == {
            "service": {"namespace": "shop", "name": "web"},
            "localEndpoints": 2,
            "serviceProxyHealthy": True,
        }
        status, headers, body = await get(other)
        assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "0")
        assert body["localEndpoints"] == 0

    serving(test)


def test_both_families_are_served():
    port = free_port()

    async def test(server):
        await server.follow({port: HERE})
        assert (await get(port, "[::1]"))[0] == 200

    if socket.has_ipv6:
        serving(test)


def test_a_forwarder_that_does_not_work_is_no_place_to_send_to():
    port, state = free_port(), {"healthy": False}

    async def test(server):
        await server.follow({port: HERE})
        status, _, body = await get(port)
        assert (status, body["serviceProxyHealthy"], body["localEndpoints"]) == (503, False, 2)
        state["healthy"] = True
        assert (await get(port))[0] == 200

    serving(test, healthy=lambda: state["healthy"])


def test_answers_follow_and_ports_that_go_are_closed():
    port, other = free_port(), free_port()

    async def test(server):
        await server.follow({port: ELSEWHERE})
        assert (await get(port))[0] == 503
        await server.follow({port: HERE, other: HERE})
        assert (await get(port))[0] == 200
        await server.follow({other: HERE})
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(port)
        assert (await get(other))[0] == 200

    serving(test)


def test_a_port_that_is_taken_is_a_problem_until_it_is_free():
    async def test(server):
        with socket.socket() as taken:
            taken.bind(("0.0.0.0", 0))
            taken.listen(1)
            port = taken.getsockname()[1]
            await server.follow({port: HERE})
            assert "shop/web" in server.problems[0]
            assert str(port) in server.problems[0]
        await server.follow({port: HERE})
        assert server.problems == []
        assert (await get(port))[0] == 200

    serving(test)


def test_the_node_as_a_whole():
    port, state = free_port(), {"healthy": True}

    async def test(server):
        await server.follow({}, port)
        status, _, body = await get(port, path="/healthz")
        assert (status, body["nodeEligible"]) == (200, True)
        assert body["lastUpdated"] == body["currentTime"] == "1970-01-01T00:01:40Z"
        state["healthy"] = False
        assert (await get(port, path="/healthz"))[0] == 503
        await server.follow({})
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(port)

    serving(test, healthy=lambda: state["healthy"], clock=lambda: 100.0)
