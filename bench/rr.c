/* SPDX-License-Identifier: Apache-2.0
 *
 * penstock-rr: requests and responses, with the time of every one.
 *
 *   penstock-rr server PORT                             TCP and UDP, both families, until killed
 *   penstock-rr client tcp|udp|crr ADDRESS PORT SECONDS [-n CONNECTIONS] [-r RATE] [-s BYTES] [-b]
 *
 * crr: a new TCP connection for each request (connect, request, response, close). -r: requests a
 * second, at fixed times, whatever the answers do. -b: print the histogram too. Prints one JSON object.
 *
 * Rule: nothing is printed or allocated while the clock runs.
 *
 * Theory. Times go into log-linear histograms (as HdrHistogram's with three digits): values below
 * SUB are exact, above that each power of two has SUB / 2 buckets. Without a rate each connection sends
 * when it has its answer: a slow answer then hides the requests that would have been sent meanwhile
 * (coordinated omission). With a rate a request has a time at which it is due, and "response" times
 * count from there; "service" times count from the sending, as without a rate. One connection
 * without a rate blocks; all else waits in epoll. For crr we choose the source ports in turn: a
 * search for a free one would be measured otherwise. A UDP answer that is 200 ms late is lost.
 */
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SUB_BITS 11
#define SUB (1 << SUB_BITS)
#define BUCKETS (44 << (SUB_BITS - 1)) /* up to 2**43 ns, two hours */
#define CONNECTIONS_MAX 1024
#define EVENTS 256
#define WARM_UP 200 /* transactions that are not recorded */
#define UDP_WAIT_NS 200000000ull
#define SIZE_MAX_BYTES 65536
#define PORT_FIRST 1024
#define PORT_LAST 65535

struct histogram {
  uint64_t counts[BUCKETS];
  uint64_t recorded, largest, sum;
};

static struct histogram service, response;
static char buffer[SIZE_MAX_BYTES];

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
  unsigned shift, bucket;

  if (value < SUB)
    return (unsigned)value;
  shift = 63u - (unsigned)__builtin_clzll(value) - (SUB_BITS - 1);
  bucket = shift * (SUB / 2) + (unsigned)(value >> shift);
  return bucket < BUCKETS ? bucket : BUCKETS - 1;
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

static void record(struct histogram *h, uint64_t value)
{
  h->counts[bucket_of(value)]++;
  h->recorded++;
  h->sum += value;
  if (value > h->largest)
    h->largest = value;
}

static double percentile_us(const struct histogram *h, double share)
{
  uint64_t wanted = (uint64_t)(share * (double)h->recorded + 0.5), seen = 0;

  for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
    seen += h->counts[bucket];
    if (seen && seen >= wanted) {
      uint64_t value = value_of(bucket);
      return (double)(value < h->largest ? value : h->largest) / 1000.0;
    }
  }
  return 0;
}

/* --- server --------------------------------------------------------------------------------- */

static int listener(int type, int port)
{
  struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons((uint16_t)port)};
  int yes = 1, no = 0, fd = socket(AF_INET6, type | SOCK_NONBLOCK, 0);

  if (fd < 0)
    die("socket");
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
  if (bind(fd, (struct sockaddr *)&any, sizeof any) < 0)
    die("bind");
  if (type == SOCK_STREAM && listen(fd, 4096) < 0)
    die("listen");
  return fd;
}

static void watch(int poller, int fd, uint32_t events, uint64_t data, int how)
{
  struct epoll_event event = {.events = events, .data.u64 = data};

  if (epoll_ctl(poller, how, fd, &event) < 0)
    die("epoll_ctl");
}

static void echo_datagrams(int fd)
{
  struct sockaddr_in6 from;

  for (;;) {
    socklen_t size = sizeof from;
    ssize_t got = recvfrom(fd, buffer, sizeof buffer, 0, (struct sockaddr *)&from, &size);

    if (got < 0)
      return;
    (void)!sendto(fd, buffer, (size_t)got, 0, (struct sockaddr *)&from, size);
  }
}

static void echo_stream(int fd)
{
  ssize_t got = recv(fd, buffer, sizeof buffer, 0);

  if (got > 0 && send(fd, buffer, (size_t)got, MSG_NOSIGNAL) == got)
    return;
  if (got < 0 && errno == EAGAIN)
    return;
  close(fd);
}

