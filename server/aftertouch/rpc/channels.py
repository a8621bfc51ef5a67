"""The Channels service."""

from __future__ import annotations

from aftertouch.declarations import ChannelType
from aftertouch.errors import NotFound
from aftertouch.plugins import Registry
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import read_channel_name
from aftertouch.rpc.pages import make_page_token, read_page_token, size_page
from aftertouch.rpc.values import to_struct
from aftertouch.signals import CORE_IMPLICATIONS
from aftertouch.v1 import channels_pb2, channels_pb2_grpc


class Channels(channels_pb2_grpc.ChannelsServicer):
    """The installed channels."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListChannels(  # type: ignore[override]
        self, request: channels_pb2.ListChannelsRequest, call: Call
    ) -> channels_pb2.ListChannelsResponse:
        size = size_page(request.page_size)
        position = read_page_token(request.page_token, "channels", str)
        names = sorted(name for name in self._registry.types if position is None or name > position)
        return channels_pb2.ListChannelsResponse(
            channels=[self._to_channel(self._registry.types[name]) for name in names[:size]],
            next_page_token=make_page_token("channels", names[size - 1]) if len(names) > size else "",
        )

    async def GetChannel(  # type: ignore[override]
        self, request: channels_pb2.GetChannelRequest, call: Call
    ) -> channels_pb2.Channel:
        found = self._registry.types.get(read_channel_name(request.name))
        if found is None:
            raise NotFound(request.name)
        channel = self._to_channel(found)
        channel.content_schema.CopyFrom(to_struct(found.channel.content_model.model_json_schema()))
        channel.address_schema.CopyFrom(to_struct(found.channel.address_model.model_json_schema()))
        return channel

    def _to_channel(self, found: ChannelType) -> channels_pb2.Channel:
        name = found.name
        is_ready = name in self._registry.channels
        is_broken = any(problem.startswith(("opening", "building")) for problem in self._registry.obstacles.get(name, ()))
        state = channels_pb2.Channel.State
        return channels_pb2.Channel(
            name=f"channels/{name}",
            display_name=found.channel.label,
            state=state.READY if is_ready else state.BROKEN if is_broken else state.NOT_CONFIGURED,
            problems=self._registry.obstacles.get(name, ()),
            distribution=found.distribution,
            version=found.version,
            signals=[
                *(
                    channels_pb2.Signal(signal=signal, display_name=signal.capitalize(), implies=implied)
                    for signal, implied in CORE_IMPLICATIONS.items()
                ),
                *(
                    channels_pb2.Signal(signal=signal.name, display_name=signal.label, implies=signal.implies)
                    for signal in found.channel.signals
                ),
            ],
            actions=[to_action(found, action) for action in found.actions],
            idempotent_sends=found.channel.capabilities.idempotent_sends,
        )


def to_action(found: ChannelType, name: str) -> channels_pb2.Action:
    """An action of a channel as a message."""
    action = found.actions[name].action
    return channels_pb2.Action(
        action=action.name,
        display_name=action.label,
        short_name=action.short_name,
        expression=action.expression,
        apart_expression=action.apart or "",
        apart_display_name=action.apart_label or "",
    )
