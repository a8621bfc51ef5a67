"""The part of the contract that needs no provider: declarations, settings, addresses, contents, and a harmless import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from datetime import timedelta
from typing import Union, get_args, get_origin

import pytest
from pydantic import SecretBytes, SecretStr, ValidationError

from aftertouch.channels import STORED, Address, Channel, Limit
from aftertouch.declarations import OPTIONAL_METHODS, InvalidDeclaration, compile_channel
from aftertouch.plugins import build_registry, discover_channels, name_setting
from aftertouch.testing._subject import WEBHOOK_BASE_URL, Subject

_SECRET_NAME = re.compile(r"secret|token|password|passphrase|private|api_?key")
_STRANGE: tuple[object, ...] = (None, "", "x", 0, -1, True, [], {}, ["x"], {"x": "y"}, "\x00", "9" * 5_000)
_IMPORT_PROBE = """
import importlib, sys, threading
found = []
def watch(event, arguments):
    # urllib3, below many an SDK, binds to port 0 to learn whether there is IPv6.
    if event in {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.fork"} or (
        event == "socket.bind" and arguments[1][1:2] != (0,)
    ):
        found.append(event)
sys.addaudithook(watch)
importlib.import_module(sys.argv[1])
if threading.active_count() > 1:
    found.append("starting a thread")
