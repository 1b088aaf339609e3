"""penstock bench.

Rule: the harness is another package, and another process: nothing of it is imported here.

Theory. `bench` stands above the command line (it measures what a user would run), so the command
hands its words on and becomes `python -m bench`.
"""

import os
import sys
from importlib.util import find_spec

import click

HANDED_ON = {"ignore_unknown_options": True, "help_option_names": []}


@click.command(context_settings=HANDED_ON, add_help_option=False)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def bench(words: tuple[str, ...]) -> None:
    """Measure this dataplane beside its peers."""
    if find_spec("bench") is None:
        raise click.ClickException("the package `bench` is not installed: run it in a checkout")
    os.execv(sys.executable, [sys.executable, "-m", "bench", *words])
