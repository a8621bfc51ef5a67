"""Which links of a content are tracked, and what is left of the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftertouch.channels import Content
from aftertouch.delivery.clicks import is_machine
from aftertouch.delivery.render import ContentTemplate, render_link
from aftertouch.links import MOST_LINKS, find_front_page, is_same_site, track_links, write_location

BASE = "https://go.example/l/"
TOKEN = "AbCdEfGhIjKlMnOpQrStUv-_"


class Text(Content):
    body: str


def render(body: str) -> tuple[str, list[str]]:
    tracked = track_links({"body": body}, ("body",))
    rendered = ContentTemplate(tracked.content, Text, BASE).render("ada", {"id": "7", "site": "evil.example"}, TOKEN)
    assert isinstance(rendered, Text)
    return rendered.body.replace(f"{BASE}{TOKEN}", "#"), list(tracked.links)


@pytest.mark.parametrize(
    ("body", "shown", "links"),
    [
        ("See https://shop.example.", "See #0.", ["https://shop.example"]),
        ("https://a.example/x?y=1&z=2#f, HTTP://B.example!", "#0, #1!", ["https://a.example/x?y=1&z=2#f", "HTTP://B.example"]),
        ("(https://en.example/wiki/Sale_(shop))", "(#0)", ["https://en.example/wiki/Sale_(shop)"]),
        ("[here](https://a.example/b)", "[here](#0)", ["https://a.example/b"]),
        ("https://a.example:8443/ end", "#0 end", ["https://a.example:8443/"]),
        ("https://a.example/?u={{ id }}&v={{ id | upcase }} ok", "#0 ok", ["https://a.example/?u={{ id }}&v={{ id | upcase }}"]),
        ("https://a.example https://a.example", "#0 #1", ["https://a.example"] * 2),
        ("{% if id %}https://a.example{% else %}https://b.example{% endif %}", "#0", ["https://a.example", "https://b.example"]),
        ("{% unless id %}https://a.example{% endunless %}https://b.example", "#1", ["https://a.example", "https://b.example"]),
    ],
)
def test_link_is_replaced_by_its_number(body: str, shown: str, links: list[str]) -> None:
    assert render(body) == (shown, links)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("https://{{ site }}/x", "https://evil.example/x"),
        ("https://shop.{{ site }}/x", "https://shop.evil.example/x"),
        ("https://shop.example{{ site }}", "https://shop.exampleevil.example"),
        ("https://shop.example@{{ site }}/", "https://shop.example@evil.example/"),
        ("https://shop.example:{{ site }}/", "https://shop.example:evil.example/"),
        ("{{ nothing | default: 'https://a.example/' }}", "https://a.example/"),
        ("https://shop.{% if id %}{{ site }}{% endif %}/x", "https://shop.evil.example/x"),
        ("https://a.example/x{% if id %}/y{% endif %}", "https://a.example/x/y"),
        ("{% if id %}https://a.example/{% endif %}?x", "https://a.example/?x"),
        ("{% raw %}https://a.example/{{ x }}{% endraw %}", "https://a.example/{{ x }}"),
        ("https://münchen.example/", "https://münchen.example/"),
        ("ftp://a.example, shop.example, xhttps://a.example", "ftp://a.example, shop.example, xhttps://a.example"),
    ],
)
def test_link_whose_host_is_not_written_out_stays(body: str, shown: str) -> None:
    assert render(body) == (shown, [])


def test_fields_that_hold_no_links_are_left_alone() -> None:
    content = {
        "url": "https://a.example/",
        "icon": "https://cdn.example/i.png",
        "actions": [{"url": "https://b.example/", "icon": "https://cdn.example/b.png"}, {"title": "https://c.example/"}],
    }
    tracked = track_links(content, ("url", "actions.url", "missing"))
    assert list(tracked.links) == ["https://a.example/", "https://b.example/"]
    assert tracked.content["icon"] == content["icon"]
    assert tracked.content["actions"][0]["icon"] == content["actions"][0]["icon"]
    assert tracked.content["actions"][1] == content["actions"][1]


def test_links_beyond_the_most_stay() -> None:
    links = [f"https://a.example/{number}" for number in range(MOST_LINKS + 5)]
    shown, tracked = render(" ".join(links))
    assert tracked == links[:MOST_LINKS]
    assert shown.split()[MOST_LINKS:] == links[MOST_LINKS:]


@given(st.text(st.characters(codec="utf-8"), max_size=300))
def test_any_text_is_tracked_in_no_time_and_keeps_what_it_says(text: str) -> None:
    tracked = track_links({"body": text}, ("body",))
    if not tracked.links:
        assert tracked.content["body"] == text


@pytest.mark.parametrize("text", ["https://" * 8_000, "{{" * 30_000, "{%" * 30_000, "https://a.example/" + "{{x" * 20_000])
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    """The test's own time limit would end a search that is quadratic in 60,000 characters."""
    track_links({"body": text}, ("body",))


