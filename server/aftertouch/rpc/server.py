"""The gRPC server: our services behind the interceptor, with health, reflection and, when asked for, channelz."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.delivery.context import MessageContext
from aftertouch.ingest.ledger import Ledger
from aftertouch.plugins import Registry
from aftertouch.retargeting.copies import Copies
from aftertouch.rpc.apps import Apps
from aftertouch.rpc.campaigns import Campaigns
from aftertouch.rpc.channels import Channels
from aftertouch.rpc.contacts import Contacts
from aftertouch.rpc.events import Events
from aftertouch.rpc.interceptor import LARGEST_REQUEST, Interceptor, Method
from aftertouch.rpc.lists import Lists
from aftertouch.rpc.retargeting import Retargeting
from aftertouch.v1 import (
    apps_pb2,
    apps_pb2_grpc,
    campaigns_pb2,
    campaigns_pb2_grpc,
    channels_pb2,
    channels_pb2_grpc,
    contacts_pb2,
    contacts_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    lists_pb2,
    lists_pb2_grpc,
    retargeting_pb2,
    retargeting_pb2_grpc,
)

GRACE_SECONDS = 10.0
"""How long calls under way may take to end when the server stops."""

SERVICES = tuple(
    file.services_by_name[name]
    for file, name in (
        (apps_pb2.DESCRIPTOR, "Apps"),
        (channels_pb2.DESCRIPTOR, "Channels"),
        (contacts_pb2.DESCRIPTOR, "Contacts"),
        (lists_pb2.DESCRIPTOR, "Lists"),
        (campaigns_pb2.DESCRIPTOR, "Campaigns"),
        (events_pb2.DESCRIPTOR, "Events"),
        (retargeting_pb2.DESCRIPTOR, "Retargeting"),
    )
)
"""The descriptors of our services."""


def create_servicers(registry: Registry, ledger: Ledger, context: MessageContext, stopping: asyncio.Event) -> dict[str, Any]:
    """Our services by name; answers that would go on for ever end when ``stopping`` is set."""
    copies = Copies()
    return {
        "Apps": Apps(context.vault),
        "Channels": Channels(registry, context),
        "Contacts": Contacts(registry, context.accounts),
        "Lists": Lists(),
        "Campaigns": Campaigns(registry, ledger, context, copies, stopping),
        "Events": Events(ledger, stopping),
        "Retargeting": Retargeting(registry, copies),
    }


@asynccontextmanager
async def serve_grpc(
    engine: AsyncEngine,
    servicers: Mapping[str, Any],
    address: str,
    stopping: asyncio.Event,
    *,
    with_channelz: bool,
    is_shared: bool,
) -> AsyncIterator[int]:
    """Serve on ``address`` (``host:port``, port 0 takes a free one) and hand out the port; calls under way end first.

    Args:
        stopping: of the servicers; set in the end.
        is_shared: with other processes that listen there.

    Raises:
        OSError: the address cannot be bound.
    """
    for service in SERVICES:
        for method in service.methods:
            Method(f"/{service.full_name}/{method.name}")
    server = grpc.aio.server(
        interceptors=[Interceptor(engine)],
        options=[
            ("grpc.max_receive_message_length", 4 * LARGEST_REQUEST),
            # A second server on the port is a mistake, unless processes share it on purpose.
            ("grpc.so_reuseport", int(is_shared)),
        ],
    )
    apps_pb2_grpc.add_AppsServicer_to_server(servicers["Apps"], server)
    channels_pb2_grpc.add_ChannelsServicer_to_server(servicers["Channels"], server)
    contacts_pb2_grpc.add_ContactsServicer_to_server(servicers["Contacts"], server)
    lists_pb2_grpc.add_ListsServicer_to_server(servicers["Lists"], server)
    campaigns_pb2_grpc.add_CampaignsServicer_to_server(servicers["Campaigns"], server)
    events_pb2_grpc.add_EventsServicer_to_server(servicers["Events"], server)
    retargeting_pb2_grpc.add_RetargetingServicer_to_server(servicers["Retargeting"], server)
    names = [service.full_name for service in SERVICES]
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ("", *names):
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    if with_channelz:
        channelz.add_channelz_servicer(server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: is another server running there?") from error
    await server.start()
    try:
        yield port
    finally:
        await checker.enter_graceful_shutdown()
        stopping.set()
        await asyncio.shield(server.stop(GRACE_SECONDS))
