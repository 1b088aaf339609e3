/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * What the stream generator (bench/trex) and its BPF programs share; bench/layout.py reads this file.
 *
 * Rule: as xdp/abi.h: #define NAME NUMBER and structures of fixed-width members, nothing else.
 */
#ifndef PENSTOCK_STREAMS_H
#define PENSTOCK_STREAMS_H

#define STREAMS_MAX 64
#define BODY_BYTES 3456           /* of a stream's frame: lines of 64, a page less headroom and tail */
#define FRAME_LEAST 60            /* without frame check sequence */
#define FRAME_MOST 3400
#define VARIABLES_MAX 8
#define WRITES_MAX 12
#define WRITE_REACH 256           /* variables are written within so many bytes */
#define VALUES_MAX 4096           /* of all variables that walk through a list */
#define GROUPS_MAX 128            /* packet groups: what is counted apart on arrival */
#define TIMED_MAX 16              /* of these the first ones may be timed */
#define GROUP_MARK 65280          /* IPv4 identification, IPv6 flow label: this and the group's number */
#define STAMP_MAGIC 171
#define STAMP_SIZE 16
#define TIME_BUCKETS 2304         /* log-linear, as in histogram.h */

#define STREAM_IDLE 0
#define STREAM_RUNNING 1
#define STREAM_PAUSED 2
#define STREAM_DONE 3

#define VARIABLE_UP 0
#define VARIABLE_DOWN 1
#define VARIABLE_RANDOM 2
#define VARIABLE_HASHED 3         /* random, the same again after `limit` values */

/* A value that changes from frame to frame, or each time another one has gone round. */
struct stream_variable {
  __u64 value;
  __u64 first;
  __u64 least;
  __u64 most;
  __u64 step;
  __u64 limit;
  __u64 seed;
  __u64 turn;
  __u32 kind;                    /* VARIABLE_* */
  __u32 driver;                  /* index + 1 of the variable that must have gone round; 0: each frame */
  __u32 values;                  /* index + 1 in the lists: the value is a place there; 0: itself */
  __u32 reserved;
};

/* Where a variable is written: ((value + add) << shift) & mask, over what else stands there. */
struct stream_write {
  __u64 add;
  __u64 mask;
  __u16 offset;
  __u8 width;                    /* 1, 2, 4, 8 */
  __u8 variable;
  __u8 little;                   /* 1: not in network order */
  __u8 left;                     /* shifts */
  __u8 right;
  __u8 reserved;
};

struct stream {
  __u64 gap;                     /* ns between frames << 16 */
  __u64 next;                    /* since the start << 16 */
  __u64 burst;                   /* frames of a burst; 0: no end */
  __u64 left;                    /* of this one */
  __u64 bursts;
  __u64 bursts_left;
  __u64 rest;                    /* from the last frame of a burst to the next burst << 16 */
  __u64 delay;                   /* before the first frame << 16 */
  __u64 end;                     /* no frame is due from then on << 16; 0: no such time */
  __u64 period;                  /* frames after which the variables begin again; 0: never */
  __u64 used;
  __u64 sent;                    /* written by the program */
  __u64 bytes;
  __u64 left_out;                /* frames that were due and could not be sent in time */
  __u32 state;                   /* STREAM_* */
  __u32 following;               /* index + 1 of the stream that begins when this one ends */
  __u32 follows;                 /* how many times; 4294967295: always */
  __u32 length;
  __u32 trim;                    /* index + 1 of the variable that is the length */
  __u32 ip_at;                   /* IPv4 header whose checksum is to be made; 0: none */
  __u32 pseudo_at;               /* addresses that a transport's checksum covers */
  __u32 pseudo_size;             /* 8, 32; 0: none (ICMP) */
  __u32 l4_at;
  __u32 l4_check;                /* offset of the checksum; 0: none */
  __u32 l4_window;               /* bytes from l4_at, a multiple of 4, that may change */
  __u32 l4_rest;                 /* sum of all that does not */
  __u32 l4_zero;                 /* 1: UDP writes 0xffff for 0 */
  __u32 stamp_odd;               /* 1: the stamp begins at an odd byte of what is summed */
  __u32 timed;                   /* 1: frames end with a stamp */
  __u32 group;
  __u32 flow_sequence;
  __u32 sequence;
  __u32 variable_count;
  __u32 write_count;
  struct stream_variable variables[8];
  struct stream_write writes[12];
};

struct stream_control {
  __u64 start_ns;                /* CLOCK_MONOTONIC of the first turn */
  __u64 now;                     /* << 16, since then */
  __u64 lag;                     /* << 16: what a stream may be late before frames are left out */
  __u64 turns;
  __u64 due;                     /* of the stream that is picked */
  __u32 pick;
  __u32 streams;                 /* in use */
  __u32 stop;
  __u32 reserved;
};

struct stream_body {
  __u8 bytes[3456];
};

/* The last bytes of a timed frame. */
struct stream_stamp {
  __u8 magic;
  __u8 flow_sequence;
  __u16 group;
  __u32 sequence;
  __u64 time;                    /* ns, CLOCK_MONOTONIC */
};

struct group_count {
  __u64 packets;
  __u64 bytes;
};

/* Of a timed group; written by whichever core receives it. */
struct group_times {
  __u64 timed;
  __u64 sum_ns;
  __u64 most_ns;
  __u64 least_ns;
  __u64 last_ns;
  __u64 jitter_ns;               /* << 4, RFC 3550 */
  __u64 lost;
  __u64 reordered;
  __u64 duplicate;
  __u64 too_high;
  __u64 too_low;
  __u64 old;                     /* of an earlier start */
  __u64 bad;                     /* no stamp */
  __u32 flow_sequence;
  __u32 expected;
};

#endif