static int serve(int port)
{
  int stream = listener(SOCK_STREAM, port), datagram = listener(SOCK_DGRAM, port);
  int poller = epoll_create1(0), yes = 1;
  struct epoll_event events[EVENTS];

  watch(poller, stream, EPOLLIN, (uint64_t)stream, EPOLL_CTL_ADD);
  watch(poller, datagram, EPOLLIN, (uint64_t)datagram, EPOLL_CTL_ADD);
  for (;;) {
    int count = epoll_wait(poller, events, EVENTS, -1);

    if (count < 0 && errno != EINTR)
      die("epoll_wait");
    for (int n = 0; n < count; n++) {
      int fd = (int)events[n].data.u64;

      if (fd == datagram) {
        echo_datagrams(fd);
      } else if (fd != stream) {
        echo_stream(fd);
      } else {
        while ((fd = accept4(stream, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
          setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
          watch(poller, fd, EPOLLIN, (uint64_t)fd, EPOLL_CTL_ADD);
        }
      }
    }
  }
}

/* --- client --------------------------------------------------------------------------------- */

enum kind { TCP, UDP, CRR };
enum state { IDLE, CONNECTING, WAITING };

struct connection {
  int fd;
  enum state state;
  size_t got;
  uint64_t due, sent;
};

static struct {
  enum kind kind;
  struct addrinfo *target;
  double seconds, rate;
  size_t size;
  int count, histogram;
  unsigned port;
  uint64_t lost, failed;
} run = {.size = 1, .count = 1, .port = PORT_FIRST};

/* Bind to the next source port, so that none is searched for and each rests as long as it can. */
static void choose_port(int fd)
{
  struct sockaddr_storage any = {.ss_family = (sa_family_t)run.target->ai_family};
  int yes = 1;

  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  for (int tries = 0; tries < 64; tries++) {
    unsigned port = run.port;

    run.port = port < PORT_LAST ? port + 1 : PORT_FIRST;
    if (run.target->ai_family == AF_INET6)
      ((struct sockaddr_in6 *)&any)->sin6_port = htons((uint16_t)port);
    else
      ((struct sockaddr_in *)&any)->sin_port = htons((uint16_t)port);
    if (!bind(fd, (struct sockaddr *)&any, run.target->ai_addrlen))
      return;
  }
  die("bind to a source port");
}

/* A socket that is connected or, when it does not block, connecting. */
static int dial(int blocking)
{
  struct timeval wait = {.tv_usec = UDP_WAIT_NS / 1000};
  int type = run.kind == UDP ? SOCK_DGRAM : SOCK_STREAM, yes = 1;
  int fd = socket(run.target->ai_family, type | (blocking ? 0 : SOCK_NONBLOCK), 0);

  if (fd < 0)
    die("socket");
  if (run.kind == CRR)
    choose_port(fd);
  if (connect(fd, run.target->ai_addr, run.target->ai_addrlen) < 0 && errno != EINPROGRESS) {
    if (run.kind != CRR)
      die("connect");
    close(fd);
    return -1;
  }
  if (type == SOCK_STREAM)
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  else if (blocking)
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
  return fd;
}

/* One blocking transaction; 0 when the answer did not come in time (UDP). */
static int exchange(int fd, char mark)
{
  static char answer[SIZE_MAX_BYTES];
  size_t got = 0;

  buffer[0] = mark;
  if (send(fd, buffer, run.size, MSG_NOSIGNAL) != (ssize_t)run.size)
    die("send");
  while (got < run.size) {
    ssize_t size = recv(fd, answer + got, sizeof answer - got, 0);

    if (size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
      return 0;
    if (size == 0)
      errno = ECONNRESET;
    if (size <= 0)
      die("recv");
    if (got || run.kind != UDP || answer[0] == mark)
      got += (size_t)size;
  }
  return 1;
}

/* One connection, each request when the last one has its answer. */
static uint64_t one_by_one(void)
{
  uint64_t start = now_ns(), last = start, end = 0, number = 0;
  int fd = run.kind == CRR ? -1 : dial(1);

  for (; !end || last < end; number++) {
    int answered = 0;
    uint64_t now;

    if (run.kind == CRR)
      fd = dial(1);
    if (fd >= 0)
      answered = exchange(fd, (char)number);
    if (run.kind == CRR && fd >= 0)
      close(fd);
    now = now_ns();
    if (number == WARM_UP) {
      start = now;
      end = start + (uint64_t)(run.seconds * 1e9);
    } else if (number > WARM_UP) {
      if (answered)
        record(&service, now - last);
      else
        run.lost++;
    } else if (!end && now - start > (uint64_t)(run.seconds * 1e9) + 5000000000ull) {
      errno = ETIMEDOUT;
      die("warming up");
    }
    last = now;
  }
  return last - start;
}

static void finish(struct connection *c, uint64_t now, int answered)
{
  if (!answered) {
    run.lost++;
  } else {
    record(&service, now - c->sent);
    if (run.rate > 0)
      record(&response, now - c->due);
  }
  if (run.kind == CRR && c->fd >= 0) {
    close(c->fd);
    c->fd = -1;
  }
  c->state = IDLE;
}

static void request(struct connection *c)
{
  c->got = 0;
  c->state = WAITING;
  if (send(c->fd, buffer, run.size, MSG_NOSIGNAL) != (ssize_t)run.size) {
    run.failed++;
    c->state = IDLE;
  }
}

/* Begin the transaction that is due at `due`. */
static void begin(struct connection *c, int poller, uint64_t due, uint64_t number)
{
  c->due = due;
  c->sent = now_ns();
  if (run.kind != CRR) {
    request(c);
    return;
  }
  c->fd = dial(0);
  if (c->fd < 0) {
    run.failed++;
    c->state = IDLE;
    return;
  }
  c->state = CONNECTING;
  watch(poller, c->fd, EPOLLIN | EPOLLOUT, number, EPOLL_CTL_ADD);
}

static void advance(struct connection *c, int poller, uint32_t events, uint64_t number)
{
  ssize_t got;

  if (c->state == CONNECTING && (events & EPOLLOUT) && !(events & (EPOLLERR | EPOLLHUP))) {
    watch(poller, c->fd, EPOLLIN, number, EPOLL_CTL_MOD);
    request(c);
    return;
  }
  got = recv(c->fd, buffer, sizeof buffer, 0);
  if (got < 0 && errno == EAGAIN)
    return;
  if (got <= 0) {
    if (run.kind != CRR)
      die("recv");
    finish(c, 0, 0);
    return;
  }
  c->got += (size_t)got;
  if (c->state == WAITING && c->got >= run.size)
    finish(c, now_ns(), 1);
}

/* Several connections, or a rate. */
static uint64_t side_by_side(void)
{
  static struct connection all[CONNECTIONS_MAX];
  int poller = epoll_create1(0), next = 0;
  uint64_t start, end, gap = run.rate > 0 ? (uint64_t)(1e9 / run.rate) : 0, due, now;
  struct epoll_event events[EVENTS];

  for (int n = 0; n < run.count; n++) {
    all[n].fd = run.kind == CRR ? -1 : dial(1);
    if (all[n].fd >= 0) {
      fcntl(all[n].fd, F_SETFL, O_NONBLOCK);
      watch(poller, all[n].fd, EPOLLIN, (uint64_t)n, EPOLL_CTL_ADD);
    }
  }
  start = due = now = now_ns();
  end = start + (uint64_t)(run.seconds * 1e9);
  while (now < end) {
    struct timespec wait = {.tv_nsec = 20000000};
    int count, busy = 0;

    for (int n = 0; n < run.count; n++) {
      struct connection *c = &all[next];

      if (c->state == WAITING && run.kind == UDP && now - c->sent > UDP_WAIT_NS)
        finish(c, now, 0);
      if (c->state == IDLE) {
        if (gap && due > now)
          break;
        begin(c, poller, gap ? due : now, (uint64_t)next);
        due += gap;
      } else {
        busy++;
      }
      next = next + 1 < run.count ? next + 1 : 0;
    }
    if (gap && due > now && busy < run.count && due - now < 20000000)
      wait.tv_nsec = (long)(due - now);
    count = epoll_pwait2(poller, events, EVENTS, &wait, NULL);
    if (count < 0 && errno != EINTR)
      die("epoll_pwait2");
    for (int n = 0; n < count; n++)
      advance(&all[events[n].data.u64], poller, events[n].events, events[n].data.u64);
    now = now_ns();
  }
  return now - start;
}

static void print_times(const char *name, const struct histogram *h)
{
  printf(", \"%s\": {\"count\": %llu, \"mean_us\": %.2f, \"p50_us\": %.2f, \"p90_us\": %.2f, "
         "\"p99_us\": %.2f, \"p999_us\": %.2f, \"p9999_us\": %.2f, \"max_us\": %.2f",
         name, (unsigned long long)h->recorded,
         h->recorded ? (double)h->sum / (double)h->recorded / 1000.0 : 0.0, percentile_us(h, 0.5),
         percentile_us(h, 0.9), percentile_us(h, 0.99), percentile_us(h, 0.999),
         percentile_us(h, 0.9999), (double)h->largest / 1000.0);
  if (run.histogram) {
    const char *between = "";

    printf(", \"buckets\": [");
    for (unsigned bucket = 0; bucket < BUCKETS; bucket++)
      if (h->counts[bucket]) {
        printf("%s[%llu, %llu]", between, (unsigned long long)value_of(bucket),
               (unsigned long long)h->counts[bucket]);
        between = ", ";
      }
    printf("]");
  }
  printf("}");
}

static int measure(const char *protocol)
{
  double seconds = (double)(run.count == 1 && run.rate <= 0 ? one_by_one() : side_by_side()) / 1e9;

  printf("{\"protocol\": \"%s\", \"connections\": %d, \"transactions\": %llu, \"lost\": %llu, "
         "\"failed\": %llu, \"seconds\": %.3f, \"rate\": %.1f, \"mean_us\": %.2f, "
         "\"p50_us\": %.2f, \"p90_us\": %.2f, \"p99_us\": %.2f, \"p999_us\": %.2f, "
         "\"max_us\": %.2f",
         protocol, run.count, (unsigned long long)service.recorded, (unsigned long long)run.lost,
         (unsigned long long)run.failed, seconds, (double)service.recorded / seconds,
         service.recorded ? (double)service.sum / (double)service.recorded / 1000.0 : 0.0,
         percentile_us(&service, 0.5), percentile_us(&service, 0.9),
         percentile_us(&service, 0.99), percentile_us(&service, 0.999),
         (double)service.largest / 1000.0);
  print_times("service", &service);
  if (run.rate > 0)
    print_times("response", &response);
  printf("}\n");
  return service.recorded == 0;
}

static int usage(void)
{
  fprintf(stderr, "usage: penstock-rr server PORT\n"
                  "       penstock-rr client tcp|udp|crr ADDRESS PORT SECONDS\n"
                  "                   [-n CONNECTIONS] [-r RATE] [-s BYTES] [-b]\n");
  return 2;
}

static int client(int argc, char **argv)
{
  struct addrinfo hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV, .ai_socktype = SOCK_STREAM};
  int code, option;

  run.kind = !strcmp(argv[2], "crr") ? CRR : !strcmp(argv[2], "udp") ? UDP : TCP;
  run.seconds = atof(argv[5]);
  optind = 6;
  while ((option = getopt(argc, argv, "n:r:s:b")) != -1) {
    if (option == 'n')
      run.count = atoi(optarg);
    else if (option == 'r')
      run.rate = atof(optarg);
    else if (option == 's')
      run.size = (size_t)atol(optarg);
    else if (option == 'b')
      run.histogram = 1;
    else
      return usage();
  }
  if (run.count < 1 || run.count > CONNECTIONS_MAX || !run.size || run.size > SIZE_MAX_BYTES ||
      run.seconds <= 0 || (strcmp(argv[2], "tcp") && run.kind == TCP))
    return usage();
  code = getaddrinfo(argv[3], argv[4], &hints, &run.target);
  if (code) {
    fprintf(stderr, "penstock-rr: %s: %s\n", argv[3], gai_strerror(code));
    return 1;
  }
  prctl(PR_SET_TIMERSLACK, 1);
  return measure(argv[2]);
}

int main(int argc, char **argv)
{
  signal(SIGPIPE, SIG_IGN);
  if (argc == 3 && !strcmp(argv[1], "server"))
    return serve(atoi(argv[2]));
  if (argc >= 6 && !strcmp(argv[1], "client"))
    return client(argc, argv);
  return usage();
}
