"""A stateless TRex server over XDP live frames, which unmodified TRex scripts can drive.

Rule: the names of TRex's protocol stand in this package and nowhere else.

Theory. TRex's own client (lbr-trex-client) speaks JSON-RPC over ZMQ. `wire` is how a message looks,
`server` listens, `methods` are the calls, `ports` what a port is and does, `streams` what a stream
may say, `compile` makes rows for xdp/bpf/streams.bpf.c of it, `figures` are the statistics.
"""
