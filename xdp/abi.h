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

#define ABI_VERSION 8

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
#define REASONS_MAX 256
#define PREFIXES_MAX 16          /* pod prefixes of this node that the uplink steers */
#define LOCALS_MAX 32            /* addresses of this node that the tunnel may arrive at */
#define STAGES_MAX 16
#define PROGRAM_DROPS 4          /* enum program_drop and room */
#define STEERED_FRAGMENTS 4096   /* fragmented packets that an uplink follows at a time */

/* Identity and policy */
#define PEERS_MAX 1048576        /* distinct values that addresses map to */
#define IPCACHE4_GROUPS 65536    /* as FIB4_GROUPS */
#define IPCACHE6_SLOTS 1048576   /* open addressing, half a million prefixes and room */
#define IDENTITIES_MAX 65536     /* cluster-wide identities that a table maps to peers */
#define POLICIES_MAX 4096        /* policy rows; 0 closed, 1 open */
#define POLICY_SLOTS 2097152     /* policy entries of all rows, open addressing */
#define POLICY_ENTRIES_MOST 1258291 /* entries that are accepted: 60 % of the slots */
#define POLICY_PROBES_MAX 64     /* slots a lookup may touch; the writer refuses a longer run */
#define POLICY_ANY_PROTOCOL 255  /* reserved by IANA */
#define POLICY_ALLOW 1           /* verdict word: action, bits 0-1 */
#define POLICY_DENY 2
#define POLICY_ACTION_MASK 3
#define POLICY_ANSWER_SHIFT 2    /* bits 2-3: enum refusal */
#define POLICY_LOG 16            /* bit 4: the rule asks for a log line */
#define POLICY_NAMES 32          /* bit 5: rules.dns apply: its queries are looked at, its answers teach */
#define POLICY_NAMES_ONLY 64     /* bit 6: only names that an entry of their selector allows */
#define POLICY_LEARNED 128       /* bit 7: in a connection: by a name that led to the address */
#define POLICY_RULE_SHIFT 8      /* bits 8-31: number of the rule, 0: no rule */
#define POLICY_DEPTH_ANY 17      /* bit of struct policy's depths: entries of any protocol */

/* Services */
#define FRONTEND_SLOTS 524288    /* open addressing */
#define FRONTEND_PROBES_MAX 64
#define SERVICES_MAX 131072      /* rows; 0 is none */
#define BACKENDS_MAX 524288      /* rows; 0 is none */
#define BACKEND_LISTS 4194304    /* words: rows of backends, list after list */
#define MAGLEV_WORDS 33554432    /* words: rows of backends, table after table */
#define SOURCE_RANGES_MAX 65536
#define AFFINITY_SLOTS 262144    /* sets of AFFINITY_WAYS */
#define AFFINITY_WAYS 4

/* Connections */
#define CONNECTIONS_MOST 8388608     /* records */
#define CONNECTION_SLOTS 33554432    /* words of the index: four a record, half of them used */
#define CONNECTIONS_LEAST 1024
#define INDEX_WAYS 8                 /* words of a bucket: one cache line */
#define TICK_SHIFT 24                /* a tick is 2**24 ns, 16.8 ms */
#define NAT_PROTOCOLS 4              /* rows of the port tables: TCP, UDP, SCTP, ICMP identifiers */
#define EXHAUSTED_MAX 1024           /* destinations a worker whose ports ran out, direct-mapped */
#define TIMEOUTS_MAX 16              /* by enum connection_state */

/* The flow table: what XDP forwards by itself */
#define FLOW_SLOTS_MOST 1048576      /* entries; how many there are is an option */
#define FLOW_SLOTS_LEAST 256
#define FLOW_WAYS 8                  /* entries of a bucket: one line of tags */
#define FLOW_NAT_SOURCE 1            /* struct flow_entry's flags: new source address or port */
#define FLOW_NAT_TARGET 2
#define FLOW_KEEP_HOPS 4             /* to the node's own stack: TTL is not counted down */
#define FLOW_DNS 8                   /* the forwarder gets a copy of each message */

/* Names (DNS) */
#define DNS_TEXT 256                 /* bytes that hold a name as on the wire, lower case (255: RFC 1035) */
#define DNS_LATENCY_BUCKETS 112      /* four an octave, from 1024 ns on */
#define DNS_RCODES 16
#define DNS_TYPES 8                  /* enum dns_type */
#define DNS_PORTS_MAX 8              /* TCP ports besides 53 that policies look into */
#define NAME_PATTERNS_MAX 16384      /* rows, which are also the numbers of selectors; 0 is none */
#define NAME_PATTERN_SLOTS 65536     /* open addressing */
#define NAME_PROBES_MAX 64           /* slots a lookup may touch; the writer refuses a longer run */
#define NAMES_MAX 65536              /* names that pods of this node have asked for */
#define NAME_SELECTORS 16            /* selectors that a name keeps */
#define LEARNED_MAX 65536            /* addresses that names have led to */
#define LEARNED_NAMES 28             /* names that an address keeps */
#define NAME_WAYS 8                  /* words of an index's bucket: one cache line */
#define QUERIES_MAX 32768            /* queries that wait for an answer */
#define QUERY_WAYS 4
#define DNS_LANES 19                 /* who counts: the workers, the sweeper, the proxy, who reads copies */
#define DNS_SWEEPER 16
#define DNS_PROXY 17
#define DNS_READER 18
#define DNS_SERVERS_MAX 64           /* servers that a worker counts apart, the last one: all others */
#define DNS_KINDS 64                 /* kinds of messages that a pod has counted apart; the last three: all others */
#define DNS_KIND_TYPE 0               /* struct dns_kind's key: lowest bits of what a kind is of; 16 bits of type */
#define DNS_KIND_RCODE 16            /* 8 */
#define DNS_KIND_EVENT 24            /* 8: enum dns_event_kind */
#define DNS_KIND_ADDRESSES 32        /* 8: of an answer */
#define DNS_KIND_CNAMES 40           /* 8 */
#define DNS_KIND_SIX 48              /* 1: the addresses are IPv6 */
#define DNS_KIND_OTHER 562949953421312 /* bit 49: this is the row of all others */
#define DNS_EVENTS_MAX 8192          /* events that a worker keeps */
#define DNS_EVENT_ADDRESSES 4
#define DNS_COPIES 4194304           /* bytes of the ring of copies that the flow table makes */
#define DNS_COPY_MOST 1984           /* bytes of a datagram that is copied; a larger one is a miss */
#define FQDN_GROUP_FIRST 4294901760  /* group of selector n: this and n */

