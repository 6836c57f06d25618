"""`transport:` of strategies whose processes talk over TCP: addresses and security."""

import ipaddress

from pydantic import Field, model_validator

from jaxdist.config.base import Block, FilePath


class Transport(Block):
    """How nodes reach each other; see the page on the parameter server."""

    host: str = Field("127.0.0.1", description="address that each node listens at; 0.0.0.0: all of its host's")
    certificates: FilePath | None = Field(
        None, description="directory that `jaxdist launch certs` made: TLS 1.3 with certificates on both sides"
    )
    insecure: bool = Field(False, description="listen beyond loopback without TLS")
    shared_memory: bool = Field(True, description="tensors between nodes of one host go through shared memory")

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name
            return self.host == "localhost"

    @model_validator(mode="after")
    def beyond_loopback_is_secure(self) -> "Transport":
        if not self.is_loopback and self.certificates is None and not self.insecure:
            raise ValueError(
                f"host: {self.host} can be reached from other hosts; give `certificates` (made by `jaxdist launch "
                "certs`), or say insecure: true"
            )
        if self.insecure and (self.is_loopback or self.certificates is not None):
            raise ValueError("insecure has no effect on loopback or with certificates; leave it out")
        return self
