"""What a device can do with XDP, as the kernel says.

Rule: a kernel that does not say is answered with "nothing known", never with a guess.

Theory. The generic netlink family "netdev" (since Linux 6.3;
Documentation/netlink/specs/netdev.yaml) tells a device's XDP features. The one that matters here is
NDO_XMIT: whether a frame that a program redirects to the device is sent. A veth has it only while
its peer has NAPI (an XDP program, or GRO switched on while it is up), and what is redirected to one
without vanishes; so a port takes part in the flow table only while its device says so.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

FAMILY, DEV_GET, VERSION = "netdev", 1, 1
BASIC, REDIRECT, NDO_XMIT, ZERO_COPY, OFFLOAD, RX_SG, NDO_XMIT_SG = (1 << n for n in range(7))

_IFINDEX, _FEATURES = "NETDEV_A_DEV_IFINDEX", "NETDEV_A_DEV_XDP_FEATURES"


class _Device(genlmsg):
    prefix = "NETDEV_A_DEV_"
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        (_IFINDEX, "uint32"),
        ("NETDEV_A_DEV_PAD", "none"),
        (_FEATURES, "uint64"),
    )


def xdp_features() -> dict[int, int]:
    """Return the features of this namespace's devices as bit fields, by ifindex.

    Empty when the kernel does not say.
    """
    # pyroute2 runs an event loop, and the caller's thread may be in one.
    with ThreadPoolExecutor(1) as thread:
        answers = thread.submit(_ask).result()
    pairs = ((a.get_attr(_IFINDEX), a.get_attr(_FEATURES)) for a in answers)
    return {index: features for index, features in pairs if index and features is not None}


def _ask() -> list[_Device]:
    message = _Device()
    message["cmd"], message["version"] = DEV_GET, VERSION
    try:
        with closing(GenericNetlinkSocket()) as asked:
            asked.bind(FAMILY, _Device)
            return list(asked.nlm_request(message, asked.prid, NLM_F_REQUEST | NLM_F_DUMP))
    except (NetlinkError, OSError):
        return []


def redirect_targets() -> frozenset[int]:
    """Return the devices (ifindex) that send what XDP redirects to them."""
    return frozenset(n for n, features in xdp_features().items() if features & NDO_XMIT)
