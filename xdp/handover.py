"""What a forwarder leaves to the next one: file descriptors that the supervisor keeps for it.

Rule: what is kept is named; keeping a name again lets go of what it stood for.

Theory. A program stays on an uplink, and the flow table in the kernel, while somebody has them
open. If that were the forwarder alone, established flows would end with it. So it sends its
descriptors to its supervisor (SCM_RIGHTS, unix(7)), which does nothing with them but to hand them
to the next forwarder, as systemd's file descriptor store does. When the supervisor ends as well,
the kernel closes them: nothing stays on an uplink. In an upgrade the next one is started while its
predecessor still forwards, and waits for its turn (Gate, Turn) when it has prepared what takes
long; what is kept is given to it then, as it stands at that moment.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

CHANNEL, KEPT = "PENSTOCK_STORE", "PENSTOCK_KEPT"  # environment of the forwarder
TURN = "PENSTOCK_TURN"
KEEP, DROP = b"+", b"-"
NAME_MAX = 64
KEPT_MAX = 250  # descriptors in one message: SCM_MAX_FD is 253


class Store:
    """The supervisor's side."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._mine, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._mine.setblocking(False)
        self._kept: dict[str, int] = {}

    def listen(self) -> None:
        """Take in what arrives, in the running event loop."""
        asyncio.get_running_loop().add_reader(self._mine.fileno(), self.take_in)

    def take_in(self) -> None:
        """Do what has been asked for so far."""
        while True:
            try:
                message, fds, _, _ = socket.recv_fds(self._mine, NAME_MAX, 1)
            except BlockingIOError:
                return
            self._forget(message[1:].decode())
            if message[:1] == KEEP and fds:
                self._kept[message[1:].decode()] = fds[0]

    def _forget(self, name: str) -> None:
        if name in self._kept:
            os.close(self._kept.pop(name))

    def inheritance(self) -> tuple[dict[str, str], list[int]]:
        """Return the environment and the descriptors that a child starts with."""
        self.take_in()
        kept = " ".join(f"{name}={fd}" for name, fd in self._kept.items())
        channel = self._theirs.fileno()
        return {CHANNEL: str(channel), KEPT: kept}, [channel, *self._kept.values()]

    def given(self) -> tuple[list[str], list[int]]:
        """Return the names of what is kept now, and its descriptors."""
        self.take_in()
        return list(self._kept), list(self._kept.values())


class Gate:
    """The supervisor's side of a successor's waiting."""

    def __init__(self) -> None:
        """Make the channel; the child's end goes to the child."""
        self._mine, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._mine.setblocking(False)

    def inheritance(self) -> tuple[dict[str, str], list[int]]:
        """Return the environment and the descriptors that the child starts with."""
        return {TURN: str(self._theirs.fileno())}, [self._theirs.fileno()]

    async def prepared(self) -> bool:
        """Wait until the child, which has been started, is prepared; False: it has ended."""
        self._theirs.close()
        return bool(await asyncio.get_running_loop().sock_recv(self._mine, NAME_MAX))

    def open(self, store: Store) -> None:
        """Let the child begin, with what is kept now; a child that has died does not matter."""
        names, fds = store.given()
        with contextlib.suppress(OSError):
            socket.send_fds(self._mine, [" ".join(names).encode() or b" "], fds)

    def close(self) -> None:
        """Let go of the channel: a child that still waits ends."""
        self._mine.close()


class Turn:
    """The successor's side; who was not started beside a predecessor has no turn to wait for."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """environment: where the supervisor says that there is a predecessor."""
        channel = environment.get(TURN, "")
        self._channel = socket.socket(fileno=int(channel)) if channel else None

    @property
    def waits(self) -> bool:
        """Whether a predecessor still works."""
        return self._channel is not None

    def wait(self, handover: "Handover") -> None:
        """Say that all is prepared and return when it is time. Raises EOFError: there is none.

        handover: takes what is kept now.
        """
        if self._channel is None:
            return
        self._channel.send(b"prepared")
        message, fds, _, _ = socket.recv_fds(self._channel, KEPT_MAX * NAME_MAX, KEPT_MAX)
        self._channel.close()
        if not message:
            raise EOFError("the predecessor goes on")
        handover.kept = dict(zip(message.decode().split(), fds, strict=True))


class Handover:
    """The forwarder's side; without a supervisor it keeps nothing."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """environment: where the supervisor says what it has."""
        channel = environment.get(CHANNEL, "")
        self._channel = socket.socket(fileno=int(channel)) if channel else None
        pairs = (text.partition("=") for text in environment.get(KEPT, "").split())
        self.kept = {name: int(fd) for name, _, fd in pairs}

    @property
    def kept_by_another(self) -> bool:
        """Whether what is handed over outlives this process."""
        return self._channel is not None

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept; it stays open here as well."""
        if self._channel is not None:
            socket.send_fds(self._channel, [KEEP + name.encode()], [fd])

    def drop(self, name: str) -> None:
        """Have what was kept by that name let go of."""
        if self._channel is not None:
            self._channel.send(DROP + name.encode())
