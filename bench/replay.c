/* SPDX-License-Identifier: Apache-2.0
 *
 * penstock-replay: send the packets of a pcap file out of a device, over and over.
 *
 *   penstock-replay FILE DEVICE COUNTER [-r RATE] [-t SECONDS] [-n FRAMES]
 *
 * Rule: the file is read once and never changed; what was sent stands in COUNTER, a mapped file.
 *
 * Theory. AF_PACKET with PACKET_QDISC_BYPASS hands each frame to the driver as a program's packet would be:
 * as an skb, of any size that the device's MTU allows, jumbo frames included (live frames end at a page).
 * sendmmsg carries BATCH frames. With a rate, what is due by the clock is sent, in batches as small
 * as the rate allows. COUNTER holds four 64-bit numbers: sent, ns so far, left out, done.
 * Classic pcap files of either byte order and resolution are read (magic a1b2c3d4, a1b23c4d).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64
#define LAG_NS 1000000 /* behind a rate by more: frames are left out */
#define FILE_HEADER 24
#define RECORD_HEADER 16

struct frame {
  const uint8_t *data;
  uint32_t length;
};

static uint64_t now_ns(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

__attribute__((noreturn)) static void die(const char *what, const char *why)
{
  fprintf(stderr, "penstock-replay: %s: %s\n", what, why);
  exit(1);
}

static void *map_file(const char *path, int flags, int protection, size_t *size)
{
  int fd = open(path, flags);
  struct stat about;
  void *memory;

  if (fd < 0 || fstat(fd, &about) < 0)
    die(path, strerror(errno));
  if (size)
    *size = (size_t)about.st_size;
  memory = mmap(NULL, (size_t)about.st_size, protection, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED)
    die(path, strerror(errno));
  close(fd);
  return memory;
}

static uint32_t word(const uint8_t *at, int swapped)
{
  uint32_t value;

  memcpy(&value, at, sizeof value);
  return swapped ? __builtin_bswap32(value) : value;
}

/* All frames of a file; their number in *count. */
static struct frame *frames_of(const char *path, size_t *count)
{
  size_t size, at = FILE_HEADER, room = 1024;
  const uint8_t *file = map_file(path, O_RDONLY, PROT_READ, &size);
  struct frame *all = malloc(room * sizeof *all);
  uint32_t magic;
  int swapped;

  if (size < FILE_HEADER)
    die(path, "not a pcap file");
  magic = word(file, 0);
  swapped = magic == 0xd4c3b2a1 || magic == 0x4d3cb2a1;
  if (!swapped && magic != 0xa1b2c3d4 && magic != 0xa1b23c4d)
    die(path, "not a classic pcap file");
  if ((word(file + 20, swapped) & 0xffff) != 1)
    die(path, "not Ethernet");
  *count = 0;
  while (at + RECORD_HEADER <= size) {
    uint32_t length = word(file + at + 8, swapped);

    at += RECORD_HEADER;
    if (length > size - at)
      die(path, "ends in the middle of a packet");
    if (*count == room) {
      room *= 2;
      all = realloc(all, room * sizeof *all);
    }
    if (!all)
      die(path, "no memory");
    all[(*count)++] = (struct frame){file + at, length};
    at += length;
  }
  if (!*count)
    die(path, "holds no packets");
  return all;
}

static int device(const char *name)
{
  struct sockaddr_ll place = {.sll_family = AF_PACKET};
  int fd = socket(AF_PACKET, SOCK_RAW, 0), yes = 1, room = 4 << 20;

  place.sll_ifindex = (int)if_nametoindex(name);
  if (!place.sll_ifindex)
    die(name, strerror(errno));
  if (fd < 0 || bind(fd, (struct sockaddr *)&place, sizeof place) < 0)
    die("AF_PACKET", strerror(errno));
  if (setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &yes, sizeof yes) < 0)
    die("PACKET_QDISC_BYPASS", strerror(errno));
  setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
  return fd;
}

/* Send up to `count` frames from number `next` on; returns how many went. */
static size_t send_some(int fd, const struct frame *all, size_t total, size_t next, size_t count)
{
  struct mmsghdr messages[BATCH];
  struct iovec parts[BATCH];
  int sent;

  memset(messages, 0, sizeof messages);
  for (size_t n = 0; n < count; n++) {
    const struct frame *frame = &all[(next + n) % total];

    parts[n] = (struct iovec){(void *)frame->data, frame->length};
    messages[n].msg_hdr.msg_iov = &parts[n];
    messages[n].msg_hdr.msg_iovlen = 1;
  }
  sent = sendmmsg(fd, messages, (unsigned)count, 0);
  if (sent < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR)
    die("sendmmsg", strerror(errno));
  return sent < 0 ? 0 : (size_t)sent;
}

int main(int argc, char **argv)
{
  double rate = 0, seconds = 0;
  uint64_t limit = 0, sent = 0, left_out = 0, start, now;
  volatile uint64_t *counter;
  struct frame *all;
  size_t total;
  int fd, option;

  if (argc < 4) {
    fprintf(stderr, "usage: penstock-replay FILE DEVICE COUNTER [-r RATE] [-t SECONDS] [-n FRAMES]\n");
    return 2;
  }
  optind = 4;
  while ((option = getopt(argc, argv, "r:t:n:")) != -1) {
    if (option == 'r')
      rate = atof(optarg);
    else if (option == 't')
      seconds = atof(optarg);
    else if (option == 'n')
      limit = strtoull(optarg, NULL, 10);
    else
      return 2;
  }
  all = frames_of(argv[1], &total);
  fd = device(argv[2]);
  counter = map_file(argv[3], O_RDWR, PROT_READ | PROT_WRITE, NULL);
  start = now = now_ns();
  while ((!limit || sent < limit) && (seconds <= 0 || (double)(now - start) < seconds * 1e9)) {
    uint64_t count = BATCH;

    if (rate > 0) {
      uint64_t due = (uint64_t)((double)(now - start) * rate / 1e9) + 1, most = (uint64_t)(rate * LAG_NS / 1e9) + 1;
      uint64_t behind = due > sent + left_out ? due - sent - left_out : 0;

      if (behind > most) {
        left_out += behind - most;
        behind = most;
      }
      count = behind < BATCH ? behind : BATCH;
    }
    if (limit && count > limit - sent)
      count = limit - sent;
    if (count)
      sent += send_some(fd, all, total, sent % total, count);
    now = now_ns();
    counter[0] = sent;
    counter[1] = now - start;
    counter[2] = left_out;
  }
  counter[3] = 1;
  return 0;
}
