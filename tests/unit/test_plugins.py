"""Discovery against real distributions: a module and its metadata, written to a folder on ``sys.path``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import SecretStr, field_validator

from aftertouch.channels import Channel
from aftertouch.plugins import Discovery, build_registry, discover_channels, name_setting

GROUP = "aftertouch_under_test"

CHANNEL = """
from aftertouch.channels import *
from aftertouch.hookspecs import hookimpl

class {class_name}Address(Address):
    phone: str
    @property
    def key(self):
        return self.phone

class {class_name}Content(Content):
    text: str

class {class_name}(Channel):
    name = "{name}"
    label = "A channel"
    address_model = {class_name}Address
    content_model = {class_name}Content
    settings_model = Settings
    capabilities = Capabilities(webhooks=False)
    signals = (Signal(name="delivered", label="Delivered", implies=("sent",)),)
    actions = (Action(name="sent", label="Sent", short_name="sent", expression="sent"),)
    reasons = {{}}
    async def send(self, messages):
        return [Accepted() for _ in messages]
"""

HOOK = """
@hookimpl
def aftertouch_register_channels():
    return [{class_name}]
"""


def write_channel(name: str, class_name: str = "Found", hook: str = HOOK) -> str:
    return CHANNEL.format(name=name, class_name=class_name) + hook.format(class_name=class_name)


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution of one module on the path, with an entry point in a group of these tests' own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def write(distribution: str, source: str) -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        metadata = tmp_path / f"{module}-1.2.3.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nplugin = {module}\n")

    yield write
    for module in set(sys.modules) - before:
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in str(sys.modules[module].__file__):
            del sys.modules[module]


def discover(allowed: frozenset[str] | None = None) -> Discovery:
    return discover_channels(group=GROUP, allowed=allowed)


def one_cause(found: Discovery, distribution: str) -> str:
    (problem,) = found.problems
    assert (problem.distribution, problem.entry_point) == (distribution, "plugin")
    return problem.cause


def test_plugin_found_is_compiled(install: Install) -> None:
    install("acme-fax", write_channel("fax"))
    found = discover()
    assert found.problems == ()
    fax = found.types["fax"]
    assert (fax.distribution, fax.version, fax.name) == ("acme-fax", "1.2.3", "fax")
    assert fax.evidence["sent"] == {"sent", "delivered"}
    assert fax.evidence["attempted"] == {"attempted", "sent", "failed", "delivered"}
    assert str(fax.actions["sent"].expression) == "sent"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (write_channel("fax", hook=HOOK.replace("channels", "chanels")), "unknown hook 'aftertouch_register_chanels'"),
        (write_channel("fax", hook=HOOK.replace("@hookimpl", "")), "has no function aftertouch_register_channels marked"),
        (write_channel("fax", hook=HOOK.replace("channels()", "channels(server)")), "Argument(s) {'server'}"),
        (write_channel("fax", hook=HOOK.replace("return [{class_name}]", "return {class_name}")), "returned ABCMeta"),
        (write_channel("fax", hook=HOOK.replace("return [{class_name}]", "return 'Found'")), "returned str"),
        (
            write_channel("fax", hook=HOOK.replace("return [{class_name}]", "return [{class_name}.name]")),
            "'fax' is not a subclass",
        ),
        (write_channel("fax", hook=HOOK.replace("return [{class_name}]", "1 / 0")), "ZeroDivisionError: division by zero"),
    ],
)
def test_broken_plugin_is_reported_and_the_rest_run(install: Install, source: str, cause: str) -> None:
    install("a-broken-one", source)
    install("works", write_channel("pager"))
    found = discover()
    assert cause in one_cause(found, "a-broken-one")
    assert list(found.types) == ["pager"]


def test_hook_without_an_answer_is_no_problem_and_no_channel(install: Install) -> None:
    """pluggy drops None, which a plugin may answer when what it needs is not there."""
    install("shy", write_channel("fax", hook=HOOK.replace("return [{class_name}]", "return None")))
    assert discover() == Discovery(types={}, problems=())


def test_duplicate_name_keeps_the_first_distribution(install: Install) -> None:
    install("b-second", write_channel("fax", "Second"))
    install("a-first", write_channel("fax", "First"))
    found = discover()
    assert found.types["fax"].distribution == "a-first"
    assert "channel 'fax' is already provided by a-first" in one_cause(found, "b-second")


def test_allow_list_leaves_the_others_out(install: Install) -> None:
    install("fax", write_channel("fax", "Fax"))
    install("pager", write_channel("pager", "Pager"))
    found = discover(frozenset({"pager"}))
    assert (list(found.types), found.problems) == (["pager"], ())


@pytest.mark.parametrize(
    ("replaced", "by", "cause"),
    [
        ('name = "fax"', 'name = "Fax!"', "name 'Fax!' is not a lower-case word"),
        ('name = "fax"', "name = 5", "name is 5 where a str is expected"),
        ('label = "A channel"', "", "label is None where a str is expected"),
        ("address_model = FoundAddress", "address_model = Content", "where a subclass of Address is expected"),
        ("address_model = FoundAddress", "address_model = Address", "Address does not implement key"),
        ('implies=("sent",)', 'implies=("sen",)', "signals: implied but not declared: sen"),
        ('implies=("sent",)', 'implies="sent"', "implies the text 'sent'"),
        ('name="delivered"', 'name="sent"', "signal 'sent' is the server's own"),
        ('name="delivered"', 'name="refused"', "signal 'refused' is the server's own"),
        ('expression="sent"', 'expression="~sent"', "action 'sent': '~sent' is true of people who were never sent to"),
        ('expression="sent"', 'expression="read"', "names the signal 'read'"),
        ('expression="sent"', 'expression="sent", apart="sent"', "needs both apart and apart_label"),
        ('expression="sent"', "expression=None", "AttributeError"),
        ('Action(name="sent"', 'Action(name="unclear"', "action 'unclear' is the server's own"),
        ("actions = (", 'actions = (Action(name="sent", label="S", short_name="s", expression="sent"),', "declared 2 times"),
        ("webhooks=False", "webhooks=True", "capabilities.webhooks is True, but verify is not overridden"),
        ("webhooks=False", "webhooks=False, batch_size=0", "batch_size is 0, not 1 to 1,000"),
        ("reasons = {}", 'reasons = {"x": "transient"}', "a code is a str and its class a ReasonClass"),
        ("async def send", "def send", "send is not an async function"),
        ("async def send", "async def sent", "does not implement send"),
    ],
)
def test_declaration_at_fault_is_reported(install: Install, replaced: str, by: str, cause: str) -> None:
    source = write_channel("fax")
    assert replaced in source
    install("acme-fax", source.replace(replaced, by, 1))
    found = discover()
    assert found.types == {}
    assert any(cause in problem.cause for problem in found.problems), found.problems


def test_one_bad_class_leaves_its_siblings(install: Install) -> None:
    bad = CHANNEL.format(name="Bad Name", class_name="Bad")
    install("acme-both", bad + write_channel("fax", "Good", HOOK.replace("[{class_name}]", "[Bad, {class_name}]")))
    found = discover()
    assert list(found.types) == ["fax"]
    assert one_cause(found, "acme-both").startswith("Bad: name 'Bad Name'")


def make_class(base: type[Channel], **attributes: object) -> type[Channel]:
    return type(base.__name__, (base,), {"__module__": base.__module__, **attributes})


@pytest.fixture
def fax(install: Install) -> type[Channel]:
    install("acme-fax", write_channel("fax"))
    base = discover().types["fax"].channel

    class FaxSettings(base.settings_model):  # type: ignore[misc, name-defined]
        account: str
        auth_token: SecretStr
        timeout_seconds: float = 10

        @field_validator("auth_token")
        @classmethod
        def check_token(cls, value: SecretStr) -> SecretStr:
            if not value.get_secret_value().startswith("key-"):
                raise ValueError(f"{value.get_secret_value()} does not begin with key-")
            return value

    return make_class(base, settings_model=FaxSettings)


COMPLETE = {"AFTERTOUCH_FAX_ACCOUNT": "acme", "AFTERTOUCH_FAX_AUTH_TOKEN": "key-hush"}


def test_class_without_packaging_is_taken_first(fax: type[Channel]) -> None:
    found = discover_channels(extra=[fax], group=GROUP)
    assert found.types["fax"].channel is fax
    assert "already provided by acme_fax" in one_cause(found, "acme-fax")


def test_settings_complete_build_the_channel(fax: type[Channel]) -> None:
    found = discover_channels(extra=[fax], group="nothing-installed")
    registry = build_registry(
        found, {**COMPLETE, "AFTERTOUCH_FAX_TIMEOUT_SECONDS": ""}, webhook_base_url="https://at.test/hooks/"
    )
    channel = registry.channels["fax"]
    assert channel.settings.model_dump(exclude={"auth_token"}) == {"account": "acme", "timeout_seconds": 10}
    assert channel.webhook_url == "https://at.test/hooks/fax"
    assert registry.obstacles == {}


def test_settings_missing_or_wrong_are_all_named_without_values(fax: type[Channel]) -> None:
    environment = {
        "AFTERTOUCH_FAX_AUTH_TOKEN": "hush-hush",
        "AFTERTOUCH_FAX_TIMEOUT_SECONDS": "soonish",
        "AFTERTOUCH_FAX_TIMEOUT_SECOND": "3",
    }
    registry = build_registry(
        discover_channels(extra=[fax], group="nothing-installed"), environment, webhook_base_url="https://at.test"
    )
    assert registry.channels == {}
    assert "fax" in registry.types
    text = "\n".join(registry.obstacles["fax"])
    assert "AFTERTOUCH_FAX_ACCOUNT is missing" in text
    assert "AFTERTOUCH_FAX_TIMEOUT_SECONDS: Input should be a valid number" in text
    assert "AFTERTOUCH_FAX_TIMEOUT_SECOND is not a setting" in text
    assert "AFTERTOUCH_FAX_AUTH_TOKEN: Value error, … does not begin with key-" in text
    assert "hush" not in text
    assert "soonish" not in text


def test_settings_of_a_longer_channel_name_belong_to_it(fax: type[Channel]) -> None:
    fax_pro = make_class(fax, name="fax-pro")
    environment = {**COMPLETE, "AFTERTOUCH_FAX_PRO_ACCOUNT": "pro", "AFTERTOUCH_FAX_PRO_AUTH_TOKEN": "key-pro"}
    registry = build_registry(
        discover_channels(extra=[fax, fax_pro], group="nothing-installed"), environment, webhook_base_url="https://at.test"
    )
    assert sorted(registry.channels) == ["fax", "fax-pro"]
    assert name_setting("fax-pro", "account") == "AFTERTOUCH_FAX_PRO_ACCOUNT"


class Unbuildable:
    def __init__(self, settings: object, *, webhook_url: str) -> None:
        raise OSError(f"no modem for {settings.account}")  # type: ignore[attr-defined]


def test_channel_that_cannot_be_built_is_reported_without_values(fax: type[Channel]) -> None:
    broken = type("Broken", (Unbuildable, fax), {})
    registry = build_registry(
        discover_channels(extra=[broken], group="nothing-installed"), COMPLETE, webhook_base_url="https://at.test"
    )
    assert registry.obstacles["fax"][0].startswith("building failed: OSError: no modem for …")


class Recorder:
    events: ClassVar[list[str]]

    async def __aenter__(self) -> Recorder:
        self.events.append(f"open {self.name}")  # type: ignore[attr-defined]
        if self.name == "broken":  # type: ignore[attr-defined]
            raise OSError(f"no modem for {self.settings.auth_token.get_secret_value()}")  # type: ignore[attr-defined]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.events.append(f"close {self.name}")  # type: ignore[attr-defined]


async def test_channel_that_cannot_open_is_an_obstacle_and_the_rest_run(fax: type[Channel]) -> None:
    events: list[str] = []
    classes = [type(name, (Recorder, fax), {"name": name, "events": events}) for name in ("alpha", "broken", "omega")]
    environment = {
        f"AFTERTOUCH_{name}_{field}": value
        for name in ("ALPHA", "BROKEN", "OMEGA")
        for field, value in (("ACCOUNT", "acme"), ("AUTH_TOKEN", "key-hush"))
    }
    registry = build_registry(
        discover_channels(extra=classes, group="nothing-installed"), environment, webhook_base_url="https://at.test"
    )
    async with registry.open() as opened:
        assert sorted(opened.channels) == ["alpha", "omega"]
        assert opened.obstacles["broken"][0].startswith("opening failed: OSError: no modem for …")
        assert sorted(opened.types) == ["alpha", "broken", "omega"]
    assert events == ["open alpha", "open broken", "open omega", "close omega", "close alpha"]
    assert sorted(registry.channels) == ["alpha", "broken", "omega"]
