/* SPDX-License-Identifier: Apache-2.0
 *
 * penstock-cni: what a container runtime executes; it hands the request to the agent.
 *
 * Rule: no decision is taken here but two: VERSION is answered without the agent, and a DEL that
 * the agent cannot take now is kept in a file and succeeds, so that pods never hang in Terminating.
 *
 * Theory. The request is the CNI_* environment, each variable ended by NUL, an empty string, and
 * stdin as it came, until the end of the stream. The answer is "STATUS LENGTH\n" and LENGTH bytes
 * for stdout; a shorter answer is an agent that died. Of the configuration only three keys of the
 * outermost object are read: "socket", "deletes" and "cniVersion". A queued DEL is the request
 * itself, under a name made of container and interface, so that repeating it adds nothing; it is
 * written beside, synced and renamed. Static, so that it runs on any host.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define DEADLINE_MS 60000
#define REQUEST_MAX (4 << 20) /* GC lists every attachment of the node: far below */
#define VALUE_MAX 1024        /* bytes of a path or a version in the configuration */
#define SUPPORTED "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]"

/* CNI error codes, SPEC.md "Error". */
enum {
  BAD_ENVIRONMENT = 4,
  IO_FAILURE = 5,
  BAD_JSON = 6,
  BAD_CONFIG = 7,
  TRY_LATER = 11,
  NOT_AVAILABLE = 50,
};

struct bytes {
  char *data;
  size_t length, capacity;
};

static char version[VALUE_MAX] = "1.0.0";
static char socket_path[VALUE_MAX] = "/run/penstock/cni.sock";
static char deletes[VALUE_MAX] = "/run/penstock/deletes";
static long long deadline;

static long long now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static void put_quoted(const char *text) {
  putchar('"');
  for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
    if (*c == '"' || *c == '\\')
      printf("\\%c", *c);
    else if (*c < 0x20)
      printf("\\u%04x", *c);
    else
      putchar(*c);
  }
  putchar('"');
}

__attribute__((noreturn, format(printf, 2, 3))) static void
fail(int code, const char *format, ...) {
  char message[3 * VALUE_MAX];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  printf("{\"cniVersion\":");
  put_quoted(version);
  printf(",\"code\":%d,\"msg\":", code);
  put_quoted(message);
  printf("}\n");
  fflush(stdout);
  exit(1);
}

static void append(struct bytes *b, const void *data, size_t length) {
  if (b->length + length > REQUEST_MAX)
    fail(IO_FAILURE, "the request is longer than %d bytes", REQUEST_MAX);
  if (b->length + length > b->capacity) {
    b->capacity = 2 * (b->length + length);
    b->data = realloc(b->data, b->capacity);
    if (!b->data)
      fail(IO_FAILURE, "out of memory for a request of %zu bytes", b->length + length);
  }
  memcpy(b->data + b->length, data, length);
  b->length += length;
}

/* True when fd is ready before the deadline; sets errno otherwise. */
static bool wait_for(int fd, short events) {
  for (;;) {
    long long left = deadline - now_ms();
    struct pollfd p = {.fd = fd, .events = events};
    int n = poll(&p, 1, left > 0 ? (int)left : 0);
    if (n > 0)
      return true;
    if (n == 0)
      errno = ETIMEDOUT;
    if (n == 0 || errno != EINTR)
      return false;
  }
}

/* Everything until the end of the stream. */
static bool read_all(int fd, struct bytes *into) {
  char chunk[16384];
  for (;;) {
    if (!wait_for(fd, POLLIN))
      return false;
    ssize_t n = read(fd, chunk, sizeof chunk);
    if (n == 0)
      return true;
    if (n > 0)
      append(into, chunk, (size_t)n);
    else if (errno != EINTR && errno != EAGAIN)
      return false;
  }
}

/* The end of the JSON string that starts after its quote at p, or NULL; its bytes go to out when
 * they fit and have no escape but \" \\ \/ (paths and versions need no other). */
static const char *scan_string(const char *p, const char *end, char out[VALUE_MAX], bool *plain) {
  size_t length = 0;
  *plain = true;
  for (; p < end && *p != '"'; p++) {
    char c = *p;
    if (c == '\\') {
      if (++p == end)
        return NULL;
      c = *p;
      if (c != '"' && c != '\\' && c != '/')
        *plain = false;
    }
    if (length + 1 < VALUE_MAX)
      out[length++] = c;
    else
      *plain = false;
  }
  out[length] = 0;
  return p < end ? p : NULL;
}

static void use(const char *key, const char *value, bool plain) {
  char *into = !strcmp(key, "socket")       ? socket_path
               : !strcmp(key, "deletes")    ? deletes
               : !strcmp(key, "cniVersion") ? version
                                            : NULL;
  if (!into)
    return;
  if (!plain || !*value)
    fail(BAD_CONFIG, "\"%s\" of the network configuration is empty, too long or has escapes", key);
  strcpy(into, value);
}

/* Walks the text once; strings of the outermost object that stand behind a colon are values. */
static void read_config(const char *p, size_t length) {
  char text[VALUE_MAX], key[VALUE_MAX] = "";
  const char *end = p + length;
  bool plain, is_value = false;
  int depth = 0;
  for (; p < end; p++) {
    switch (*p) {
    case '{':
    case '[':
      depth++;
      break;
    case '}':
    case ']':
      depth--;
      break;
    case ',':
      is_value = false;
      break;
    case ':':
      is_value = true;
      break;
    case '"':
      p = scan_string(p + 1, end, text, &plain);
      if (!p)
        fail(BAD_JSON, "the network configuration on stdin ends inside a string");
      if (depth == 1 && is_value)
        use(key, text, plain);
      else if (depth == 1)
        strcpy(key, text);
    }
  }
  if (depth != 0 || !length)
    fail(BAD_JSON, "the network configuration on stdin is not a complete JSON object");
}

