"""What a device can do with XDP, as the kernel says.

Rule: a kernel that does not say is answered with "nothing known", never with a guess.

Theory. The generic netlink family "netdev" (since Linux 6.3;
Documentation/netlink/specs/netdev.yaml) tells a device's XDP features. The one that matters here is
NDO_XMIT: whether a frame that a program redirects to the device is sent. A veth has it only while
its peer has NAPI (an XDP program, or GRO), and what is redirected to one without vanishes; so a
port takes part in the flow table only if it says so.
"""

from contextlib import closing

from pyroute2.netlink import NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

FAMILY, DEV_GET, VERSION = "netdev", 1, 1
BASIC, REDIRECT, NDO_XMIT, ZERO_COPY, OFFLOAD, RX_SG, NDO_XMIT_SG = (1 << n for n in range(7))


class _Device(genlmsg):
    prefix = "NETDEV_A_DEV_"
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "none"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def xdp_features(ifindex: int) -> int | None:
    """Return a device's features as a bit field, None when the kernel does not say."""
    message = _Device()
    message["cmd"], message["version"] = DEV_GET, VERSION
    message["attrs"] = [("NETDEV_A_DEV_IFINDEX", ifindex)]
    try:
        with closing(GenericNetlinkSocket()) as asked:
            asked.bind(FAMILY, _Device)
            answers = list(asked.nlm_request(message, asked.prid, NLM_F_REQUEST))
    except (NetlinkError, OSError):
        return None
    return answers[0].get_attr("NETDEV_A_DEV_XDP_FEATURES") if answers else None


def takes_redirects(ifindex: int) -> bool:
    """Whether frames that XDP redirects to a device are sent."""
    return bool((xdp_features(ifindex) or 0) & NDO_XMIT)
