"""The Channels service."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.empty_pb2 import Empty

from aftertouch.channels import Template
from aftertouch.declarations import ChannelType
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.templates import Templates
from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.plugins import Registry, SettingsWrong
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_channel_name, read_name
from aftertouch.rpc.pages import fill_page, make_page_token, read_page_token, size_page
from aftertouch.rpc.values import to_struct, to_timestamp
from aftertouch.signals import CORE_IMPLICATIONS
from aftertouch.store.app_secrets import delete_own_settings, merge_own_settings, put_own_settings, read_own_settings
from aftertouch.store.engine import transaction
from aftertouch.v1 import channels_pb2, channels_pb2_grpc

_LONGEST_WORDS = 4_000
"""Of a template, as in the docstring of ``channels.Template``."""
_MOST_BUTTONS = 20


class Channels(channels_pb2_grpc.ChannelsServicer):
    """The installed channels, and what the caller's app has of its own on them."""

    def __init__(self, registry: Registry, context: MessageContext) -> None:
        self._registry = registry
        self._vault = context.vault
        self._accounts = context.accounts
        self._templates = Templates(context.accounts)

    async def ListChannels(  # type: ignore[override]
        self, request: channels_pb2.ListChannelsRequest, call: Call
    ) -> channels_pb2.ListChannelsResponse:
        size = size_page(request.page_size)
        position = read_page_token(request.page_token, "channels", str)
        names = sorted(name for name in self._registry.types if position is None or name > position)
        return channels_pb2.ListChannelsResponse(
            channels=[await self._to_channel(call, self._registry.types[name]) for name in names[:size]],
            next_page_token=make_page_token("channels", names[size - 1]) if len(names) > size else "",
        )

    async def GetChannel(  # type: ignore[override]
        self, request: channels_pb2.GetChannelRequest, call: Call
    ) -> channels_pb2.Channel:
        found = self._registry.types.get(read_channel_name(request.name))
        if found is None:
            raise NotFound(request.name)
        channel = await self._to_channel(call, found)
        channel.content_schema.CopyFrom(to_struct(found.channel.content_model.model_json_schema()))
        channel.address_schema.CopyFrom(to_struct(found.channel.address_model.model_json_schema()))
        return channel

    async def ListTemplates(  # type: ignore[override]
        self, request: channels_pb2.ListTemplatesRequest, call: Call
    ) -> channels_pb2.ListTemplatesResponse:
        check_parent(call, request.parent)
        if request.channel not in self._registry.types:
            raise NotFound(f"channels/{request.channel}")
        size = size_page(request.page_size)
        question = f"{request.parent}/templates/{request.channel}"
        start = read_page_token(request.page_token, question, int) or 0
        async with transaction(call.engine) as conn:
            choice = await self._accounts.choose(conn, call.app, request.channel)
        found = await self._templates.list(await self._accounts.open(choice))
        page = fill_page([_to_template(template) for template in found[start : start + size]])
        end = start + len(page)
        return channels_pb2.ListTemplatesResponse(
            templates=page, next_page_token=make_page_token(question, end) if end < len(found) else ""
        )

    async def GetChannelSettings(  # type: ignore[override]
        self, request: channels_pb2.GetChannelSettingsRequest, call: Call
    ) -> channels_pb2.ChannelSettings:
        return await self._read_settings(call, request.name, read_name(call, request.name, "channelSettings"))

    async def UpdateChannelSettings(  # type: ignore[override]
        self, request: channels_pb2.UpdateChannelSettingsRequest, call: Call
    ) -> channels_pb2.ChannelSettings:
        given = request.channel_settings
        channel = read_name(call, given.name, "channelSettings", "channel_settings.name")
        if channel not in self._registry.types:
            raise NotFound(f"channels/{channel}")
        conn = await call.begin()
        values = await merge_own_settings(conn, self._vault, call.app.app_id, channel, given.values)
        try:
            self._registry.build_own(channel, values, self._accounts.name_webhook(call.app, channel))
        except SettingsWrong as error:
            path = "channel_settings.values"
            raise FieldsInvalid(Violation(f"{path}.{field}" if field else path, text) for field, text in error.faults) from None
        await put_own_settings(conn, self._vault, call.app.app_id, channel, values)
        return await self._read_settings(call, given.name, channel)

    async def DeleteChannelSettings(  # type: ignore[override]
        self, request: channels_pb2.DeleteChannelSettingsRequest, call: Call
    ) -> Empty:
        channel = read_name(call, request.name, "channelSettings")
        if not await delete_own_settings(await call.begin(), call.app.app_id, channel):
            raise NotFound(request.name)
        return Empty()

    async def _read_settings(self, call: Call, name: str, channel: str) -> channels_pb2.ChannelSettings:
        stored = await read_own_settings(await call.begin(), self._vault, call.app.app_id, channel)
        if stored is None:
            raise NotFound(name)
        found = self._registry.types.get(channel)
        has_webhooks = found is not None and found.channel.capabilities.webhooks
        return channels_pb2.ChannelSettings(
            name=name,
            set_values=sorted(stored.values or ()),
            webhook_url=self._accounts.name_webhook(call.app, channel) if has_webhooks else "",
            update_time=to_timestamp(stored.update_time),
            problems=self._accounts.find_problems(call.app, channel, stored),
        )

    async def _to_channel(self, call: Call, found: ChannelType) -> channels_pb2.Channel:
        name = found.name
        problems: Sequence[str] = self._registry.obstacles.get(name, ())
        own = await read_own_settings(await call.begin(), self._vault, call.app.app_id, name)
        if own is not None:
            problems = self._accounts.find_problems(call.app, name, own)
        is_broken = any(problem.startswith(("opening", "building")) for problem in problems)
        state = channels_pb2.Channel.State
        return channels_pb2.Channel(
            name=f"channels/{name}",
            display_name=found.channel.label,
            state=state.BROKEN if is_broken else state.NOT_CONFIGURED if problems else state.READY,
            problems=problems,
            app_settings=sorted(found.channel.settings_model.by_app),
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
            has_templates=found.channel.capabilities.templates,
        )


def _to_template(template: Template) -> channels_pb2.Template:
    return channels_pb2.Template(
        template=template.name,
        language=template.language,
        status=template.status,
        usable=template.is_usable,
        content=to_struct(template.content),
        header=_show_words(template.header),
        body=_show_words(template.body),
        footer=_show_words(template.footer),
        buttons=map(_show_words, template.buttons[:_MOST_BUTTONS]),
    )


def _show_words(text: str) -> str:
    return text if len(text) <= _LONGEST_WORDS else ""


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
