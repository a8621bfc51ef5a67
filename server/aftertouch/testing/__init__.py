"""The contract that every channel keeps, as tests that a channel's author runs by writing one subclass.

    class TestPager(ChannelContract):
        channel = PagerChannel
        ...

It comes with ``pip install aftertouch[testing]`` and needs neither the server nor a database: a ``FakeProvider`` on a loopback
port plays the other side, so the author's own HTTP client is what is tested.
"""

from aftertouch.testing._declaring import DeclaringChecks
from aftertouch.testing._provider import FakeProvider, Fault, ProviderRequest, Response
from aftertouch.testing._sending import SendingChecks
from aftertouch.testing._webhooks import WebhookChecks

__all__ = ["ChannelContract", "FakeProvider", "Fault", "ProviderRequest", "Response"]


class ChannelContract(DeclaringChecks, SendingChecks, WebhookChecks):
    """Subclass it once per channel, as ``class TestPager(ChannelContract)``, and fill in what ``Subject`` describes."""
