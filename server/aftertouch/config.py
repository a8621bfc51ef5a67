"""The server's settings: ``AFTERTOUCH_*`` in the environment, read once into one frozen value.

Every problem is reported at once, and a name that begins with the prefix but is no setting is a problem too: a misspelt
setting must not be silently ignored. A channel's own settings, ``AFTERTOUCH_<CHANNEL>_<FIELD>``, belong to its plugin.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

PREFIX = "AFTERTOUCH_"
CALLER_NAMES = frozenset({"AFTERTOUCH_API_KEY", "AFTERTOUCH_ADDRESS"})
"""What callers are configured by: no settings of a server, but often set in the same shell."""


class ConfigError(Exception):
    """The settings cannot be used; ``problems`` holds every reason, by name and without values."""

    def __init__(self, problems: Collection[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def _check_database_url(url: str) -> str:
    if urlsplit(url).scheme not in ("postgresql", "postgres"):
        raise ValueError("must be like postgresql://user:password@host/database")
    return url


def _check_address(address: str) -> str:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65_535:
        raise ValueError("must be like 127.0.0.1:7070")
    return address


def _check_public_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be like https://hooks.example.com, without a query")
    return url.rstrip("/")


def is_safe_address(url: str) -> bool:
    """True when nobody on the way can read or change what is said at an address: with TLS, or on this machine."""
    try:
        parts = urlsplit(url)
        return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"))
    except ValueError:
        return False


def _check_issuer(url: str) -> str:
    if not is_safe_address(url) or not urlsplit(url).netloc or urlsplit(url).query:
        raise ValueError("must be like https://login.example.com, below which /.well-known/openid-configuration is found")
    return url.rstrip("/")


def _check_secret_key(key: SecretStr) -> SecretStr:
    if len(key.get_secret_value()) < 32:
        raise ValueError("must have at least 32 characters; `openssl rand -base64 32` makes one")
    return key


DatabaseUrl = Annotated[SecretStr, AfterValidator(lambda url: SecretStr(_check_database_url(url.get_secret_value())))]
ListenAddress = Annotated[str, AfterValidator(_check_address)]


class Config(BaseModel):
    """The settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    database_url: DatabaseUrl | None = Field(None, description="PostgreSQL 15 to 18; without it an embedded one is started")
    data_dir: Path = Field(Path(".aftertouch"), description="Where the embedded PostgreSQL, the secret key and the spool live")
    pg_bindir: Path | None = Field(None, description="Programs for the embedded PostgreSQL, instead of the wheel's")
    secret_key: Annotated[SecretStr, AfterValidator(_check_secret_key)] | None = Field(
        None, description="Signs tokens; 32 characters or more. Needed with AFTERTOUCH_DATABASE_URL; made and kept otherwise"
    )
    grpc_address: ListenAddress = Field("127.0.0.1:7070", description="Where gRPC listens")
    http_address: ListenAddress = Field("127.0.0.1:7071", description="Where webhooks arrive")
    metrics_address: ListenAddress | None = Field(
        None,
        description="Where /metrics is served to Prometheus, not for strangers; of several processes each takes the next port",
    )
    public_url: Annotated[str, AfterValidator(_check_public_url)] | None = Field(
        None, description="How providers reach the HTTP address from outside; http://<http_address> by default"
    )
    spool_megabytes: int = Field(
        256, ge=0, description="For webhooks that arrive while the database is away; 0 has their providers send them again"
    )
    channels: str | None = Field(None, description="Comma-separated names: only these channels are used")
    send_units: int = Field(
        4, ge=0, le=64, description="Work units that a process sends at once on each channel; 0 leaves sending to workers"
    )
    pause_failures: int = Field(
        100,
        ge=0,
        description="Failures in a row that pause a campaign; 0 never does. People who are gone do not count",
    )
    pause_percent: int = Field(
        50, ge=0, le=100, description="Share of failures among 200 messages or more that pauses a campaign; 0 never does"
    )
    processes: int = Field(1, ge=1, le=16, description="Server processes of `aftertouch serve`, which share both ports")
    channelz: bool = Field(False, description="Serve gRPC's channelz; costs about a tenth of the throughput")
    serve_console: bool = Field(True, description="Serve the console for people at <http_address>/console")
    oidc_issuer: Annotated[str, AfterValidator(_check_issuer)] | None = Field(
        None, description="An OpenID Connect issuer, by which the console's users can sign in instead of with a password"
    )
    oidc_client_id: str | None = Field(
        None, description="What the issuer knows this server by, with <public_url>/console/sign-in/return to come back to"
    )
    oidc_client_secret: SecretStr | None = Field(None, description="By which the issuer recognizes it")
    log_format: Literal["console", "json"] = Field("console", description="How log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least important lines to log")

    @property
    def allowed_channels(self) -> frozenset[str] | None:
        """The names in ``channels``; None for all."""
        if self.channels is None:
            return None
        return frozenset(name.strip() for name in self.channels.split(",") if name.strip())


def name_setting(field: str) -> str:
    """The environment name of a setting."""
    return PREFIX + field.upper()


def load_config(environment: Mapping[str, str], channel_prefixes: Collection[str]) -> Config:
    """Read the settings.

    Args:
        environment: the process's environment; an empty value counts as unset.
        channel_prefixes: beginnings of names that belong to installed channels, as in ``AFTERTOUCH_SMS_``.

    Raises:
        ConfigError: with every problem.
    """
    names = {name_setting(field): field for field in Config.model_fields}
    given = {key: value for key, value in environment.items() if key.startswith(PREFIX) and value}
    problems = [
        f"{key} is not a setting; `aftertouch settings` lists them"
        for key in sorted(given)
        if key not in names and key not in CALLER_NAMES and not key.startswith(tuple(channel_prefixes))
    ]
    values = {names[key]: value for key, value in given.items() if key in names}
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            problems.append(f"{name_setting(str(fault['loc'][0]))}: {fault['msg'].removeprefix('Value error, ')}")
        raise ConfigError(problems) from None
    if config.database_url is not None and config.secret_key is None:
        problems.append("AFTERTOUCH_SECRET_KEY is needed with AFTERTOUCH_DATABASE_URL: all servers must sign with the same one")
    given_for_oidc = [config.oidc_issuer, config.oidc_client_id, config.oidc_client_secret]
    if any(given_for_oidc) and not all(given_for_oidc):
        problems.append("AFTERTOUCH_OIDC_ISSUER, AFTERTOUCH_OIDC_CLIENT_ID and AFTERTOUCH_OIDC_CLIENT_SECRET are needed together")
    if problems:
        raise ConfigError(problems)
    return config