#define FRAME_SIZE 4096          /* chunk as the kernel knows it: a page */
#define FRAME_STRIDE 4160        /* distance of chunks: a page and a cache line, see decision 3 */
#define FRAME_HEADROOM 256       /* XDP_PACKET_HEADROOM: room for the outer headers */

#define MTU_MAX 65000            /* largest IP packet on a pod's veth */

/* --- enumerations ------------------------------------------------------------------------- */

#define NODE_IDENTITY_VNI 1       /* the VNI carries the identity of the source */
#define NODE_REJECT 2             /* a service without backends answers (ICMP, TCP reset) */
#define NODE_POLICY_HAIRPIN 4     /* policy also judges what a service sends back to its sender */

#define PEER_HOST 1               /* struct peer: an address of this node */
#define PEER_REMOTE_NODE 2        /* of another node */
#define PEER_POD 4                /* of a pod */
#define PEER_KEEP_SOURCE 8        /* packets to it are not masqueraded */

#define POLICY_AUDIT 1            /* struct policy: what would be denied passes, and is counted */
#define POLICY_FQDN 2             /* some of its rules name destinations by DNS */

#define NAMING_NXDOMAIN 1         /* struct naming: a name that is not allowed does not exist */
#define NAMING_BY_IDENTITY 2      /* an address is learned for the identity that asked, not for the node */
#define PATTERN_DEEP 1            /* struct name_pattern: one or more labels more stand before it */
#define PATTERN_ANY 2             /* every name, the root too */
#define NAME_ODD 1                /* struct name: has bytes that no pattern matches */
#define EVENT_TRUNCATED 1         /* struct dns_event: the answer has TC */
#define EVENT_TCP 2
#define EVENT_LEARNED 4           /* an address is new, or newly this name's */
#define EVENT_AUDITED 8           /* not allowed, but passed: audit */

#define CONNECTION_FLAG_NAT_SOURCE 1   /* the original direction's source is translated */
#define CONNECTION_FLAG_NAT_TARGET 2   /* and its target */
#define CONNECTION_FLAG_DENIED 4       /* a change of policy has ended it: `refusal` says by what */
#define CONNECTION_FLAG_AUDITED 8      /* passes by audit only */
#define CONNECTION_FLAG_PORT_TAKEN 16  /* its NAT port is counted in nat_ports */
#define CONNECTION_FLAG_HAIRPIN 32     /* a service sends it back to its sender */
#define CONNECTION_FLAG_OUTSIDE 64     /* came from outside the cluster */
#define CONNECTION_FLAG_DNS 128        /* a pod's DNS: each packet is looked at */
#define CONNECTION_TO_PROXY 1          /* struct connection's `names`: its first side goes to the proxy */
#define CONNECTION_FROM_PROXY 2        /* the proxy has opened it: answers go there */

#define SERVICE_CLUSTER_IP 1      /* struct service: from outside the cluster: REASON_IS_CLUSTER_IP */
#define SERVICE_KEEP_SOURCE 2     /* from outside: the client's address is kept (traffic policy Local) */
#define SERVICE_ADDRESS 4         /* names the address alone (port 0): echo is answered, the rest refused */
#define SERVICE_HOST_PORT 8       /* a pod's hostPort */

enum port_kind {
  PORT_NONE = 0,
  PORT_POD = 1,                  /* host end of a pod's veth */
  PORT_HOST = 2,                 /* our end of the veth that joins the node's own stack */
  PORT_UPLINK = 3,               /* the device towards other nodes */
  PORT_PROXY = 4,                /* our end of the veth that joins the DNS proxy */
};

