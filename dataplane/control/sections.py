"""Sections of the configuration that stand for themselves, and what all sections are.

Rule: as config.py: every option has a default, a meaning and a check.

Theory. config.py puts the sections together; one that needs nothing of the others stands here.
"""

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