@pytest.mark.parametrize(
    ("attributes", "leads_elsewhere"),
    [({"id": "7"}, False), ({"id": "@evil.example/"}, False), ({"id": "\\@evil.example"}, False), ({"id": "\r\nX: y"}, False)],
)
def test_attribute_leads_to_no_other_site(attributes: dict[str, str], leads_elsewhere: bool) -> None:
    link = "https://shop.example/{{ id }}"
    rendered = render_link(link, "ada", attributes)
    assert is_same_site(link, rendered) is not leads_elsewhere
    assert write_location(rendered).startswith("https://shop.example/")
    assert not set(write_location(rendered)) & set("\r\n\0 \\")


@pytest.mark.parametrize("link", ["https://shop.example?{{ id }}", "https://shop.example#{{ id }}"])
def test_front_page_is_the_host_that_is_written_out(link: str) -> None:
    assert find_front_page(link) == "https://shop.example/"


def test_link_that_cannot_be_rendered_leads_to_the_front_page() -> None:
    assert render_link("https://a.example/{{ missing }}", "ada", {}) == "https://a.example/"


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("HEAD", {"user-agent": "Mozilla/5.0"}),
        ("GET", {}),
        ("GET", {"user-agent": "facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)"}),
        ("GET", {"user-agent": "WhatsApp/2.23.20.0 A"}),
        ("GET", {"user-agent": "TelegramBot (like TwitterBot)"}),
        ("GET", {"user-agent": "Slackbot-LinkExpanding 1.0"}),
        ("GET", {"user-agent": "Mozilla/5.0 (compatible; Googlebot/2.1)"}),
        ("GET", {"user-agent": "curl/8.5"}),
        ("GET", {"user-agent": "Mozilla/5.0", "sec-purpose": "prefetch;prerender"}),
        ("GET", {"user-agent": "Mozilla/5.0", "x-purpose": "preview"}),
    ],
)
def test_machine_is_told_from_a_person(method: str, headers: dict[str, str]) -> None:
    assert is_machine(method, headers)


@pytest.mark.parametrize(
    "agent",
    [
        "Mozilla/5.0 (iPhone; CPU iPhone OS 19_0 like Mac OS X) AppleWebKit/605.1.15 Version/19.0 Mobile/15E148 Safari/604.1",
        "Mozilla/5.0 (Linux; Android 16; Pixel 9) AppleWebKit/537.36 Chrome/156.0.0.0 Mobile Safari/537.36",
        "Mozilla/5.0 (Linux; Android 13; CUBOT X50) AppleWebKit/537.36 Chrome/120.0.0.0 Mobile Safari/537.36",
        "Mozilla/5.0 (X11; Linux x86_64; rv:153.0) Gecko/20100101 Firefox/153.0",
    ],
)
def test_person_is_not_taken_for_a_machine(agent: str) -> None:
    assert not is_machine("GET", {"user-agent": agent})