enum port_hook {
  HOOK_XDP = 0,                  /* frames: XDP and AF_XDP on the device */
  HOOK_TC = 1,                   /* skbs: tc ingress; what is not in the flow table goes over the trunk */
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

/* Numeric identities: Cilium's reserved ones (pkg/identity/numericidentity.go). Identities of label
 * sets are IDENTITY_CLUSTER_FIRST.. when CiliumIdentity objects allocate them, IDENTITY_HASHED_FIRST..
 * when they follow from the labels; IDENTITY_CIDR_FIRST.. are this node's own, for CIDRs. */
enum identity {
  IDENTITY_UNKNOWN = 0,
  IDENTITY_HOST = 1,
  IDENTITY_WORLD = 2,
  IDENTITY_UNMANAGED = 3,
  IDENTITY_HEALTH = 4,
  IDENTITY_INIT = 5,
  IDENTITY_REMOTE_NODE = 6,
  IDENTITY_KUBE_APISERVER = 7,
  IDENTITY_INGRESS = 8,
  IDENTITY_WORLD_IPV4 = 9,
  IDENTITY_WORLD_IPV6 = 10,
  IDENTITY_CLUSTER_FIRST = 256,
  IDENTITY_HASHED_FIRST = 65536,
  IDENTITY_CIDR_FIRST = 16777216,
};

/* How a denied packet is answered (struct policy_entry, struct policy). */
enum refusal {
  REFUSAL_DROP = 0,              /* not at all */
  REFUSAL_ICMP = 1,              /* ICMP or ICMPv6 administratively prohibited */
  REFUSAL_RESET = 2,             /* TCP reset; others as REFUSAL_ICMP */
};

enum backend_state {
  BACKEND_EMPTY = 0,
  BACKEND_ACTIVE = 1,
  BACKEND_TERMINATING = 2,       /* keeps its connections, gets new ones only when all terminate */
};

enum slot_state {
  SLOT_EMPTY = 0,                /* ends a run of probes */
  SLOT_USED = 1,
  SLOT_DELETED = 2,
};

enum dns_type {
  DNS_TYPE_OTHER = 0,
  DNS_TYPE_A = 1,
  DNS_TYPE_AAAA = 2,
  DNS_TYPE_CNAME = 3,
  DNS_TYPE_PTR = 4,
  DNS_TYPE_SRV = 5,
  DNS_TYPE_TXT = 6,
  DNS_TYPE_HTTPS = 7,            /* and SVCB: RFC 9460 */
};

enum dns_event_kind {
  DNS_EVENT_QUERY = 1,           /* goes on to its server */
  DNS_EVENT_ANSWER = 2,          /* fits a query */
  DNS_EVENT_REFUSED = 3,         /* a query that no rule allows, answered here */
  DNS_EVENT_MISSING = 4,         /* a query without an answer */
};

/* Life of a record of struct connection, learned, dns_query. */
enum record_owner {
  RECORD_FREE = 0,
  RECORD_CLAIMED = 1,            /* being made or taken apart by one thread */
  RECORD_LIVE = 2,
};

/* What is known of a connection; index of node.timeout_s. Order: what goes first when the table is
 * full comes first, established ones come last. */
enum connection_state {
  CONNECTION_CLOSED = 0,         /* TCP reset, or both sides have closed; SCTP abort, shutdown done */
  CONNECTION_SYN_SENT = 1,       /* TCP: opened by one side only */
  CONNECTION_INIT = 2,           /* SCTP: the same */
  CONNECTION_UNREPLIED = 3,      /* UDP, other: one direction seen */
  CONNECTION_ICMP = 4,           /* ICMP and ICMPv6 queries */
  CONNECTION_SYN_RECEIVED = 5,   /* TCP: answered, not confirmed */
  CONNECTION_CLOSING = 6,        /* TCP: one side has closed; SCTP: shutdown */
  CONNECTION_REPLIED = 7,        /* UDP, other: both directions seen */
  CONNECTION_ESTABLISHED = 8,    /* TCP, SCTP */
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
  REASON_ANSWERED_ECHO = 18,     /* Echo request to the gateway or a service answered */
  REASON_AUDITED = 19,           /* Forwarded, policy audit would have denied */
  REASON_HELD = 20,              /* Fragment held until the first one arrives */
  REASON_ANSWERED_DNS = 21,      /* DNS query refused by policy */
  REASON_INVALID_SOURCE_IP = 132,          /* Invalid source ip */
  REASON_POLICY_DENIED = 133,              /* Policy denied */
  REASON_INVALID_PACKET = 134,             /* Invalid packet */
  REASON_CT_INVALID = 135,                 /* CT: Truncated or invalid header */
  REASON_FRAGMENTATION_NEEDED = 136,       /* Fragmentation needed */
  REASON_UNSUPPORTED_L3 = 139,             /* Unsupported L3 protocol */
  REASON_UNKNOWN_L4 = 142,                 /* Unknown L4 protocol */
  REASON_UNKNOWN_TARGET = 150,             /* Unknown L3 target address */
  REASON_UNROUTABLE = 151,                 /* Stale or unroutable IP */
  REASON_L3_CHECKSUM = 153,                /* Error while correcting L3 checksum */
  REASON_CT_INSERTION_FAILED = 155,        /* CT: Map insertion failed */
  REASON_INVALID_EXTENSION = 156,          /* Invalid IPv6 extension header */
  REASON_FRAGMENT_UNSUPPORTED = 157,       /* IP fragmentation not supported */
  REASON_NO_BACKEND = 158,                 /* Service backend not found */
  REASON_NO_TUNNEL = 160,                  /* No tunnel/encapsulation endpoint (datapath BUG!) */
  REASON_UNSUPPORTED_L2 = 166,             /* Unsupported L2 protocol */
  REASON_NO_NAT_MAPPING = 167,             /* No mapping for NAT masquerade */
  REASON_NAT_UNSUPPORTED = 168,            /* Unsupported protocol for NAT masquerade */
  REASON_FIB_FAILED = 169,                 /* FIB lookup failed */
  REASON_ENCAPSULATION_PROHIBITED = 170,   /* Encapsulation traffic is prohibited */
  REASON_UNKNOWN_SENDER = 172,             /* Unknown sender */
  REASON_IS_CLUSTER_IP = 174,              /* Is a ClusterIP */
  REASON_FRAGMENT_NOT_FOUND = 175,         /* First logical datagram fragment not found */
  REASON_SOURCE_RANGE = 177,               /* Denied by LB src range check */
  REASON_PROXY_UNSUPPORTED = 180,          /* Proxy redirection not supported for protocol */
  REASON_POLICY_DENIED_BY_RULE = 181,      /* Policy denied by denylist */
  REASON_VLAN = 182,                       /* VLAN traffic disallowed by VLAN filter */
  REASON_WRONG_VNI = 183,                  /* Incorrect VNI from VTEP */
  REASON_TTL_EXCEEDED = 196,               /* TTL exceeded */
  REASON_RATE_LIMITED = 198,               /* Rate limited */
  REASON_MULTICAST = 201,                  /* Multicast handled */
  REASON_ENDPOINT_NOT_READY = 203,         /* Endpoint policy program not available */
  REASON_INVALID_TUNNEL = 240,             /* Malformed tunnel header */
  REASON_CRITICAL_OPTION = 241,            /* Unknown critical Geneve option */
  REASON_TRANSMIT_FULL = 242,              /* Transmit ring full */
  REASON_PORT_GONE = 243,                  /* Egress device is gone */
  REASON_OVERSIZE = 244,                   /* Packet has too many segments */
  REASON_DNS_UNASKED = 245,                /* DNS answer without a query */
  REASON_FILL_EMPTY = 246,                 /* No receive buffer in the fill ring */
  REASON_RECEIVE_FULL = 247,               /* Receive ring full */
  REASON_TRANSMIT_INVALID = 248,           /* Transmit descriptor refused */
  REASON_DEVICE_REFUSED = 249,                /* Egress device has refused it */
};

/* What is to be done with a packet of a vector. */
enum verdict {
  VERDICT_PENDING = 0,           /* goes on through the stages */
  VERDICT_DROP = 1,              /* reason says why; the frame returns to the free list */
  VERDICT_SEND = 2,              /* complete: transmit on egress as it stands */
  VERDICT_HOLD = 3,              /* a fragment that waits for its first one: the engine keeps the frame */
};

/* What stages have found out about a packet: bits of the column `flags`. */
enum packet_flag {
  PACKET_FRAGMENT = 1,           /* IPv4 or IPv6 fragment, first or later */
  PACKET_LATER_FRAGMENT = 2,     /* offset > 0: no ports */
  PACKET_DF = 4,                 /* IPv4 don't fragment, or IPv6 */
  PACKET_MULTICAST = 8,          /* IP destination is multicast or broadcast */
  PACKET_ICMP_ERROR = 16,        /* carries an ICMP or ICMPv6 error: must not be answered by one */
  PACKET_OPTIONS = 32,           /* IPv4 options or IPv6 extension headers present */
  PACKET_DECAPSULATED = 64,      /* came through the tunnel */
  PACKET_LOCAL = 128,            /* made by this node: its TTL is not decremented */
  PACKET_L2_MULTICAST = 256,     /* Ethernet destination is multicast or broadcast */
  PACKET_ANSWER = 512,           /* to be answered by an ICMP error (`answer_type`/`answer_code`) */
  PACKET_RESET = 1024,           /* to be answered by a TCP reset, with PACKET_ANSWER */
  PACKET_ECHO = 2048,            /* an echo request to a service's address: to be answered */
  PACKET_OUTSIDE = 4096,         /* came in on an uplink, not through the tunnel */
  PACKET_NAT = 8192,             /* addresses or ports are to be rewritten: `nat_*` */
  PACKET_RELATED = 16384,        /* an ICMP error about connection `connection` */
  PACKET_AUDITED = 32768,        /* passes by policy audit only */
  PACKET_NAT_SOURCE = 65536,     /* its source was made one of this node's own */
  PACKET_ADMITTED = 131072,      /* was held as a fragment: `admit` has seen it */
  PACKET_WORTH = 262144,         /* its direction is worth an entry of the flow table */
  PACKET_SERVED = 524288,        /* refused on its way through `service`; `nat_target` and `nat_ports` say where */
  PACKET_NOTED = 1048576,        /* its drop has been told */
};

enum stage {
  STAGE_RECEIVE = 0,
  STAGE_PARSE = 1,
  STAGE_ADMIT = 2,
  STAGE_TRACK = 3,
  STAGE_CONNECT = 4,
  STAGE_ROUTE = 5,
  STAGE_JUDGE = 6,
  STAGE_ANSWER = 7,
  STAGE_TRANSLATE = 8,
  STAGE_FORWARD = 9,
  STAGE_INSTALL = 10,
  STAGE_ACCOUNT = 11,
  STAGE_TRANSMIT = 12,
};

/* --- XDP program <-> forwarder ------------------------------------------------------------ */

/* Key: ifindex. Value of the map xdp_ports: where packets of this device go. */
struct xdp_port {
  __u32 socket_base;             /* key of queue 0 in the XSKMAP */
  __u32 queue_count;
  __u32 trunk;                   /* HOOK_TC: ifindex over which its packets go to the sockets, tagged */
  __u32 index;                   /* with this VLAN: row of the port table */
};

/* What the programs drop or lose, and the reason that it is counted by. */
enum program_drop {
  DROP_UPLINK_NO_DEVICE = 0,     /* REASON_PORT_GONE: rewritten, but the device has just gone */
  DROP_POD_NO_DEVICE = 1,
  DROP_POD_NO_SOCKET = 2,        /* REASON_ENDPOINT_NOT_READY: no forwarder takes it */
  LOST_DNS_COPY = 3,             /* no packet: a copy that found the ring full */
};

struct steer_prefix {
  __u8 address[16];              /* network order; IPv4 in the first four bytes */
  __u8 mask[16];
};

/* Key of the map frontends: what uplinks take for services. port_be 0 and protocol 0: all packets
 * to the address. */
struct frontend_key {
  __u8 address[16];              /* network order; IPv4 in the first four bytes */
  __u16 port_be;
  __u8 protocol;
  __u8 family;                   /* 4 or 6 */
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
  __u32 frontend_count;          /* entries of the map frontends; 0: it is not looked up */
  __u32 local4_be[32];
  __u8 local6[512];              /* 32 addresses of 16 bytes */
  struct steer_prefix prefix4[16];
  struct steer_prefix prefix6[16];
  __u8 nat6[16];                 /* addresses that connections are masqueraded with; 0: none */
  __u32 nat4_be;
  __u32 flow_mask;               /* buckets - 1 */
  __u64 flow_seed;               /* of the flow table's hash: nobody outside can make collisions */
  __u32 flow_generation;         /* incremented by the forwarder; 0: the table is off */
  __u32 flow_tables;             /* incremented by the agent; an entry is stale unless it has the sum */
  __u32 flow_vni;                /* VNI that tunnel packets must have */
  __u8 flow_any_vni;             /* where it carries an identity, any will do */
  __u8 flow_tunnel;              /* enum tunnel_kind */
  __u16 flow_abi;                /* ABI_VERSION of who has made the table */
  __u32 dns_wake;                /* who reads copies of DNS sleeps: the next one wakes it */
  __u32 reserved0;
};

/* What is put in front of a packet on its way out: a copy of an adjacency for XDP. */
struct hop {
  __u8 header[128];
  __u8 remote[16];               /* wire order: the tunnel's other end */
  __u32 mtu;                     /* largest IP packet, before encapsulation */
  __u16 header_length;
  __u16 outer_sum;               /* one's complement sum of the outer IPv4 header in `header` */
  __u32 port;                    /* key of the device map */
  __u8 tunnel_family;            /* 0, 4 or 6 */
  __u8 kind;                     /* enum adjacency_kind */
  __u16 reserved0;
  __u64 reserved1[4];
};

/* One direction of a connection, with all that the pipeline has decided: two cache lines. Addresses and
 * ports in wire order, IPv4 in the first four bytes. The tag that leads here is stored last and taken
 * away first; `sequence` is odd while the entry is written. Counters are XDP's. */
struct flow_entry {
  __u8 source[16];
  __u8 target[16];
  __u16 source_port_be;
  __u16 target_port_be;
  __u8 protocol;
  __u8 family;
  __u16 entropy_be;              /* source port of the tunnel's outer header */
  __u32 ifindex;                 /* where its packets come in */
  __u32 sequence;
  __u32 generation;
  __u16 flags;                   /* FLOW_* */
  __u16 l3_delta;                /* to add to the complement of the IPv4 checksum */
  __u16 l4_delta;                /* and of the transport's */
  __u16 reserved0;
  __u32 hop;                     /* row of the hops */

