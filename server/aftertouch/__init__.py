"""Aftertouch: send a campaign, hear what happened to it, and message those who did, or did not, do a thing."""

from aftertouch.hookspecs import hookimpl

__all__ = ["hookimpl"]
