"""penstock config, cni, cleanup.

Rule: files are put in place by rename, never half.

Theory. The plugin is copied beside its target and renamed, since a runtime may execute it any time.
"""

import shutil
from pathlib import Path
from typing import Any

import click

from dataplane.cli.common import config_option


@click.group()
def config() -> None:
    """The configuration file."""


@config.command("default")
def config_default() -> None:
    """Print the default file with every option's meaning."""
    from dataplane.control.config import describe

    click.echo(describe(), nl=False)


@config.command("show")
@config_option
def config_show(config: Any, path: Path | None) -> None:
    """Print the options in force."""
    import yaml

    click.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), nl=False)


@config.command("check")
@config_option
def config_check(config: Any, path: Path | None) -> None:
    """Check a file: silent and 0, or the error and 78."""


@click.group()
def cni() -> None:
    """The CNI plugin."""


@cni.command("install")
@config_option
def cni_install(config: Any, path: Path | None) -> None:
    """Copy the plugin into the runtime's plugin folder."""
    from xdp.artifacts import find

    folder = config.node.cni.bin_dir
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / ".penstock-cni.new"
    shutil.copy(find("penstock-cni"), beside)
    beside.chmod(0o755)
    beside.rename(folder / "penstock-cni")
    click.echo(folder / "penstock-cni")


@cni.command("conflist")
@config_option
def cni_conflist(config: Any, path: Path | None) -> None:
    """Print the conflist that the agent writes when the node is ready."""
    from dataplane.cni.conflist import content

    run_dir = config.run_dir
    name = config.node.cni.name
    click.echo(content(run_dir / "cni.sock", run_dir / "deletes", name), nl=False)


@click.command()
@config_option
@click.option(
    "--state", is_flag=True, help="Also forget leases, endpoints and last good manifests."
)
def cleanup(config: Any, path: Path | None, state: bool) -> None:
    """Give the machine back as it was (stop the daemon first)."""
    from dataplane.daemon.teardown import cleanup as teardown

    for removed in teardown(config, state):
        click.echo(f"removed {removed}")
