/* SPDX-License-Identifier: Apache-2.0
 *
 * penstock-frames: run an XDP program on live frames until a signal comes.
 *
 *   penstock-frames PROGRAM_FD IFINDEX BYTES BATCH
 *
 * Rule: nothing between two calls of BPF_PROG_RUN, and a call has no end of its own.
 *
 * Theory. With BPF_F_TEST_XDP_LIVE_FRAMES (Documentation/bpf/bpf_prog_run.rst) the kernel gives the
 * program recycled pages of BYTES bytes and carries out its redirects. The program is loaded by who
 * starts us and inherited as a file descriptor; it decides what is sent and when. A process of its
 * own can be pinned to a core, accounted and killed; in C it starts at once and needs no memory.
 */
#include <errno.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
  static char frame[4096];
  struct xdp_md context = {0};
  union bpf_attr attr;
  long bytes;

  if (argc != 5) {
    fprintf(stderr, "usage: penstock-frames PROGRAM_FD IFINDEX BYTES BATCH\n");
    return 2;
  }
  bytes = atol(argv[3]);
  if (bytes < 60 || bytes > (long)sizeof frame) {
    fprintf(stderr, "penstock-frames: %ld bytes: must be 60..%zu\n", bytes, sizeof frame);
    return 2;
  }
  context.data_end = (uint32_t)bytes;
  context.ingress_ifindex = (uint32_t)atol(argv[2]);
  printf("generating\n");
  fflush(stdout);
  for (;;) {
    memset(&attr, 0, sizeof attr);
    attr.test.prog_fd = (uint32_t)atol(argv[1]);
    attr.test.data_in = (uint64_t)(uintptr_t)frame;
    attr.test.data_size_in = (uint32_t)bytes;
    attr.test.ctx_in = (uint64_t)(uintptr_t)&context;
    attr.test.ctx_size_in = sizeof context;
    attr.test.repeat = INT32_MAX;
    attr.test.flags = BPF_F_TEST_XDP_LIVE_FRAMES;
    attr.test.batch_size = (uint32_t)atol(argv[4]);
    if (syscall(SYS_bpf, BPF_PROG_TEST_RUN, &attr, sizeof attr) < 0 && errno != EINTR) {
      fprintf(stderr, "penstock-frames: BPF_PROG_RUN: %s\n", strerror(errno));
      return 1;
    }
  }
}
