"""Aftertouch: send a campaign, hear what happened to it, and message those who did, or did not, do a thing."""

from importlib.metadata import version

from aftertouch.hookspecs import hookimpl

__all__ = ["__version__", "hookimpl"]

__version__ = version("aftertouch")