print(", ".join(found))
"""


class DeclaringChecks(Subject):
    """Checks of the class itself."""

    def test_declarations_are_valid(self) -> None:
        try:
            compile_channel(self.channel, distribution="under test", version="0")
        except InvalidDeclaration as error:
            pytest.fail("The server would refuse this class:\n- " + "\n- ".join(error.faults), pytrace=False)

    def test_declarations_have_schemas_that_travel(self) -> None:
        for model in (self.channel.address_model, self.channel.content_model, self.channel.settings_model):
            schema = json.loads(json.dumps(model.model_json_schema()))
            assert schema.get("additionalProperties") is False, (
                f"{model.__qualname__} takes fields that it does not know, so a caller's typing error is lost: "
                'keep extra="forbid" in its model_config'
            )

    def test_import_does_no_io(self) -> None:
        module = self.channel.__module__
        probe = subprocess.run(
            [sys.executable, "-B", "-c", _IMPORT_PROBE, module],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert probe.returncode == 0, f"import {module} fails in a fresh interpreter:\n{probe.stderr}"
        assert not probe.stdout.strip(), (
            f"import {module} does or prints: {probe.stdout.strip()}. Move it into __aenter__: every command imports every plugin"
        )

    def test_settings_build_the_channel(self) -> None:
        channel = self.build()
        assert channel.settings is not None, f"{type(channel).__qualname__}.__init__ must call super().__init__"
        assert channel.webhook_url == f"{WEBHOOK_BASE_URL}/{channel.name}", (
            f"{type(channel).__qualname__}.__init__ must pass webhook_url to super().__init__"
        )

    def test_settings_that_are_missing_are_named(self) -> None:
        registry = build_registry(discover_channels(extra=[self.channel], group=""), {}, webhook_base_url=WEBHOOK_BASE_URL)
        obstacles = registry.obstacles.get(self.channel.name, ())
        for field, setting in self.channel.settings_model.model_fields.items():
            name = name_setting(self.channel.name, field)
            assert not setting.is_required() or any(obstacle.startswith(name) for obstacle in obstacles), (
                f"{name} is required, yet an operator without it is told {obstacles!r}: leave checks to settings_model"
            )

    def test_settings_that_are_secret_are_secret_strings(self) -> None:
        for field, setting in self.channel.settings_model.model_fields.items():
            annotation = setting.annotation
            kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
            assert not (_SECRET_NAME.search(field) and str in kinds), (
                f"setting {field!r} sounds secret but is a str, which shows in every repr: make it a pydantic.SecretStr"
            )
            assert str in kinds or setting.is_required() or not isinstance(setting.default, SecretStr | SecretBytes), (
                f"setting {field!r} has a secret as its default, which everybody can read"
            )

    def test_address_key_names_the_address(self) -> None:
        channel = self.build()
        first, second = self.make_address(channel), self.make_address(channel)
        assert first.key == second.key, "the same address has two keys: a person would be messaged twice"
        assert 1 <= len(first.key) <= 2_048, f"the address's key has {len(first.key)} characters; 1 to 2,048 are allowed"

    def test_address_survives_storage(self) -> None:
        address = self.make_address(self.build())
        stored = json.loads(address.model_dump_json())
        try:
            again = self.channel.address_model.model_validate(stored)
            read = self.channel.address_model.model_validate(stored, context=STORED)
        except ValidationError as error:
            pytest.fail(f"{self.channel.address_model.__qualname__} refuses its own JSON {stored}: {error}", pytrace=False)
        assert again == address, f"{address.model_dump()} became {again.model_dump()} when it was stored as JSON"
        assert read == address, f"{address.model_dump()} became {read.model_dump()} when it was read for a message"

    def test_address_that_is_strange_is_refused_in_words(self) -> None:
        channel = self.build()
        fields = self.make_address(channel).model_dump(mode="json")
        cases = [{}, {**fields, "no_such_field": 1}]
        cases += [{**fields, field: strange} for field in fields for strange in _STRANGE]
        for case in cases:
            try:
                address = channel.parse_address(case)
            except ValidationError:
                continue
            except Exception as error:
                pytest.fail(
                    f"parse_address raised {type(error).__name__}: {error} for {str(case)[:300]}; only pydantic's "
                    "ValidationError tells a caller what is wrong: raise ValueError inside a validator",
                    pytrace=False,
                )
            assert isinstance(address, Address), f"parse_address gave {type(address).__name__} for {str(case)[:300]}"
            assert 1 <= len(address.key) <= 2_048, f"parse_address took {str(case)[:300]}, whose key is empty or too long"

    def test_content_survives_storage(self) -> None:
        content = self.make_content()
        again = type(content).model_validate(json.loads(content.model_dump_json()))
        assert again == content, f"{content.model_dump()} became {again.model_dump()} when it was stored as JSON"

    def test_limits_are_few_named_and_private(self) -> None:
        channel = self.build()
        (message,) = self.make_messages(channel, "http://127.0.0.1:9")
        limits = channel.limits(message)
        assert isinstance(limits, list | tuple), f"limits gave {limits!r}, which is no sequence"
        for limit in limits:
            assert isinstance(limit, Limit), f"limits gave {limit!r}, which is no Limit"
            key, interval = limit.key, limit.interval
            assert isinstance(key, str), f"limits gave the key {key!r}, which is no text"
            assert 1 <= len(key) <= 200, f"limits gave a key of {len(key)} characters; 1 to 200 are allowed: {key[:300]!r}"
            assert isinstance(interval, timedelta), f"limit {key!r} has the interval {interval!r}, which is no timedelta"
            assert interval >= timedelta(0), f"limit {key!r} has {interval} between two messages, which is less than nothing"
            leaks = self.find_leaks(key, channel, message)
            assert not leaks, f"limit {key!r} shows {', '.join(leaks)}. Keys are stored: put a hash of the address there"
        keys = [limit.key for limit in limits]
        assert len(set(keys)) == len(keys), f"limits gave one key twice: {keys}; each message would count as two"
        assert channel.limits(message) == limits, (
            "limits gave two answers for one message: it is called for every message, so keep it pure, and the server counts"
        )

    def test_optional_methods_are_declared_where_they_are_written(self) -> None:
        for method, capability in OPTIONAL_METHODS.items():
            is_written = getattr(self.channel, method) is not getattr(Channel, method)
            is_declared = getattr(self.channel.capabilities, capability)
            assert not is_written or is_declared, f"{method} is written, but nobody calls it: set capabilities.{capability}"
            assert is_written or not is_declared, (
                f"capabilities.{capability} is set, but {method} is not written: it would be called, and fail"
            )

    def test_repr_shows_nothing_private(self) -> None:
        channel = self.build()
        (message,) = self.make_messages(channel, "http://127.0.0.1:9")
        for thing in (channel, channel.settings, message):
            leaks = self.find_leaks(f"{thing!r} {thing}", channel, message)
            assert not leaks, f"repr or str of {type(thing).__qualname__} shows {', '.join(leaks)}"
