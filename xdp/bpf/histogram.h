/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
 *
 * Log-linear buckets of times: bench/histogram.py reads them back.
 */
#ifndef PENSTOCK_HISTOGRAM_H
#define PENSTOCK_HISTOGRAM_H

#define SUB_BITS 7

static __always_inline __u32 bucket_of(__u64 value)
{
  __u32 shift = 0;
  __u64 rest;

  if (value < 1 << SUB_BITS)
    return (__u32)value;
  rest = value >> SUB_BITS;
#pragma unroll
  for (int step = 32; step; step >>= 1)
    if (rest >> step) {
      rest >>= step;
      shift += step;
    }
  shift++;
  return shift * (1 << (SUB_BITS - 1)) + (__u32)(value >> shift);
}

#endif
