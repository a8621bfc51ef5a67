"""What the console says in place of names: states, reasons with what to do about them, refusals, numbers and times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from markupsafe import Markup, escape

from aftertouch.errors import AftertouchError

STATES: Mapping[str, str] = {
    "DRAFT": "Draft",
    "SCHEDULED": "Scheduled",
    "SENDING": "Sending",
    "PAUSED": "Paused",
    "SENT": "Sent",
    "CANCELED": "Canceled",
    "FAILED": "Failed",
}

REASONS: Mapping[str, tuple[str, str]] = {
    "recipient_gone": ("Address does not work", "Nothing to do: the address is marked invalid and gets no more messages."),
    "opted_out": ("Opted out", "Nothing to do: the person said stop on this channel. Another channel may reach them."),
    "capped": ("Held back by the provider", "The provider limits messages to this person. Retarget them on another channel."),
    "window": ("Outside the service window", "Only an approved template reaches them now. Retarget with one."),
    "content": ("Message could not be sent as it is", "Look at the text and at missing attributes; then retarget them."),
    "config": ("Account or template is set up wrong", "Ask an administrator to look at Channels and the provider's account."),
    "rate": ("Sent too fast", "The provider asked to slow down. These were tried again until the limit of tries."),
    "transient": ("Provider did not answer", "A passing failure outlasted all tries. Retarget them later."),
    "unsubscribed": ("No active address", "They lost their address or opted out between launch and sending."),
    "policy": ("Left out by a rule of yours", "See the code: a canceled campaign, its end, quiet hours or the frequency cap."),
    "unknown": ("Unknown code", "The provider gave a code that nobody has met yet. Its documentation may explain it."),
}
"""By reason class: what it means, and what to do about it."""

DROPS: Mapping[str, str] = {
    "NO_SUBSCRIPTION": "have no address on this channel",
    "OPTED_OUT": "opted out of this channel",
    "INVALID": "have an address that does not work",
    "HELD": "are held back by the provider for now",
    "OVER_FREQUENCY_CAP": "were messaged as often as your frequency cap allows",
    "IN_OPEN_WAVE": "are in another follow-up that is still being sent",
    "HELD_OUT": "are held out, so that the others can be compared with them",
}

STANDINGS: Mapping[str, str] = {"active": "active", "opted_out": "opted out", "invalid": "does not work"}
"""Of a subscription."""

SKIPS: Mapping[str, str] = {
    "missing_attribute": "The message uses an attribute that this person does not have. Give it a default.",
    "template_error": "The message cannot be filled in with this person's attributes.",
    "invalid_content": "Filled in for this person, the message is not one that the channel takes.",
}
"""Why a message cannot be shown for a person, by reason code."""

STATUSES: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 409,
    "OUT_OF_RANGE": 400,
    "RESOURCE_EXHAUSTED": 413,
    "UNAVAILABLE": 503,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
}
"""The HTTP status of each canonical code."""

_REFUSALS: Mapping[str, str] = {
    "SCOPE_INSUFFICIENT": "Your role does not include this. Ask an admin of your app.",
    "RESOURCE_NOT_FOUND": "This does not exist, or belongs to another app.",
    "ETAG_MISMATCH": "Somebody else changed this meanwhile. Reload the page, and decide again.",
    "CONTENT_MISSING": "The message is not complete yet.",
    "AUDIENCE_EMPTY": "Nobody of this audience can be reached on this channel.",
    "SOURCE_NOT_SENT": "This campaign was not launched yet; there is nobody to retarget.",
    "RETARGETING_NOT_ENABLED": "Retargeting is not part of your plan.",
    "SOURCE_BEFORE_PLAN": "This campaign was sent before your plan included retargeting.",
    "DATABASE_UNAVAILABLE": "The database does not answer. Nothing was done; try again in a moment.",
    "SERVER_STOPPING": "The server is being stopped. Try again in a moment.",
    "RESOURCE_ALREADY_EXISTS": "There is one of this id already. Choose another.",
    "REQUEST_ID_REUSED": "This form was sent before, with something else in it. Open it anew, and choose again.",
}


def explain(error: AftertouchError, campaign: str = "") -> str:
    """A refusal in the words of the console; pages show the times in it by the filter ``times``.

    Args:
        campaign: that was to be changed, where another one may be in the way.
    """
    match error.reason:
        case "CAMPAIGN_STATE_WRONG" if campaign not in ("", error.metadata["campaign"]):
            state = STATES.get(error.metadata["state"], error.metadata["state"])
            return f"The campaign before this one is {state.lower()}, so nothing can wait for it. Choose another time."
        case "CAMPAIGN_STATE_WRONG":
            state = STATES.get(error.metadata["state"], error.metadata["state"])
            return f"This campaign is {state.lower()}, so this cannot be done any more."
        case "SOURCE_TOO_OLD":
            return (
                f"This campaign was sent more than {error.metadata['retention_days']} days ago."
                " What people did is kept no longer, so nobody can be retargeted by it."
            )
        case "SCHEDULE_TOO_LATE":
            return f"Choose a time until {error.metadata['last_time']}: what people did is kept no longer."
        case "SELECTION_UNSETTLED":
            signal, time = error.metadata["signal"], error.metadata["settle_time"]
            return f"It is too early to say who has not {signal}: some may still be reported. Ask again at {time}."
        case "CHAIN_TOO_LONG":
            return f"This chain has more than {error.metadata['limit']} campaigns, too many to be counted together."
        case "LIST_LIMIT_REACHED":
            return f"You have {error.metadata['limit']} lists, as many as you may have. Delete one."
        case "MESSAGE_TOO_LARGE":
            return f"This is larger than {number(int(error.metadata['limit_bytes']))} bytes. Send it in parts."
        case "LIST_IN_USE":
            return "A campaign that is not launched yet is for this list. Give it another audience, or delete it."
        case "CHANNEL_NOT_READY":
            return f"The channel {error.metadata['channel']} cannot send: {error.metadata['problems']}."
        case "TEMPLATES_UNREADABLE":
            return f"The templates cannot be listed: {error.metadata['cause']}."
        case "INTERNAL":
            return f"A defect of ours. Tell your operator this number: {error.metadata['request']}."
    return _REFUSALS.get(error.reason, str(error))


def explain_empty() -> str:
    """Why a wave cannot be launched although everything else is right."""
    return _REFUSALS["AUDIENCE_EMPTY"]


def number(value: float) -> str:
    """1234567 as 1,234,567."""
    return f"{value:,}"


def share(part: int, whole: int) -> str:
    """A part in per cent: whole ones, with a decimal below ten; nothing is rounded to 0% or 100% that is not."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%" if percent % 1 and (percent < 10 or percent > 99) else f"{percent:.0f}%"