  __u8 new_source[16];
  __u8 new_target[16];
  __u16 new_source_port_be;
  __u16 new_target_port_be;
  __u32 tunnel;                  /* in: hop whose remote it must come from; out: VNI << 8, wire order */
  __u64 packets;
  __u64 bytes;
  __u64 last_ns;                 /* CLOCK_MONOTONIC */
};

/* A DNS message that the flow table has forwarded, as it stands in the ring dns_copies. */
struct dns_copy {
  __u64 time_ns;                 /* CLOCK_MONOTONIC */
  __u8 source[16];               /* as struct flow_entry's, up to the family */
  __u8 target[16];
  __u64 rest;
  __u32 slot;                    /* the entry */
  __u32 length;
  __u8 datagram[1984];           /* from its UDP header on: DNS_COPY_MOST at most */
};

/* What has been read of an entry's counters; row i belongs to entry i. Kept in shared memory. */
struct flow_seen {
  __u64 packets;
  __u64 bytes;
  __u32 state;                   /* enum flow_state, changed by compare-and-swap */
  __u32 record;                  /* of the connection */
  __u32 created;                 /* its member of that name: records are used again */
  __u16 port;                    /* ingress */
  __u8 way;
  __u8 reserved;
};

enum flow_state {
  FLOW_EMPTY = 0,
  FLOW_WRITTEN = 1,              /* by the one worker that made it so */
  FLOW_LIVE = 2,
  FLOW_RESTING = 3,              /* its tag is gone; a program may still be in the middle of it */
  FLOW_RESTED = 4,               /* for a turn of the sweeper */
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
  __u32 flags;                   /* NODE_* */
  __u32 connections;             /* records that may be used, a power of two; read once */
  __u32 flow_slots;              /* entries of the flow table, a power of two, 0: off; read once */
  __u8 events_off;               /* bit n: events of kind n (enum flow_event) are not written */
  __u8 sample_shift;             /* one packet of 2**n is told as EVENT_SAMPLE; 0: none */
  __u16 reserved1;
  __u32 timeout_s[16];           /* by enum connection_state */
  __u32 nat_first;               /* first source port for masquerading */
  __u32 nat_count;               /* and how many; 0: only ports that are kept */
  __u64 masquerade4;             /* source of masqueraded packets; 0: this family is not masqueraded */
  __u64 masquerade6_hi;
  __u64 masquerade6_lo;
  __u64 loopback4;               /* source of a packet that a service sends back to its own sender */
  __u64 loopback6_hi;
  __u64 loopback6_lo;
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
  __u8 hook;                     /* enum port_hook */
  __u8 reserved[3];
  __u32 peer_ifindex;            /* host port: of penstock0, the trunk's other end */
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
  __u64 judgement;               /* incremented when live connections are to be judged again */
  __u64 frontends_generation;    /* incremented after every change of what uplinks steer to services */
  __u32 steering_map;            /* the forwarder's: id of the BPF map that XDP has `steering` in */
  __u32 reserved0;
  __u64 taps;                    /* bit n: tap n is open; bit TAPS_MAX + n: and wants the stages */
  __u64 reserved1[2];
};

/* What an address is: value of the longest prefix in the ipcache. Row 0: not known. Addresses that no
 * selector tells apart are a group; those that fit many peers make wide groups, the others groups.
 * 0: none fits. */
struct peer {
  __u64 groups;                  /* its wide group << 32 | its group: they change with one store */
  __u32 identity;
  __u32 flags;                   /* PEER_* */
};

/* Row i: what port i of the port table is to policy. A row of zeros is closed: nothing passes. */
struct subject {
  __u32 identity;
  __u32 policy;                  /* row of the policy table */
  __u32 reserved[2];
};

/* Row i: the policy of one or more local pods. The bits of depths say which entries are worth a
 * probe: bit d: ports of d leading bits; bit 17: any protocol. otherwise: verdict word when no
 * entry fits. Row 0 is closed, row 1 is open. */
struct policy {
  __u32 ingress_depths;          /* of entries of groups */
  __u32 egress_depths;
  __u32 ingress_wide_depths;     /* of wide groups */
  __u32 egress_wide_depths;
  __u32 ingress_any_depths;      /* of any peer */
  __u32 egress_any_depths;
  __u32 ingress_otherwise;
  __u32 egress_otherwise;
  __u32 flags;                   /* POLICY_AUDIT */
  __u32 reserved[7];
};

/* Open addressing, linear probing. match: protocol << 8 | direction << 7 | depth + 1, where depth is
 * the number of leading bits of the port that count (0: any port) and direction is enum direction;
 * 0: empty; 127: deleted. Written last. A chain is (group), (wide group) or (group 0: any peer).
 * Within a chain the first hit counts, tried from the longest port prefix down to any port, then any
 * protocol: the writer folds what shorter ones say into longer ones. Of the chains' verdicts a deny
 * wins. */
struct policy_entry {
  __u64 key;                     /* policy row << 48 | group << 16 | port */
  __u32 match;
  __u32 verdict;
};

/* What a query needs to be allowed where POLICY_NAMES_ONLY stands: an entry whose match has the
 * number of one of its name's selectors in bits 16-31, in a chain of the server. */

/* One row: how names are treated. */
struct naming {
  __u64 seed;                    /* of the hash of names: nobody outside can make collisions */
  __u64 depths[2];               /* bit n: there are patterns whose literal end has n labels */
  __u64 generation;              /* of the patterns, incremented after a change of them */
  __u32 least_s;                 /* least time to live of an address, TTL or not */
  __u32 grace_s;                 /* that it stays beyond that */
  __u32 addresses_most;          /* that a name may lead to */
  __u32 flags;                   /* NAMING_* */
  __u64 proxy4;                  /* address of the proxy, a route of ours; 0: there is none */
  __u64 proxy6_hi;
  __u64 proxy6_lo;
  __u16 ports[8];                /* TCP ports besides 53 that the proxy listens at; 0: none more */
  __u8 domain[64];               /* the cluster's domain as on the wire, without the root */
  __u32 domain_length;           /* 0: search lists are not known */
  __u32 domain_labels;
};

/* Row i: pattern i, which is selector i. A row that is in use is not changed. */
struct name_pattern {
  __u64 hash;                    /* of its literal end: the labels behind the last star's */
  __u8 literal;                  /* labels of that end */
  __u8 labels;                   /* labels in all */
  __u8 flags;                    /* PATTERN_* */
  __u8 state;                    /* enum slot_state, written last */
  __u32 length;                  /* bytes of text */
  __u8 text[272];                /* lower case, as on the wire; a star: any characters of a label */
};

/* Open addressing, linear probing: rows of patterns by the hash of their literal end. */
struct name_slot {
  __u64 hash;
  __u32 row;
  __u32 state;                   /* enum slot_state, written last */
};

/* name_index, learned_index: words tag << 32 | tick; 0 empty, 1 being made. Word i leads to row i.
 * tag: upper half of the hash, never 0; tick: when it was last of use. */

/* Row i: a name. Workers write it; what it led to keeps it: `pinned_until`. */
struct name {
  __u64 hash;
  __u32 generation;              /* lower half of naming.generation that its selectors are of */
  __u8 length;                   /* bytes of text */
  __u8 labels;
  __u8 flags;                    /* NAME_* */
  __u8 selector_count;
  __u16 selectors[16];
  __u32 pinned_until;            /* ticks */
  __u32 addresses;               /* that it leads to */
  __u32 queries;
  __u32 answers;
  __u32 refused;
  __u32 failures;                /* answers with an rcode other than 0 */
  __u32 missing;
  __u32 capped;                  /* addresses beyond naming.addresses_most */
  __u64 latency_ns;              /* sum over `answers` */
  __u64 reserved[5];
  __u8 text[256];                /* lower case, as on the wire */
};

/* Row i: an address and the names that led to it, for one identity or for all. */
struct learned {
  __u64 hi;
  __u64 lo;
  __u32 scope;                   /* identity, 0: all of the node */
  __u32 owner;                   /* enum record_owner, changed by compare-and-swap */
  __u32 used;                    /* ticks: when a connection by one of its names was last seen */
  __u32 until;                   /* ticks: the latest of `expiry` */
  __u32 family;                  /* 4 or 6 */
  __u32 reserved[3];
  __u32 names[28];               /* rows of names */
  __u32 tags[28];                /* and the tags that these rows had; 0: none */
  __u32 expiry[28];              /* ticks */
};

/* A query that waits for its answer. */
struct dns_query {
  __u32 owner;                   /* enum record_owner, changed by compare-and-swap */
  __u32 connection;              /* record */
  __u32 tuple;                   /* lower half of that connection's flow hash */
  __u16 id;
  __u16 type;
  __u64 question;                /* hash of its name */
  __u64 sent_ns;                 /* CLOCK_MONOTONIC */
  __u64 server_hi;
  __u64 server_lo;
  __u32 name;                    /* row of names + 1; 0: none */
  __u16 port;                    /* of the pod */
  __u8 retries;
  __u8 missed;                   /* it was counted as missing */
  __u64 reserved;
};

/* DNS of a pod (row: its port) or of a server. */
struct dns_counter {
  __u64 hi;                      /* a server's address */
  __u64 lo;
  __u32 used;                    /* number of the pod's endpoint + 1; a server: 1 */
  __u32 reserved;
  __u64 queries;                 /* that went on to a server */
  __u64 retries;                 /* of these, the same again while it waited */
  __u64 answers;                 /* that fit a query */
  __u64 refused;                 /* queries that no rule allows, answered here */
  __u64 unasked;                 /* answers that fit no query */
  __u64 malformed;
  __u64 truncated;               /* answers with TC */
  __u64 shortened;               /* of these, by us: too large to look into */
  __u64 missing;                 /* queries without an answer */
  __u64 latency_ns;              /* sum over `answers` */
  __u64 types[8];                /* queries by enum dns_type */
  __u64 rcodes[16];              /* answers */
  __u32 latency[112];            /* answers by bucket */
  __u64 reserved1[3];
};

/* How many messages of a pod are alike. */
struct dns_kind {
  __u64 key;                     /* DNS_KIND_*; 0: nobody's row */
  __u64 count;
};

/* What a worker did about names; the last row is the sweeper's. */
struct naming_counter {
  __u64 learned;                 /* addresses that became a name's */
  __u64 renewed;
  __u64 names_full;              /* what found no room, by the table or limit that was full */
  __u64 addresses_full;
  __u64 address_names_full;
  __u64 name_capped;
  __u64 selectors_full;
  __u64 queries_displaced;
  __u64 contended;               /* not learned: another worker was at the same row */
  __u64 expired;                 /* addresses forgotten */
  __u64 kept;                    /* expired ones that connections still use, at the last sweep */
  __u64 events;                  /* events written: the next one's number */
  __u64 capped_hash;             /* hash of the name that `name_capped` was counted for last */
  __u64 copies;                  /* messages that the flow table has forwarded, read */
  __u64 copies_lost;             /* and not read: forwarded, but neither counted nor told */
  __u64 reserved;
};

struct dns_event {
  __u64 sequence;                /* its number + 1, written last; 0: being written */
  __u64 time_ns;                 /* CLOCK_MONOTONIC */
  __u64 latency_ns;
  __u64 client_hi;
  __u64 client_lo;
  __u64 server_hi;               /* the one that policy sees: the backend */
  __u64 server_lo;
  __u32 verdict;                 /* verdict word of the connection */
  __u32 identity;                /* of the pod */
  __u32 endpoint;                /* number of the pod's endpoint */
  __u32 ttl;                     /* least one of the answer */
  __u16 port;                    /* index of the pod's port */
  __u16 client_port;
  __u16 server_port;
  __u16 type;
  __u16 id;
  __u8 kind;                     /* enum dns_event_kind */
  __u8 rcode;
  __u8 family;
  __u8 flags;                    /* EVENT_* */
  __u8 address_count;            /* of the answer, of which the first are here */
  __u8 cnames;
  __u64 hi[4];
  __u64 lo[4];
  __u32 length;                  /* bytes of text */
  __u32 reserved[9];
  __u8 text[256];                /* the name, lower case, as on the wire */
};

/* Open addressing. port 0 and protocol 0: the address itself (SERVICE_ADDRESS). */
struct frontend {
  __u64 hi;
  __u64 lo;
  __u16 port;
  __u8 protocol;
  __u8 state;                    /* enum slot_state, written last */
  __u32 service;                 /* row of the service table */
  __u64 reserved;
};

/* A word offset << 32 | count names a part of another table, so that readers see the old or the
 * new one. inside: for clients in the cluster (pods, nodes); outside: for all others. */
struct service {
  __u64 inside;                  /* part of backend_lists */
  __u64 outside;
  __u64 inside_table;            /* part of maglev; 0: a backend by the flow's hash */
  __u64 outside_table;
  __u64 sources;                 /* part of source_ranges that may come from outside; 0: all */
  __u32 flags;                   /* SERVICE_* */
  __u32 affinity_s;              /* session affinity by client address; 0: none */
  __u64 reserved[2];
};

struct backend {
  __u64 hi;
  __u64 lo;
  __u16 port;
  __u8 protocol;
  __u8 state;                    /* enum backend_state */
  __u32 reserved0;
  __u64 reserved1;
};

struct source_range {
  __u64 hi;
  __u64 lo;
  __u64 mask_hi;
  __u64 mask_lo;
};

/* Set-associative, written by workers: the backend that a client of a service had last. */
struct affinity {
  __u64 client_hi;
  __u64 client_lo;
  __u32 service;                 /* row, 0: empty */
  __u32 backend;                 /* row */
  __u32 last;                    /* ticks */
  __u32 reserved;
};

/* --- connections: shared by all workers, kept over restarts ---------------------------------- */

/* connection_index: words tag << 32 | record << 1 | direction, plus 2; 0 empty, 1 deleted. tag: upper
 * half of the flow hash; bucket: lower bits. direction 0: original, 1: reply.
 *
 * Three cache lines: the tuple of the original direction as it was received, the tuple of a reply as
 * it will be received (so the two say all that NAT has to do), and what changes with each packet.
 * word: source port << 48 | target port << 32 | protocol << 8 | family (4 or 6). */
struct connection {
  __u64 source_hi;
  __u64 source_lo;
  __u64 target_hi;
  __u64 target_lo;
  __u64 word;
  __u32 egress_rule;             /* verdict words that let it pass; 0: no policy */
  __u32 source_identity;
  __u32 created;                 /* ticks */
  __u16 port;                    /* where its first packet came from */
  __u16 icmp_type;               /* of its first packet, with protocol ICMP or ICMPv6 */
  __u32 service;                 /* row of the service it was opened through; 0: none */
  __u32 backend;                 /* and of its backend */

