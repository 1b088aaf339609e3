"""Logs: one JSON object a line where a machine reads, key=value where a person does.

Rule: logs go to stderr; no packet is ever logged.

Theory. structlog, with the fields that collectors expect: ts (RFC 3339), level, msg, subsys.
"""

import sys
from typing import Any

import structlog


def setup(level: str = "info") -> None:
    """Configure once a process; level: debug, info, warning, error."""
    numbers = {"debug": 10, "info": 20, "warning": 30, "error": 40}
    if sys.stderr.isatty():
        renderer: Any = structlog.dev.ConsoleRenderer(event_key="msg", timestamp_key="ts")
    else:
        renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.EventRenamer("msg"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(numbers[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(subsystem: str) -> Any:
    """Return a logger whose lines name the subsystem."""
    return structlog.get_logger(subsys=subsystem)
