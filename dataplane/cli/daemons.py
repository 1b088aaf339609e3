"""penstock run, agent, forwarder, observer, dnsproxy.

Rule: a configuration error ends with status 78, which no supervisor restarts.

Theory. Each imports its own process's code only: the agent never loads numba.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option


def _setup(config: Any) -> None:
    from dataplane.daemon.log import setup

    if os.geteuid():
        raise PermissionError(
            f"XDP, AF_XDP and network namespaces need root, this is user {os.geteuid()}: use sudo"
        )
    setup(config.log_level)


@click.command()
@config_option
def run(config: Any, path: Path | None) -> None:
    """Run agent and forwarder and keep them alive."""
    from dataplane.daemon import supervisor

    _setup(config)
    sys.exit(supervisor.main(config, path))


@click.command()
@config_option
def agent(config: Any, path: Path | None) -> None:
    """Run the agent alone."""
    from dataplane.daemon import agent as process

    _setup(config)
    sys.exit(process.main(config))


@click.command()
@config_option
def forwarder(config: Any, path: Path | None) -> None:
    """Run the forwarder alone."""
    from dataplane.daemon import forwarder as process

    _setup(config)
    status = process.main(config)
    sys.stdout.flush()
    os._exit(status)  # the interpreter's own end takes a second, for which a successor would wait


@click.command()
@config_option
def observer(config: Any, path: Path | None) -> None:
    """Run the observer alone: it keeps and serves flows."""
    from dataplane.daemon import observer as process

    _setup(config)
    sys.exit(process.main(config))


@click.command()
@config_option
def dnsproxy(config: Any, path: Path | None) -> None:
    """Run the proxy for DNS over TCP alone."""
    from dataplane.daemon import dns_proxy as process
    from dataplane.daemon.lock import hold

    _setup(config)
    with hold(config.run_dir / "dnsproxy.lock"):
        status = process.main(config)
    sys.exit(status)
