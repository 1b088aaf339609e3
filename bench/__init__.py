"""Benchmarks, and the laboratory that tests share.

Rule: nothing is imported here.

Theory. Who starts processes and has gRPC loaded (tests that ask an observer, scale_flows) tells it
before it is imported that forks are none of its business: its handlers wake pollers in the child,
whose descriptors are closed by then, and one child of a hundred aborted before it became what was
to be started.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
