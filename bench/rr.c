/* SPDX-License-Identifier: Apache-2.0
 *
 * penstock-rr: one byte there, one byte back, over one TCP connection or one UDP socket.
 *
 *   penstock-rr server PORT                             TCP and UDP, both families, until killed
 *   penstock-rr client tcp|udp ADDRESS PORT SECONDS     prints one JSON object
 *
 * Rule: the clock is read once a transaction, and nothing is printed while it runs.
 *
 * Theory. Round trips go into a log-linear histogram (as HdrHistogram does): values below SUB are
 * exact, above that each power of two has SUB / 2 buckets, so an error is below 2 / SUB = 1.6 %. A
 * UDP reply carries the request's byte; a reply that is 200 ms late counts as lost and is ignored
 * when it comes after all.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SUB_BITS 7
#define SUB (1 << SUB_BITS)
#define BUCKETS (64 << (SUB_BITS - 1))
#define CONNECTIONS 64
#define WARM_UP 200       /* transactions that are not recorded */
#define UDP_WAIT_US 200000

static uint64_t buckets[BUCKETS];
static uint64_t recorded, largest, sum;

static uint64_t now_ns(void)
{
  struct timespec t;

  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

__attribute__((noreturn)) static void die(const char *what)
{
  fprintf(stderr, "penstock-rr: %s: %s\n", what, strerror(errno));
  exit(1);
}

static unsigned bucket_of(uint64_t value)
{
  unsigned shift;

  if (value < SUB)
    return (unsigned)value;
  shift = 63u - (unsigned)__builtin_clzll(value) - (SUB_BITS - 1);
  return shift * (SUB / 2) + (unsigned)(value >> shift);
}

/* The highest value that falls into a bucket. */
static uint64_t value_of(unsigned bucket)
{
  unsigned shift;

  if (bucket < SUB)
    return bucket;
  shift = bucket / (SUB / 2) - 1;
  return ((uint64_t)(bucket - shift * (SUB / 2) + 1) << shift) - 1;
}

static void record(uint64_t value)
{
  buckets[bucket_of(value)]++;
  recorded++;
  sum += value;
  if (value > largest)
    largest = value;
}

static double percentile_us(double share)
{
  uint64_t wanted = (uint64_t)(share * (double)recorded + 0.5), seen = 0;

  for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
    seen += buckets[bucket];
    if (seen && seen >= wanted) {
      uint64_t value = value_of(bucket);
      return (double)(value < largest ? value : largest) / 1000.0;
    }
  }
  return 0;
}

static int listener(int type, int port)
{
  struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
  int yes = 1, no = 0, fd = socket(AF_INET6, type, 0);

  if (fd < 0)
    die("socket");
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
  if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0)
    die("bind");
  if (type == SOCK_STREAM && listen(fd, CONNECTIONS) < 0)
    die("listen");
  return fd;
}

static void echo_datagram(int fd)
{
  struct sockaddr_in6 from;
  socklen_t size = sizeof from;
  char byte;

  if (recvfrom(fd, &byte, 1, 0, (struct sockaddr *)&from, &size) == 1)
    (void)!sendto(fd, &byte, 1, 0, (struct sockaddr *)&from, size);
}

/* Fds 0 and 1 of the set are the listeners, the others are connections. */
static int serve(int port)
{
  struct pollfd set[2 + CONNECTIONS] = {
      {.fd = listener(SOCK_STREAM, port), .events = POLLIN},
      {.fd = listener(SOCK_DGRAM, port), .events = POLLIN},
  };
  nfds_t count = 2;
  char byte;

  for (;;) {
    if (poll(set, count, -1) < 0)
      die("poll");
    for (nfds_t n = 2; n < count; n++) {
      if (!set[n].revents)
        continue;
      if (recv(set[n].fd, &byte, 1, 0) != 1 || send(set[n].fd, &byte, 1, MSG_NOSIGNAL) != 1) {
        close(set[n].fd);
        set[n--] = set[--count];
      }
    }
    if (set[1].revents)
      echo_datagram(set[1].fd);
    if (set[0].revents) {
      int yes = 1, fd = accept(set[0].fd, NULL, NULL);

      if (fd >= 0 && count == 2 + CONNECTIONS)
        close(fd);
      else if (fd >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        set[count++] = (struct pollfd){.fd = fd, .events = POLLIN};
      }
    }
  }
}

static int dial(int type, const char *address, const char *port)
{
  struct addrinfo hints = {.ai_socktype = type, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
  struct addrinfo *target;
  struct timeval wait = {.tv_usec = UDP_WAIT_US};
  int yes = 1, fd, code = getaddrinfo(address, port, &hints, &target);

  if (code) {
    fprintf(stderr, "penstock-rr: %s: %s\n", address, gai_strerror(code));
    exit(1);
  }
  fd = socket(target->ai_family, type, 0);
  if (fd < 0 || connect(fd, target->ai_addr, target->ai_addrlen) < 0)
    die("connect");
  freeaddrinfo(target);
  if (type == SOCK_STREAM)
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  else
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
  return fd;
}

/* One transaction; 0 when the reply did not come in time (UDP). */
static int exchange(int fd, char byte)
{
  char reply;

  if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1)
    die("send");
  do {
    ssize_t size = recv(fd, &reply, 1, 0);

    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
      return 0;
    if (size == 0)
      errno = ECONNRESET;
    if (size != 1)
      die("recv");
  } while (reply != byte);
  return 1;
}

static int measure(const char *protocol, const char *address, const char *port, double seconds)
{
  int fd = dial(strcmp(protocol, "udp") ? SOCK_STREAM : SOCK_DGRAM, address, port);
  uint64_t lost = 0, number = 0, start, last, end;

  for (; number < WARM_UP; number++)
    exchange(fd, (char)number);
  start = last = now_ns();
  end = start + (uint64_t)(seconds * 1e9);
  while (last < end) {
    int answered = exchange(fd, (char)number++);
    uint64_t now = now_ns();

    if (answered)
      record(now - last);
    else
      lost++;
    last = now;
  }
  printf("{\"protocol\": \"%s\", \"transactions\": %llu, \"lost\": %llu, \"seconds\": %.3f, "
         "\"rate\": %.1f, \"mean_us\": %.2f, \"p50_us\": %.2f, \"p90_us\": %.2f, "
         "\"p99_us\": %.2f, \"p999_us\": %.2f, \"max_us\": %.2f}\n",
         protocol, (unsigned long long)recorded, (unsigned long long)lost,
         (double)(last - start) / 1e9, (double)recorded * 1e9 / (double)(last - start),
         recorded ? (double)sum / (double)recorded / 1000.0 : 0.0, percentile_us(0.5),
         percentile_us(0.9), percentile_us(0.99), percentile_us(0.999), (double)largest / 1000.0);
  return recorded == 0;
}

int main(int argc, char **argv)
{
  if (argc == 3 && !strcmp(argv[1], "server"))
    return serve(atoi(argv[2]));
  if (argc == 6 && !strcmp(argv[1], "client"))
    return measure(argv[2], argv[3], argv[4], atof(argv[5]));
  fprintf(stderr, "usage: penstock-rr server PORT\n"
                  "       penstock-rr client tcp|udp ADDRESS PORT SECONDS\n");
  return 2;
}
