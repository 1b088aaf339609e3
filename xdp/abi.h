/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Rule: every structure, limit and number that crosses a boundary (BPF <-> forwarder, agent <->
 * forwarder) is declared here and nowhere else.
 *
 * Theory. BPF programs include this file; xdp/abi.py reads it with cffi and makes numpy dtypes of
 * the structures, so that numba kernels, the agent and the XDP program see one layout. The text is
 * kept to the subset that cffi parses: #define NAME NUMBER, enum, struct of fixed-width members; no
 * #include, no bit fields, no unions. Padding is explicit. Suffix _be: network byte order; all else
 * is host order. Addresses in kernels are two 64-bit halves, high and low, host order; an IPv4
 * address stands in the low half and the high half is 0.
 *
 * A change here changes ABI_VERSION, which every shared file carries: a process that finds another
 * version refuses to map it.
 */
#ifndef PENSTOCK_ABI_H
#define PENSTOCK_ABI_H

#define ABI_VERSION 1

/* --- limits ------------------------------------------------------------------------------- */

#define VECTOR_MAX 256           /* packets a step, VPP's vector */
#define SEGMENTS_MAX 4608        /* segments a vector: 256 heads' worth of 17 continuations + slack */
#define SEGMENTS_PER_PACKET 18   /* MAX_SKB_FRAGS + 1 (net/xdp/xsk.c) */
#define WORKERS_MAX 16
#define PORTS_MAX 1024           /* pods, host port and uplinks of a node; kubelet's default is 110 */
#define SOCKETS_MAX 4096         /* (port, queue) pairs: keys of the XSKMAP */
#define QUEUES_MAX 16            /* queues a port */
#define ADJACENCIES_MAX 16384    /* distinct next hops: one a pod, one a remote node */
#define HEADER_MAX 128           /* longest prepended header (84) rounded to cache lines */
#define FIB4_WIDE 16777216       /* DIR-24-8: one entry a /24 */
#define FIB4_GROUPS 65536        /* DIR-24-8: groups of 256 for prefixes beyond /24 */
#define FIB6_SLOTS 4194304       /* open addressing, twice a million routes and room */
#define FIB6_PROBES_MAX 64       /* slots a lookup may touch; the writer refuses a longer run */
#define FLOWS_MAX 4096           /* recent flows a worker, direct-mapped */
#define REASONS_MAX 256
#define PREFIXES_MAX 16          /* pod prefixes of this node that the uplink steers */
#define LOCALS_MAX 32            /* addresses of this node that the tunnel may arrive at */
#define STAGES_MAX 12

#define FRAME_SIZE 4096          /* chunk as the kernel knows it: a page */
#define FRAME_STRIDE 4160        /* distance of chunks: a page and a cache line, see decision 3 */
#define FRAME_HEADROOM 256       /* XDP_PACKET_HEADROOM: room for the outer headers */

#define MTU_MAX 65000            /* largest IP packet on a pod's veth */

/* --- enumerations ------------------------------------------------------------------------- */

enum port_kind {
  PORT_NONE = 0,
  PORT_POD = 1,                  /* host end of a pod's veth */
  PORT_HOST = 2,                 /* our end of the veth that joins the node's own stack */
  PORT_UPLINK = 3,               /* the device towards other nodes */
};

enum port_state {
  PORT_EMPTY = 0,
  PORT_ACTIVE = 1,
};

enum adjacency_kind {
  ADJACENCY_NONE = 0,            /* row 0: no route */
  ADJACENCY_POD = 1,             /* deliver to a local pod */
  ADJACENCY_HOST = 2,            /* deliver to the node's own stack */
  ADJACENCY_GATEWAY = 3,         /* the pods' gateway: echo is answered here, the rest goes to the node */
  ADJACENCY_NEXTHOP = 4,         /* out of an uplink to a neighbour, not encapsulated */
  ADJACENCY_TUNNEL = 5,          /* out of an uplink, encapsulated to another node */
  ADJACENCY_UNRESOLVED = 6,      /* the neighbour is not known yet: drop 160 or 169 with a counter */
  ADJACENCY_BLACKHOLE = 7,       /* inside our pod prefixes, no such pod: unreachable */
};

enum tunnel_kind {
  TUNNEL_NONE = 0,               /* direct routing */
  TUNNEL_VXLAN = 1,              /* RFC 7348 */
  TUNNEL_GENEVE = 2,             /* RFC 8926 */
};

enum direction {
  DIRECTION_INGRESS = 0,         /* towards a pod or the node */
  DIRECTION_EGRESS = 1,          /* from a pod or the node */
};

