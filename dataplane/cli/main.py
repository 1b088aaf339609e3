"""The `penstock` command.

Rule: nothing is imported before it is needed: `--help` answers at once.

Theory. Subcommands live in modules that LazyGroup imports when one is called; their help lines
stand here. Data goes to stdout, talk to stderr; exit status 0 ok, 1 failure, 2 usage, 3 degraded.
"""

import importlib
import os
import sys

import click

COMMANDS = {
    "run": ("daemons", "Run agent and forwarder and keep them alive"),
    "agent": ("daemons", "Run the agent alone"),
    "forwarder": ("daemons", "Run the forwarder alone"),
    "observer": ("daemons", "Run the observer alone: it keeps and serves flows"),
    "dnsproxy": ("daemons", "Run the proxy for DNS over TCP alone"),
    "status": ("show", "What this node is doing, and what is wrong"),
    "doctor": ("doctor", "What this machine can and cannot do, and the fix"),
    "endpoint": ("show", "Pods attached to this node"),
    "node": ("show", "Nodes of the cluster"),
    "route": ("show", "Routes of the dataplane: list, or get ADDRESS"),
    "port": ("show", "Devices of the dataplane and their counters"),
    "counters": ("show", "Packets by reason; workers and their time by stage"),
    "profile": ("profile", "Where a packet's time goes: table, JSON, flame graph"),
    "flows": ("show", "Recent flows with verdict"),
    "capture": ("capture", "Packets with their verdicts: lines, pcapng, Wireshark"),
    "trace": ("capture", "The next packets of a flow through every stage"),
    "extcap": ("extcap", "Pods as interfaces in Wireshark"),
    "observe": ("observe", "Flows, as `hubble observe` shows them"),
    "policy": ("policy", "Network policies: get, why SRC DST PORT, try FILE, lint"),
    "fqdn": ("dns", "DNS names of policies: list, or why NAME"),
    "dns": ("dns", "DNS of pods: top, slow, events"),
    "identity": ("policy", "Identities and their labels"),
    "ip": ("policy", "Identities of addresses: list, or get ADDRESS"),
    "lb": ("services", "Services: frontends, backends, Maglev tables"),
    "ct": ("connections", "Connections: list, status, flush"),
    "nat": ("connections", "Translated connections; destinations without ports"),
    "ipam": ("addresses", "Pools, leases, history"),
    "config": ("setup", "Show, check or print the default configuration"),
    "cni": ("setup", "Install the CNI plugin"),
    "plan": ("show", "What the agent would change now"),
    "bench": ("bench", "Measure this dataplane beside its peers"),
    "cleanup": ("setup", "Give the machine back as it was"),
}


class LazyGroup(click.Group):
    """Imports a subcommand's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"dataplane.cli.{COMMANDS[cmd_name][0]}")
        return getattr(module, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, SystemExit):
            raise
        except BrokenPipeError:
            os._exit(1)
        except Exception as error:
            if "-v" in sys.argv or "--verbose" in sys.argv:
                raise
            click.echo(f"penstock: {error or type(error).__name__}", err=True)
            sys.exit(1)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks of errors.")
@click.version_option("0.1.0", prog_name="penstock")
def main(verbose: bool) -> None:
    """Penstock: the network dataplane of a Kubernetes node.

    Examples:

      penstock run --config /etc/penstock/config.yaml

      penstock status; penstock counters; penstock flows

      penstock route get 10.244.2.7
    """


if __name__ == "__main__":
    main()
