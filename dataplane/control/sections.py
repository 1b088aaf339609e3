"""Sections of the configuration that stand for themselves, and what all sections are.

Rule: as config.py: every option has a default, a meaning and a check.

Theory. config.py puts the sections together; one that needs nothing of the others stands here.
"""

from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A mapping of known options, which does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Observe(Section):
    """Flows: what is told, kept, written and served (Hubble's API)."""

    enabled: bool = Field(True, description="run the process that keeps and serves flows")
    flows: Annotated[int, Field(ge=4096, le=1 << 24)] = Field(
        1 << 20, description="flows kept in memory, 160 bytes each once there are so many"
    )
    skip: list[Literal["new", "change", "end"]] = Field(
        default_factory=list, description="events that are not told; drops always are"
    )
    dns: bool = Field(True, description="DNS messages are flows of layer 7; they are not on disk")
    dns_rate: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        5000, description="so many a second (refused ones always); more are left out; 0: no limit"
    )
    sample: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, description="tell one packet of so many, rounded up to a power of two; 0: none"
    )
    listen: str = Field("", description="host:port of Hubble's API, there :4244; empty: none")
    tls_cert: Path | None = Field(None, description="PEM certificate of that port; none: no TLS")
    tls_key: Path | None = Field(None, description="and its key")
    tls_client_ca: Path | None = Field(
        None, description="clients need a certificate of this authority; none: they need none"
    )
    history_mb: Annotated[int, Field(ge=0, le=1 << 20)] = Field(
        256, description="Parquet files in STATE_DIR/flows, MiB together; 0: none"
    )
    history_hours: Annotated[int, Field(ge=1, le=24 * 366)] = Field(
        24, description="and for how long"
    )

    @model_validator(mode="after")
    def _check(self) -> "Observe":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")
        _, colon, port = self.listen.rpartition(":")
        if self.listen and not (colon and port.isdecimal() and int(port) <= 65535):
            raise ValueError(f"listen {self.listen!r}: must be HOST:PORT, such as 0.0.0.0:4244")
        return self


class Timeouts(Section):
    """Idle time, in seconds, after which a connection is forgotten."""

    tcp_established: int = Field(8000, ge=1, description="RFC 5382 asks for 7440")
    tcp_syn: int = Field(240, ge=1, description="not yet answered or confirmed; RFC 5382: 240")
    tcp_closing: int = Field(240, ge=1, description="one side has closed; RFC 5382: 240")
    tcp_closed: int = Field(10, ge=1, description="both have, or one has reset")
    udp: int = Field(300, ge=1, description="both directions seen; RFC 4787 recommends 300")
    udp_unreplied: int = Field(120, ge=1, description="one direction seen; RFC 4787 asks for 120")
    icmp: int = Field(60, ge=1, description="RFC 5508 asks for 60")


class Conntrack(Section):
    """Connection tracking."""

    max: Annotated[int, Field(ge=1024, le=1 << 23)] = Field(
        1 << 19, description="connections, rounded up to a power of two; 230 bytes each in use"
    )
    timeouts: Timeouts = Field(default_factory=Timeouts)


class Metrics(Section):
    """Prometheus metrics at /metrics, and a web page at /, on one port of the agent."""

    listen: str = Field("127.0.0.1", description="address; 0.0.0.0 or :: lets others in")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9962, description="TCP port, Cilium's; 0: none"
    )

    @model_validator(mode="after")
    def _check(self) -> "Metrics":
        ip_address(self.listen)
        return self
