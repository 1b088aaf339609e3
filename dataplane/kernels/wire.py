"""Offsets and numbers of the headers that kernels read and write.

Rule: an offset is counted from the start of its own header; numbers are those of the standards.

Theory. Kernels load fields by address (house.py), so a header is a handful of offsets, not a class.
Sources: IEEE 802.3; RFC 826 (ARP), 791 (IPv4), 8200 (IPv6), 792 and 4443 (ICMP), 4861 (ND), 768
(UDP), 9293 (TCP), 9260 (SCTP), 7348 (VXLAN), 8926 (Geneve), 3168 (ECN).
"""

# Ethernet
ETHER_SOURCE = 6
ETHER_TYPE = 12
ETHER_LENGTH = 14
TYPE_LEAST = 1536  # less is a length: IEEE 802.3 with LLC
TYPE_IP4 = 0x0800
TYPE_ARP = 0x0806
TYPE_IP6 = 0x86DD
TYPE_VLAN = 0x8100
TYPE_QINQ = 0x88A8
TYPE_BRIDGED = 0x6558  # Transparent Ethernet bridging, in Geneve

# ARP for IPv4 over Ethernet
ARP_OPERATION = 6
ARP_SENDER_MAC = 8
ARP_SENDER_IP = 14
ARP_TARGET_MAC = 18
ARP_TARGET_IP = 24
ARP_LENGTH = 28
ARP_ETHER_IP4 = 0x0001080006040000  # first eight bytes without the operation
ARP_REQUEST = 1
ARP_REPLY = 2

# IPv4
IP4_TOS = 1
IP4_TOTAL = 2
IP4_ID = 4
IP4_FRAGMENT = 6
IP4_TTL = 8
IP4_PROTOCOL = 9
IP4_CHECKSUM = 10
IP4_SOURCE = 12
IP4_TARGET = 16
IP4_LENGTH = 20
IP4_DF = 0x4000
IP4_MF = 0x2000
IP4_OFFSET = 0x1FFF

# IPv6
IP6_PAYLOAD = 4
IP6_NEXT = 6
IP6_HOPS = 7
IP6_SOURCE = 8
IP6_TARGET = 24
IP6_LENGTH = 40
EXTENSIONS_MAX = 8  # headers before the transport that a sane packet may have

# Protocols and IPv6 extension headers (IANA)
HOP_BY_HOP = 0
ICMP = 1
TCP = 6
UDP = 17
ROUTING = 43
FRAGMENT = 44
AUTHENTICATION = 51
ICMP6 = 58
NO_NEXT = 59
DESTINATION = 60
SCTP = 132
MOBILITY = 135

# Transport
UDP_LENGTH_FIELD = 4
UDP_CHECKSUM = 6
UDP_LENGTH = 8
TCP_SEQUENCE = 4
TCP_ACKNOWLEDGED = 8
TCP_OFFSET = 12
TCP_FLAGS = 13
TCP_CHECKSUM = 16
TCP_LENGTH = 20
TCP_FIN, TCP_SYN, TCP_RST, TCP_ACK = 1, 2, 4, 16
SCTP_CHECKSUM = 8
SCTP_CHUNK = 12  # type of the first chunk
SCTP_LENGTH = 16  # with the header of the first chunk, which every packet has

# ICMP and ICMPv6: type, code, checksum, rest of header
ICMP_CODE = 1
ICMP_CHECKSUM = 2
ICMP_REST = 4
ICMP_LENGTH = 8
ICMP_ECHO_REPLY = 0
ICMP_UNREACHABLE = 3
ICMP_ECHO = 8
ICMP_TIME_EXCEEDED = 11
ICMP6_UNREACHABLE = 1
ICMP6_TOO_BIG = 2
ICMP6_TIME_EXCEEDED = 3
ICMP6_ECHO = 128
ICMP6_ECHO_REPLY = 129
ND_SOLICITATION = 135
ND_ADVERTISEMENT = 136
ND_TARGET = 8
ND_OPTIONS = 24
ND_HOPS = 255

# Tunnels
VXLAN_LENGTH = 8
VXLAN_VNI = 4
VXLAN_VALID = 0x08
GENEVE_LENGTH = 8
GENEVE_TYPE = 2
GENEVE_VNI = 4
GENEVE_CRITICAL = 0x40
TUNNEL_PORTS_BASE = 49152  # source ports of the tunnel: the dynamic range, RFC 6335
TUNNEL_PORTS_MASK = 0x3FFF

# ECN, the low two bits of TOS and traffic class
ECN_MASK = 3
ECN_NOT = 0
ECN_CE = 3
