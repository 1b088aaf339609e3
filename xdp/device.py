"""What a network device is and can do, by ethtool's ioctl and sysfs.

Rule: questions and small switches about devices of the calling thread's network namespace.

Theory. linux/ethtool.h. veth offers checksum offload and hands packets over with a partial
checksum, which the far end's stack trusts. A forwarder sees raw bytes and may send them to another
node, so the checksum must be complete: ETHTOOL_STXCSUM makes the sender's kernel compute it.
"""

import ctypes
import errno
import fcntl
import socket
import struct

SIOCETHTOOL = 0x8946
GET_DRIVER, GET_TX_CHECKSUM, SET_TX_CHECKSUM, SET_GRO, GET_CHANNELS = 0x03, 0x16, 0x17, 0x2C, 0x3C
GET_FLAGS, SET_FLAGS, FLAG_TX_VLAN = 0x25, 0x26, 1 << 7


def _ioctl(ifname: str, buffer: ctypes.Array) -> None:
    if len(ifname.encode()) > 15:
        raise OSError(errno.ENODEV, f"device name {ifname!r}: longer than 15 bytes")
    request = struct.pack("16sP", ifname.encode(), ctypes.addressof(buffer))  # struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCETHTOOL, request)


def checksum_is_on(ifname: str) -> bool:
    """Whether the device leaves checksums to the hardware. Raises OSError."""
    value = (ctypes.c_uint32 * 2)(GET_TX_CHECKSUM, 0)
    _ioctl(ifname, value)
    return value[1] != 0


def checksum_off(ifname: str) -> None:
    """Make the kernel complete the checksums of what the device sends. Raises OSError."""
    _ioctl(ifname, (ctypes.c_uint32 * 2)(SET_TX_CHECKSUM, 0))


def coalescing_on(ifname: str) -> None:
    """Let the device coalesce what it receives (GRO), for which it gets NAPI. Raises OSError.

    A veth takes frames that XDP redirects to its peer only with NAPI (drivers/net/veth.c).
    """
    _ioctl(ifname, (ctypes.c_uint32 * 2)(SET_GRO, 1))


def tags_inline(ifname: str) -> None:
    """Let a VLAN tag of what the device sends stand in the packet, not beside it. Raises OSError.

    An XDP program at the other end of a veth sees only what stands in the packet.
    """
    flags = (ctypes.c_uint32 * 2)(GET_FLAGS, 0)
    _ioctl(ifname, flags)
    _ioctl(ifname, (ctypes.c_uint32 * 2)(SET_FLAGS, flags[1] & ~FLAG_TX_VLAN))


def driver(ifname: str) -> str:
    """Return the driver's name. Raises OSError."""
    info = ctypes.create_string_buffer(struct.pack("=I", GET_DRIVER), 196)  # ethtool_drvinfo
    _ioctl(ifname, info)
    return info.raw[4:36].split(b"\0")[0].decode()


def channels(ifname: str) -> int:
    """Return how many receive queues the device has, at least 1."""
    words = (ctypes.c_uint32 * 9)(GET_CHANNELS)
    try:
        _ioctl(ifname, words)
    except OSError:
        return 1
    return max(1, words[5] + words[8])  # rx_count + combined_count
