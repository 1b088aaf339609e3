"""Hubble's protocol: messages, enumerations and methods, from our own proto files.

Rule: names and numbers stand in observe/api/*.proto and nowhere else.

Theory. `make build` compiles the proto files to one set of descriptors; messages are made from it
at run time, so no generated code has to be imported under names that others use, too. They live in
a pool of their own: a process may hold another copy of the public files beside it.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from xdp.artifacts import find

FILE = "hubble.binpb"
SOCKET = "hubble.sock"
"""The server's socket file in RUN_DIR."""
OBSERVER, PEER = "observer.Observer", "peer.Peer"
HEALTH = "hubble.server.Observer"
"""Name that Hubble's clients ask the health service for."""
VERSION_KEY = "hubble-server-version"
VERSION = "1.19.0"
"""Version of the protocol: of the Cilium whose API this is."""


@functools.cache
def pool() -> Any:
    """Return the pool with all descriptors."""
    files = descriptor_pb2.FileDescriptorSet.FromString(find(FILE).read_bytes())
    made = descriptor_pool.DescriptorPool()
    for file in files.file:
        made.Add(file)  # type: ignore[attr-defined]
    return made


@functools.cache
def message(name: str) -> Any:
    """Return the class of a message by its full name, such as flow.Flow."""
    return message_factory.GetMessageClass(pool().FindMessageTypeByName(name))


@functools.cache
def enum(name: str) -> Mapping[str, int]:
    """Return the numbers of an enumeration by name."""
    values = pool().FindEnumTypeByName(name).values
    return MappingProxyType({value.name: value.number for value in values})


@functools.cache
def names(name: str) -> Mapping[int, str]:
    """Return the names of an enumeration by number."""
    return MappingProxyType({number: text for text, number in enum(name).items()})


def methods(service: str) -> dict[str, tuple[Any, Any, bool]]:
    """Return method -> class of the request, of the response, whether that is a stream."""
    found = pool().FindServiceByName(service)
    return {
        one.name: (
            message(one.input_type.full_name),
            message(one.output_type.full_name),
            one.server_streaming,
        )
        for one in found.methods
    }


def handler(service: str, served: Any) -> Any:
    """Return a gRPC handler of a service; served: an object with the methods by their names."""
    import grpc

    made = {}
    for name, (request, response, stream) in methods(service).items():
        make = (
            grpc.unary_stream_rpc_method_handler if stream else grpc.unary_unary_rpc_method_handler
        )
        made[name] = make(
            getattr(served, name),
            request_deserializer=request.FromString,
            response_serializer=response.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(service, made)


def stub(channel: Any, service: str, method: str) -> Any:
    """Return a client's callable for a method."""
    request, response, stream = methods(service)[method]
    make = channel.unary_stream if stream else channel.unary_unary
    return make(
        f"/{service}/{method}",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