/* The agent's answer to stdout and its status as ours; false with errno when it cannot be had. */
static bool ask(const struct bytes *request, int *status) {
  struct sockaddr_un name = {.sun_family = AF_UNIX};
  if (strlen(socket_path) >= sizeof name.sun_path)
    fail(BAD_CONFIG, "\"socket\" is longer than %zu bytes: %s", sizeof name.sun_path - 1,
         socket_path);
  strcpy(name.sun_path, socket_path);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || connect(fd, (struct sockaddr *)&name, sizeof name) < 0)
    return false;
  for (size_t sent = 0; sent < request->length;) {
    if (!wait_for(fd, POLLOUT))
      return false;
    ssize_t n = send(fd, request->data + sent, request->length - sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno != EINTR && errno != EAGAIN)
      return false;
    sent += n > 0 ? (size_t)n : 0;
  }
  shutdown(fd, SHUT_WR);
  struct bytes answer = {0};
  if (!read_all(fd, &answer))
    return false;
  append(&answer, "", 1);
  size_t length;
  int header = 0;
  char newline;
  if (sscanf(answer.data, "%3d %9zu%c%n", status, &length, &newline, &header) != 3 ||
      newline != '\n' || answer.length - 1 - (size_t)header != length) {
    errno = ECONNRESET;
    return false;
  }
  fwrite(answer.data + header, 1, length, stdout);
  return fflush(stdout) == 0;
}

static bool write_synced(int fd, const struct bytes *b) {
  for (size_t done = 0; done < b->length;) {
    ssize_t n = write(fd, b->data + done, b->length - done);
    if (n < 0 && errno != EINTR)
      return false;
    done += n > 0 ? (size_t)n : 0;
  }
  return fsync(fd) == 0;
}

/* The folder with its parents: after a boot /run is empty. An error shows when it is opened. */
static void make_folder(const char *path) {
  char part[VALUE_MAX];
  for (const char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
    snprintf(part, sizeof part, "%.*s", (int)(slash - path), path);
    mkdir(part, 0755);
  }
  mkdir(path, 0700);
}

/* Keeps the DEL for the agent's return: temporary name, sync, rename, sync of the folder. */
static void queue_delete(const struct bytes *request, const char *container, const char *ifname) {
  char final[256], temporary[64];
  if (strchr(container, '/') || *container == '.' || strchr(ifname, '/'))
    fail(BAD_ENVIRONMENT, "CNI_CONTAINERID=%s CNI_IFNAME=%s is not valid", container, ifname);
  if (snprintf(final, sizeof final, "%s@%s", container, ifname) >= (int)sizeof final)
    fail(BAD_ENVIRONMENT, "CNI_CONTAINERID=%s is longer than a file name may be", container);
  snprintf(temporary, sizeof temporary, ".%d.%lld", (int)getpid(), now_ms());
  make_folder(deletes);
  int folder = open(deletes, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
  int fd = folder < 0 ? -1 : openat(folder, temporary, flags, 0600);
  if (fd < 0)
    fail(TRY_LATER, "cannot remember this DEL in %s: %s", deletes, strerror(errno));
  if (!write_synced(fd, request) || renameat(folder, temporary, folder, final) < 0) {
    int error = errno;
    unlinkat(folder, temporary, 0);
    fail(TRY_LATER, "cannot remember this DEL in %s: %s", deletes, strerror(error));
  }
  fsync(folder);
}

int main(void) {
  static const char *names[] = {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS",
                                "CNI_IFNAME",  "CNI_ARGS",        "CNI_PATH"};
  struct bytes request = {0};
  deadline = now_ms() + DEADLINE_MS;
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    const char *value = getenv(names[i]);
    if (!value)
      continue;
    append(&request, names[i], strlen(names[i]));
    append(&request, "=", 1);
    append(&request, value, strlen(value) + 1);
  }
  append(&request, "", 1);
  size_t head = request.length;
  const char *command = getenv("CNI_COMMAND");
  if (!command)
    fail(BAD_ENVIRONMENT, "CNI_COMMAND is not set: this program is run by a container runtime");
  if (!read_all(STDIN_FILENO, &request))
    fail(IO_FAILURE, "cannot read the network configuration from stdin: %s", strerror(errno));
  read_config(request.data + head, request.length - head);

  if (!strcmp(command, "VERSION")) {
    printf("{\"cniVersion\":");
    put_quoted(version);
    printf(",\"supportedVersions\":" SUPPORTED "}\n");
    return fflush(stdout) != 0;
  }
  int status = 1;
  if (ask(&request, &status))
    return status;
  int error = errno;
  const char *container = getenv("CNI_CONTAINERID"), *ifname = getenv("CNI_IFNAME");
  if (!strcmp(command, "DEL") && container && *container && ifname && *ifname) {
    queue_delete(&request, container, ifname);
    return 0;
  }
  fail(!strcmp(command, "STATUS") ? NOT_AVAILABLE : TRY_LATER,
       "the Penstock agent does not answer on %s: %s; is `penstock run` running?", socket_path,
       strerror(error));
}
