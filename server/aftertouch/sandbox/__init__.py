"""A stand-in on loopback for Twilio, Meta and a web push service, with a made-up population behind them.

It judges the server, so it shares no code with it: signatures, encryption and limits are written here a second time.
"""

from .population import CHANNELS, Person, Population
from .server import Sandbox, run
from .settings import SandboxSettings, Shares, TwilioAccount

__all__ = ["CHANNELS", "Person", "Population", "Sandbox", "SandboxSettings", "Shares", "TwilioAccount", "run"]
