"""systemd's notification protocol (sd_notify(3)).

Rule: without NOTIFY_SOCKET every call does nothing.

Theory. One datagram of KEY=VALUE lines; twelve lines do not need a library.
"""

import os
import socket

SEND_S = 1.0
EX_CONFIG = 78  # sysexits.h: a configuration error; a restart does not help


def notify(*lines: str) -> bool:
    """Send lines such as READY=1; return whether somebody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.settimeout(SEND_S)
        try:
            channel.sendto("\n".join(lines).encode(), address)
        except OSError:  # a listener that went away or never reads must not hold the daemon up
            return False
    return True