/* What became of a packet. From 130 on: drops, with Cilium's number and text where Cilium has one
 * (pkg/monitor/api/drop.go); from 240 on: drops that Cilium has no number for. Below 130: not drops.
 * The comment is the text that metrics and the CLI show. */
enum reason {
  REASON_FORWARDED = 0,          /* Forwarded */
  REASON_ANSWERED_ARP = 16,      /* ARP request answered */
  REASON_ANSWERED_ND = 17,       /* Neighbour solicitation answered */
  REASON_ANSWERED_ECHO = 18,     /* Echo request to the gateway answered */
  REASON_INVALID_SOURCE_IP = 132,          /* Invalid source ip */
  REASON_POLICY_DENIED = 133,              /* Policy denied */
  REASON_INVALID_PACKET = 134,             /* Invalid packet */
  REASON_FRAGMENTATION_NEEDED = 136,       /* Fragmentation needed */
  REASON_UNSUPPORTED_L3 = 139,             /* Unsupported L3 protocol */
  REASON_UNKNOWN_L4 = 142,                 /* Unknown L4 protocol */
  REASON_UNKNOWN_TARGET = 150,             /* Unknown L3 target address */
  REASON_UNROUTABLE = 151,                 /* Stale or unroutable IP */
  REASON_L3_CHECKSUM = 153,                /* Error while correcting L3 checksum */
  REASON_INVALID_EXTENSION = 156,          /* Invalid IPv6 extension header */
  REASON_NO_TUNNEL = 160,                  /* No tunnel/encapsulation endpoint (datapath BUG!) */
  REASON_UNSUPPORTED_L2 = 166,             /* Unsupported L2 protocol */
  REASON_FIB_FAILED = 169,                 /* FIB lookup failed */
  REASON_ENCAPSULATION_PROHIBITED = 170,   /* Encapsulation traffic is prohibited */
  REASON_UNKNOWN_SENDER = 172,             /* Unknown sender */
  REASON_VLAN = 182,                       /* VLAN traffic disallowed by VLAN filter */
  REASON_WRONG_VNI = 183,                  /* Incorrect VNI from VTEP */
  REASON_TTL_EXCEEDED = 196,               /* TTL exceeded */
  REASON_RATE_LIMITED = 198,               /* Rate limited */
  REASON_MULTICAST = 201,                  /* Multicast handled */
  REASON_INVALID_TUNNEL = 240,             /* Malformed tunnel header */
  REASON_CRITICAL_OPTION = 241,            /* Unknown critical Geneve option */
  REASON_TRANSMIT_FULL = 242,              /* Transmit ring full */
  REASON_PORT_GONE = 243,                  /* Egress device is gone */
  REASON_OVERSIZE = 244,                   /* Packet has too many segments */
};

enum stage {
  STAGE_RECEIVE = 0,
  STAGE_PARSE = 1,
  STAGE_ADMIT = 2,
  STAGE_ROUTE = 3,
  STAGE_JUDGE = 4,
  STAGE_ANSWER = 5,
  STAGE_FORWARD = 6,
  STAGE_ACCOUNT = 7,
  STAGE_TRANSMIT = 8,
};

/* --- XDP program <-> forwarder ------------------------------------------------------------ */

/* Key: ifindex. Value of the map xdp_ports: where packets of this device go. */
struct xdp_port {
  __u32 socket_base;             /* key of queue 0 in the XSKMAP */
  __u32 queue_count;
};

struct steer_prefix {
  __u8 address[16];              /* network order; IPv4 in the first four bytes */
  __u8 mask[16];
};

/* The single value of the mmapped array map "steering": written by the forwarder, read by XDP. */
struct steering {
  __u64 heartbeat_ns;            /* CLOCK_MONOTONIC of the forwarder's last sign of life */
  __u64 timeout_ns;              /* older than this: the uplink passes everything to the kernel; 0: never */
  __u32 tunnel_port_be;          /* low 16 bits: UDP port of the tunnel, network order; 0: no tunnel */
  __u32 local4_count;            /* underlay addresses at which the tunnel arrives */
  __u32 local6_count;
  __u32 prefix4_count;           /* pod prefixes steered without encapsulation (direct routing) */
  __u32 prefix6_count;
  __u32 reserved;
  __u32 local4_be[32];
  __u8 local6[512];              /* 32 addresses of 16 bytes */
  struct steer_prefix prefix4[16];
  struct steer_prefix prefix6[16];
};

/* --- agent -> forwarder: tables in shared memory -------------------------------------------- */