  __u64 reply_source_hi;
  __u64 reply_source_lo;
  __u64 reply_target_hi;
  __u64 reply_target_lo;
  __u64 reply_word;
  __u32 ingress_rule;
  __u32 target_identity;
  __u32 hash;                    /* lower half of the original direction's flow hash */
  __u32 reply_hash;
  __u32 refusal;                 /* verdict word, with CONNECTION_FLAG_DENIED */
  __u32 reason;                  /* enum reason, with CONNECTION_FLAG_DENIED */

  __u32 owner;                   /* enum record_owner, changed by compare-and-swap */
  __u32 generation;              /* of the policies by which it was judged */
  __u8 state;                    /* enum connection_state */
  __u8 flags;                    /* CONNECTION_FLAG_* */
  __u8 tcp_original;             /* TCP flags seen in each direction */
  __u8 tcp_reply;
  __u32 names;                   /* CONNECTION_TO_PROXY, CONNECTION_FROM_PROXY */
  __u32 last_original;           /* ticks; a free record: when it was freed */
  __u32 last_reply;
  __u64 packets_original;
  __u64 packets_reply;
  __u64 bytes_original;
  __u64 bytes_reply;
  __u32 flow_original;           /* entry of the flow table + 1 by direction; 0: none */
  __u32 flow_reply;
};

/* What a worker did about connections; the last row is the sweeper's. */
struct track_counter {
  __u64 created;
  __u64 expired;                 /* idle too long, or closed */
  __u64 evicted;                 /* to make room */
  __u64 refused;                 /* no room: REASON_CT_INSERTION_FAILED */
  __u64 rejudged;                /* live connections judged again after a change */
  __u64 cut;                     /* of these denied */
  __u64 nat_exhausted;
  __u64 fragments_held;
  __u64 fragments_lost;          /* their first one did not come in time, or the buffer was full */
  __u64 limit;                   /* records that the worker's hand goes over */
  __u64 reserved[6];
};

/* A destination towards which no source port was left. Direct-mapped by hash. */
struct exhausted {
  __u64 hi;
  __u64 lo;
  __u64 count;
  __u64 last_ns;                 /* CLOCK_MONOTONIC */
  __u16 port;
  __u8 protocol;
  __u8 reserved0;
  __u32 reserved1;
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
  __u64 tx_drops;                /* transmit ring full, or refused by the device */
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
  __u64 stage_ns[16];            /* sums over the sampled steps, by enum stage */
  __u64 free_frames;
  __u64 tid;
  __u64 rx_waiting;              /* sums over the sampled steps: packets left in all receive rings */
  __u64 tx_waiting;              /* and in transmit rings, before this step's */
  __u64 yields;                  /* system calls while there was nothing to do yet */
  __u64 reserved[3];
};

/* --- forwarder -> whoever watches: a ring of events a writer --------------------------------- */

#define EVENTS_MAX 131072        /* of a ring: the last so many of one writer */
#define EVENT_REPLY 128          /* flow_record's flags: against its direction; CONNECTION_FLAG_DNS is left out */

enum flow_event {
  EVENT_NONE = 0,
  EVENT_NEW = 1,                 /* a connection that may pass, with CONNECTION_FLAG_AUDITED by audit only */
  EVENT_DROP = 2,                /* packets dropped for one reason: one, or all the same of a second */
  EVENT_CHANGE = 3,              /* TCP flags that its direction had not shown before */
  EVENT_END = 4,                 /* a connection is forgotten: `state` is how it was, the counts are its own */
  EVENT_SAMPLE = 5,              /* one packet of many */
};

/* Two cache lines. Written whole before the ring's head counts it, and never changed afterwards, but
 * EVENTS_MAX later another one takes its place. The direction is the connection's, for EVENT_DROP and
 * EVENT_SAMPLE the packet's. ICMP: target_port is type << 8 | code. */
struct flow_record {
  __u64 source_hi;
  __u64 source_lo;
  __u64 target_hi;               /* as policies see it: the backend, where a service has chosen one */
  __u64 target_lo;
  __u64 new_source_hi;           /* as it goes on: another one where it is masqueraded */
  __u64 new_source_lo;
  __u64 time_ns;                 /* CLOCK_MONOTONIC */
  __u64 packets;
  __u64 reply_packets;
  __u64 bytes;
  __u64 reply_bytes;
  __u32 egress_rule;             /* verdict words; EVENT_DROP: what refused it, of either direction */
  __u32 source_identity;
  __u32 ingress_rule;
  __u32 target_identity;
  __u16 source_port;
  __u16 target_port;
  __u16 new_source_port;
  __u16 port;                    /* of the port table: where it came in */
  __u32 service;                 /* row of the service table, 0: none */
  __u32 lasted;                  /* ticks since the connection was made */
  __u8 family;                   /* 4 or 6; 0: no IP packet */
  __u8 protocol;
  __u8 kind;                     /* enum flow_event */
  __u8 reason;                   /* enum reason */
  __u8 flags;
  __u8 state;                    /* enum connection_state */
  __u8 tcp;                      /* TCP flags: of the packet; EVENT_END: all of the original direction */
  __u8 tcp_reply;                /* EVENT_END: all of the reply direction */
};

/* A row a worker, the last one is the sweeper's. */
struct event_ring {
  __u64 head;                    /* events ever written; stored last */
  __u64 reserved[7];
};

/* --- taps: packets for whoever captures or traces -------------------------------------------- */

#define TAPS_MAX 4               /* captures at a time */
#define TAP_INSTRUCTIONS_MAX 4096 /* of a filter: BPF_MAXINSNS */
#define TAP_RING_BYTES 8388608   /* of one worker's records for one tap */
#define TAP_SNAP_MOST 65536      /* bytes of a packet: more than MTU_MAX and the outer headers */
#define TAP_IN 1                 /* points: a packet as it came */
#define TAP_OUT 2                /* and as it left */
#define TAP_STAGES 4             /* with what each stage made of it */

/* One instruction of classic BPF (net/bpf/filter.rst in the kernel's documentation). */
struct tap_instruction {
  __u16 code;
  __u8 jump_true;
  __u8 jump_false;
  __u32 k;
};

/* Row n: what tap n takes. Written by the forwarder while its bit in control.taps is 0, but for the
 * lease, which its reader renews: a tap that nobody reads any more is closed. */
struct tap {
  __u32 points;                  /* TAP_* */
  __u32 snap;                    /* bytes of a packet */
  __u32 port;                    /* where it is seen; PORTS_MAX: anywhere */
  __u32 identity;                /* of its source or target; 0: any */
  __u32 instructions;            /* of its filter; 0: every packet */
  __u32 serial;                  /* another one each time it is opened; 0: it is closed */
  __u64 lease_ns;                /* CLOCK_MONOTONIC of its reader's last sign of life */
  __u64 reasons[4];              /* bit set by enum reason */
};

/* A row a worker and tap: bytes ever written and read; `head` is stored last. */
struct tap_ring {
  __u64 head;
  __u64 tail;                    /* the reader's */
  __u64 lost;                    /* packets for which there was no room */
  __u64 reserved[5];
};

/* A packet at one point. Its steps and then its bytes follow; the next record begins at a multiple of
 * 64 bytes. points 0: nothing but room up to the ring's end. */
struct tap_record {
  __u64 time_ns;                 /* CLOCK_MONOTONIC */
  __u32 size;                    /* of all this */
  __u32 length;                  /* of the packet */
  __u32 captured;                /* bytes of it that follow */
  __u32 egress_rule;             /* verdict words of its connection */
  __u32 ingress_rule;
  __u32 refusal;                 /* and of what dropped it */
  __u32 source_identity;
  __u32 target_identity;
  __u32 flags;                   /* of the connection: CONNECTION_FLAG_* */
  __u16 port;                    /* where it is seen */
  __u16 other;                   /* where it left, or came from; PORTS_MAX: nowhere */
  __u16 vector;                  /* packets in its vector */
  __u8 point;                    /* TAP_IN or TAP_OUT */
  __u8 reason;                   /* enum reason */
  __u8 steps;                    /* struct tap_step that follow */
  __u8 way;                      /* 1: a reply */
  __u8 reserved[10];
};

/* A packet after one stage. */
struct tap_step {
  __u32 ns;                      /* that the stage took for the whole vector */
  __u32 adjacency;
  __u32 connection;              /* record + 1, 0: none */
  __u32 flags;                   /* as kernels know them: dataplane/kernels/batch.py */
  __u8 stage;                    /* enum stage */
  __u8 verdict;
  __u8 reason;
  __u8 kind;
  __u32 reserved[3];
};

#endif