_LONGEST = 80

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d(?::\d\d)?)(?: UTC|Z)")


def show_times(text: str) -> Markup:
    """A text of ours with its times as the page's script shows them."""

    def show(found: re.Match[str]) -> str:
        try:
            return show_time(datetime.fromisoformat(f"{found[1]}T{found[2]}+00:00"))
        except ValueError:
            # Only looks like one: somebody's own words.
            return found[0]

    return Markup(_MOMENT.sub(show, escape(text)))


def span(time: timedelta) -> str:
    """A span of whole minutes, as in "a minute", "15 minutes" or "2 hours"."""
    for unit, article, seconds in (("day", "a", 86_400), ("hour", "an", 3_600), ("minute", "a", 60)):
        if time.total_seconds() % seconds == 0:
            count = int(time.total_seconds()) // seconds
            return f"{article} {unit}" if count == 1 else f"{count} {unit}s"
    return f"{time.total_seconds():.0f} seconds"


def shorten(text: str) -> str:
    """A text that is as long as somebody likes, in a line with others."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def name_file(address: str) -> str:
    """What somebody knows a picture by: the last part of its address."""
    path = address.partition("?")[0].partition("#")[0]
    return shorten(path.rstrip("/").rpartition("/")[2] or address)


def count_people(value: int) -> str:
    """A number with its unit."""
    return "1 person" if value == 1 else f"{value:,} people"


def show_time(time: datetime | None) -> Markup:
    """A time for the page's script to show in the viewer's zone; without it, in UTC."""
    if time is None:
        return Markup("")
    utc = time.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(utc.isoformat(timespec="seconds"), escape(f"{utc:%Y-%m-%d %H:%M} UTC"))