/* One row: what the kernels must know of this node. */
struct node {
  __u8 gateway_mac[6];           /* the MAC of the pods' gateway, on every port */
  __u8 tunnel_kind;              /* enum tunnel_kind */
  __u8 reserved0;
  __u16 tunnel_port;             /* host order */
  __u16 host_port;               /* index of the port towards the node's stack */
  __u32 vni;
  __u32 error_rate;              /* ICMP errors and gateway answers a second, a worker */
  __u32 error_burst;
  __u64 router4;                 /* the pods' gateway; 0: this family is off */
  __u64 router6_hi;
  __u64 router6_lo;
  __u32 workers;                 /* workers that the forwarder starts; read once, at its start */
  __u32 frame_count;             /* UMEM frames; read once */
  __u32 spin_us;                 /* idle time before a worker sleeps in poll(2) */
  __u32 watchdog_ms;             /* heartbeat timeout of the steering map; 0: never */
};

/* Row i: port i. Written by the agent; the forwarder opens and closes sockets to follow it. */
struct port {
  __u8 state;                    /* enum port_state, written last */
  __u8 kind;                     /* enum port_kind */
  __u16 queue_count;
  __u32 ifindex;
  __u32 mtu;
  __u32 endpoint;                /* number of the endpoint, 0 when none */
  __u8 mac[6];                   /* of the device itself */
  __u8 peer_mac[6];              /* pod: eth0 in the pod; host: penstock0 */
  __u32 address4;                /* pod: its address; 0: none */
  __u64 address6_hi;
  __u64 address6_lo;
  char name[16];
};

/* Row i: next hop i. A row that is in use is never changed: a new one is interned and routes move. */
struct adjacency {
  __u8 kind;                     /* enum adjacency_kind */
  __u8 tunnel_family;            /* 0 none, 4 or 6: family of the outer header */
  __u16 port;                    /* egress port */
  __u32 mtu;                     /* largest IP packet this way, before encapsulation */
  __u16 header_length;           /* bytes of rewrite.header that replace the Ethernet header */
  __u16 outer_sum;               /* one's complement sum of the outer IPv4 header in the template */
  __u32 node;                    /* reserved for the node's identity, 0 */
  __u64 remote_hi;               /* tunnel: address of the remote node in the underlay */
  __u64 remote_lo;
};

/* Row i: the bytes that adjacency i prepends: Ethernet, or Ethernet/IP/UDP/VXLAN|Geneve/Ethernet.
 * Outer length, checksum, identification, TOS, source port are 0 here and patched per packet. */
struct rewrite {
  __u8 header[128];
};

/* fib4_wide, fib4_deep: u32 = ext << 31 | (depth + 1) << 24 | index; 0: no route. index: adjacency,
 * or with ext the group in fib4_deep. */

struct fib6_entry {
  __u64 hi;
  __u64 lo;
  __u32 index;                   /* adjacency */
  __u32 depth;                   /* prefix length + 1; 0: empty; 255: deleted. Written last. */
  __u64 reserved;
};

/* One row. Doorbell words between the agent and the forwarder. */
struct control {
  __u64 generation;              /* incremented after every change of the tables */
  __u64 ports_generation;        /* incremented after every change of the ports */
  __u64 reserved[6];
};

/* --- forwarder -> everyone: counters -------------------------------------------------------- */

struct reason_counter {
  __u64 packets;
  __u64 bytes;
};

struct port_counter {
  __u64 rx_packets;
  __u64 rx_bytes;
  __u64 tx_packets;
  __u64 tx_bytes;
  __u64 rx_drops;                /* dropped by us after reception, any reason */
  __u64 tx_drops;                /* transmit ring full */
  __u64 reserved[2];
};

struct worker_stats {
  __u64 steps;                   /* vectors processed */
  __u64 packets;
  __u64 polls;                   /* sleeps in poll(2) */
  __u64 kicks;                   /* transmit system calls */
  __u64 kick_errors;             /* of these refused (EAGAIN, EBUSY, ENOBUFS): retried */
  __u64 heartbeat_ns;            /* CLOCK_MONOTONIC */
  __u64 sampled_steps;           /* steps whose stages were timed */
  __u64 sampled_packets;
  __u64 stage_ns[12];            /* sums over the sampled steps, by enum stage */
  __u64 free_frames;
  __u64 tid;
  __u64 reserved[2];
};

/* Direct-mapped by the hash of the flow: a newer flow takes the place of an older one. */
struct flow {
  __u64 source_hi;
  __u64 source_lo;
  __u64 destination_hi;
  __u64 destination_lo;
  __u16 source_port;
  __u16 destination_port;
  __u8 protocol;
  __u8 family;                   /* 4 or 6 */
  __u8 reason;                   /* of the last packet */
  __u8 reserved0;
  __u16 ingress_port;
  __u16 egress_port;
  __u32 hash;
  __u64 packets;
  __u64 bytes;
  __u64 last_ns;                 /* CLOCK_MONOTONIC */
  __u64 first_ns;
};

#endif
