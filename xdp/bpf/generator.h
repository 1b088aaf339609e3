/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * What the benchmark's generator and sink share with Python (bench/layout.py reads this file).
 *
 * Rule: as xdp/abi.h: #define NAME NUMBER and structures of fixed-width members, nothing else.
 */
#ifndef PENSTOCK_GENERATOR_H
#define PENSTOCK_GENERATOR_H

#define TEMPLATES_MAX 32          /* kinds of frames: sizes, families, streams */
#define SLOTS_MAX 256             /* a round of the schedule: which template is next */
#define SEQUENCE_MAX 1048576      /* flow numbers that are walked through */
#define HEADERS_MAX 96            /* bytes of a frame that are written anew */
#define FIELDS_MAX 4              /* places in a frame that follow from the flow's number */
#define DEVICES_MAX 8
#define FRAME_MAX 3400            /* a page less headroom and skb_shared_info */
#define MARK_BE 37729             /* the first two bytes of a payload: a frame of ours */
#define STAMP_BYTES 12            /* mark, template, 2 bytes of 0, time in ns: what a payload must hold */
#define BUCKETS_MAX 4096          /* log-linear, as in penstock-rr, with 6 bits */

/* A value of width 2 or 4 at `offset`: first + ((flow >> shift) & mask), network order. */
struct generator_field {
  __u16 offset;
  __u8 width;
  __u8 shift;
  __u32 first;
  __u32 mask;
  __u32 reserved;
};

struct generator_template {
  __u8 headers[96];
  struct generator_field fields[4];
  __u32 field_count;
  __u16 length;                  /* bytes of the frame in memory: without frame check sequence */
  __u16 device;                  /* slot of the map devices */
  __u16 stamp;                   /* where the payload begins */
  __u16 ip_check;                /* offset of the IPv4 checksum to complete; 0: none */
  __u16 udp_check;               /* of the UDP or TCP checksum; 0: none */
  __u16 stamped;                 /* 1: the time may be written */
  __u32 ip_sum;                  /* sums of what does not change */
  __u32 udp_sum;
  __u32 reserved[2];
  __u64 sent;                    /* written by the generator */
  __u64 bytes;
};

/* The single value of the map control. */
struct generator_control {
  __u64 gap;                     /* ns between frames << 16; 0: none */
  __u64 lag;                     /* as gap: what is caught up at most, the rest is left out */
  __u64 limit;                   /* frames in all; 0: no limit */
  __u64 duration_ns;             /* from the first frame; 0: no end */
  __u64 flow_mask;               /* flows - 1, a power of two less one; unused with a sequence */
  __u64 sequence_mask;           /* entries of the sequence less one, a power of two less one; 0: none */
  __u64 stamp_mask;              /* every (stamp_mask + 1)th frame carries the time */
  __u32 slots;                   /* of the schedule in use */
  __u32 stop;                    /* 1: send nothing more */
  __u64 start_ns;                /* what follows is written by the generator: CLOCK_MONOTONIC */
  __u64 last_ns;
  __u64 now;                     /* << 16, since start_ns */
  __u64 next;
  __u64 sent;
  __u64 left_out;                /* frames that lag made us leave out */
  __u64 turns;                   /* runs of the program, idle ones included */
  __u32 slot;
  __u32 done;                    /* 1: limit or duration reached */
};

struct sink_count {
  __u64 packets;                 /* frames of ours */
  __u64 bytes;
  __u64 others;                  /* passed on */
  __u64 stamped;
  __u64 most_ns;
  __u64 sum_ns;
  __u64 by_template[32];
};

#endif
