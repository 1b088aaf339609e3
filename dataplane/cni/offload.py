"""The transmit checksum offload of an interface of the calling thread's namespace.

Rule: off on every pod interface; CHECK looks at it again.

Theory. veth offers checksum offload and hands packets over with a partial checksum, which the far
end's stack trusts. A forwarder sees raw bytes and sends them on to other nodes, so the checksum
must be complete: ETHTOOL_STXCSUM (linux/ethtool.h) makes the pod's kernel compute it.
"""

import ctypes
import fcntl
import socket
import struct

_SIOCETHTOOL = 0x8946
_ETHTOOL_GTXCSUM = 0x16
_ETHTOOL_STXCSUM = 0x17


def checksum_is_on(ifname: str) -> bool:
    """Whether the interface leaves checksums to the hardware. Raises OSError."""
    return _ethtool(ifname, _ETHTOOL_GTXCSUM, 0) != 0


def checksum_off(ifname: str) -> None:
    """Make the kernel complete checksums of what the interface sends. Raises OSError."""
    _ethtool(ifname, _ETHTOOL_STXCSUM, 0)


def _ethtool(ifname: str, command: int, data: int) -> int:
    value = (ctypes.c_uint32 * 2)(command, data)  # struct ethtool_value
    request = struct.pack("16sP", ifname.encode(), ctypes.addressof(value))  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCETHTOOL, request)
    return value[1]
