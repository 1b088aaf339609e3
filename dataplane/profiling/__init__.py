"""Where a packet's time goes, on a node that is running.

Rule: reads only; what it costs, it costs while somebody asks.

Theory. `window` takes the workers' own sums twice and says what happened between; `hardware` and
`stacks` ask perf about the worker threads and the kernel; `flame` draws both together.
"""
