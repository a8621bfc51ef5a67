"""Every table. Migrations bring a database here, and a test compares the two.

The shape is one that a distributed PostgreSQL can run as well: rolls and receipts are keyed by slot, contacts, their
subscriptions and contact sets by block, and no statement joins the two; the distribution key is part of every primary
key. Times are aware UTC.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Date,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, BIT, INTERVAL, JSONB, TIMESTAMP

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)


def _time(name: str, *, nullable: bool = False, default: bool = False) -> Column[Any]:
    return Column(name, TIMESTAMP(timezone=True), nullable=nullable, server_default=text("now()") if default else None)


apps = Table(
    "apps",
    metadata,
    Column("app_id", BigInteger, Identity(always=True), primary_key=True),
    Column("app", Text, nullable=False, unique=True, comment="last part of the resource name"),
    Column("display_name", Text, nullable=False),
    Column("retargeting_enabled", Boolean, nullable=False, server_default=text("true")),
    _time("retargetable_since", default=True),
    Column("retention_days", Integer, nullable=False, server_default=text("30")),
    Column("quiet_start", Integer, comment="minutes after midnight; null when no hours are quiet"),
    Column("quiet_end", Integer),
    Column("quiet_time_zone", Text, nullable=False, server_default=text("'UTC'"), comment="of contacts that have none"),
    Column("cap_messages", Integer, comment="most messages a contact gets within cap_hours; null when there is no cap"),
    Column("cap_hours", Integer),
    Column("web_origins", ARRAY(Text), nullable=False, server_default=text("'{}'"), comment="whose pages may subscribe browsers"),
    Column("link_url", Text, nullable=False, server_default=text("''"), comment="where tracked links lead; empty: to the server"),
    _time("create_time", default=True),
)

app_secrets = Table(
    "app_secrets",
    metadata,
    Column("app_id", BigInteger, nullable=False),
    Column("name", Text, nullable=False, comment="identity, or keys/, settings/ or changed/ and a channel"),
    Column("secret_id", BigInteger, Identity(always=True), nullable=False),
    Column("sealed", LargeBinary, nullable=False, comment="AES-GCM under a key of the server's"),
    _time("create_time", default=True),
    PrimaryKeyConstraint("app_id", "name", "secret_id"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("api_key", Text, primary_key=True, comment="public part of the secret"),
    Column("app_id", BigInteger, ForeignKey(apps.c.app_id), nullable=False, index=True),
    Column("display_name", Text, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("secret_hash", LargeBinary, nullable=False, comment="sha256; the secret has 256 random bits, so no salt"),
    _time("create_time", default=True),
    _time("revoke_time", nullable=True),
)

requests = Table(
    "requests",
    metadata,
    Column("app_id", BigInteger, nullable=False),
    Column("request_id", Text, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False, comment="of method and request"),
    Column("answer", LargeBinary, comment="null only while the transaction that makes it runs"),
    _time("create_time", default=True),
    PrimaryKeyConstraint("app_id", "request_id"),
    comment="what a request_id was answered with",
)

contact_counters = Table(
    "contact_counters",
    metadata,
    Column("app_id", BigInteger, primary_key=True, autoincrement=False),
    Column("next_number", BigInteger, nullable=False),
    comment="the row is locked while contacts are made, so numbers have no holes",
)

contact_ids = Table(
    "contact_ids",
    metadata,
    Column("app_id", BigInteger, nullable=False),
    # By code points, so that the index finds a prefix, and is sorted the same whatever the system's locales become.
    Column("external_id", Text(collation="C"), nullable=False),
    Column("number", BigInteger, nullable=False),
    PrimaryKeyConstraint("app_id", "external_id"),
)

erasures = Table(
    "erasures",
    metadata,
    Column("app_id", BigInteger, nullable=False),
    _time("erase_time", default=True),
    Column("number", BigInteger, nullable=False),
    PrimaryKeyConstraint("app_id", "erase_time", "number"),
    comment="contact numbers that lead to nobody any more",
)

contacts = Table(
    "contacts",
    metadata,
    Column("block", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("external_id", Text, nullable=False),
    Column("attributes", JSONB, nullable=False),
    Column("time_zone", Text, nullable=False),
    _time("create_time", default=True),
    _time("update_time", default=True),
    PrimaryKeyConstraint("block", "number"),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("block", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("channel", Text, nullable=False),
    Column("address_hash", LargeBinary, nullable=False, comment="blake2b-128 of the address's key"),
    Column("address", JSONB, nullable=False),
    Column("state", Text, nullable=False, comment="active, opted_out or invalid"),
    Column("reason", Text, nullable=False, server_default=text("''")),
    _time("held_until", nullable=True),
    # When a browser last subscribed by itself. Apart from update_time, since nothing changes when it does so every day.
    _time("heard_time", nullable=True),
    _time("update_time", default=True),
    PrimaryKeyConstraint("block", "number", "channel", "address_hash"),
    # Few are ever held, and the funnel asks for all of them.
    Index(None, "block", "channel", "held_until", postgresql_where=text("held_until IS NOT NULL")),
    # Whose address is this? Equality only, so a hash index: half the size of a tree over 16 random bytes.
    Index(None, "address_hash", postgresql_using="hash"),
)

contact_paces = Table(
    "contact_paces",
    metadata,
    Column("block", BigInteger, nullable=False),
    Column("number", BigInteger, nullable=False),
    Column("recent", ARRAY(TIMESTAMP(timezone=True)), nullable=False, comment="when messages were sent, as far as they count"),
    _time("full_until", nullable=True),
    PrimaryKeyConstraint("block", "number"),
    Index(None, "block", "full_until", postgresql_where=text("full_until IS NOT NULL")),
    comment="how often contacts were messaged lately, in apps with a frequency cap",
)

contact_sets = Table(
    "contact_sets",
    metadata,
    Column("block", BigInteger, nullable=False),
    Column("name", Text, nullable=False, comment="as in active/sms, list/7"),
    Column("bits", BIT(varying=True), nullable=False, comment="8,192 bits by contact number"),
    PrimaryKeyConstraint("block", "name"),
)

lists = Table(
    "lists",
    metadata,
    Column("list_id", BigInteger, Identity(always=True), primary_key=True),
    Column("app_id", BigInteger, ForeignKey(apps.c.app_id), nullable=False),
    Column("list", Text, nullable=False, comment="last part of the resource name"),
    Column("display_name", Text, nullable=False),
    _time("create_time", default=True),
    _time("update_time", default=True),
    UniqueConstraint("app_id", "list"),
    comment="the members are the contact set list/<list_id>",
)

campaigns = Table(
    "campaigns",
    metadata,
    Column("campaign_id", BigInteger, Identity(always=True), primary_key=True),
    Column("app_id", BigInteger, ForeignKey(apps.c.app_id), nullable=False),
    Column("campaign", Text, nullable=False, comment="last part of the resource name"),
    Column("display_name", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("content", JSONB),
    Column("audience", JSONB, comment="the Audience message as JSON"),
    Column("state", Text, nullable=False),
    Column("state_reason", Text, nullable=False, server_default=text("''")),
    Column("version", BigInteger, nullable=False, server_default=text("1"), comment="the etag"),
    Column("recipients", BigInteger, nullable=False, server_default=text("0"), comment="length of the roll"),
    Column("root_id", BigInteger, comment="campaign at the root of the chain, of a wave"),
    _time("create_time", default=True),
    _time("update_time", default=True),
    _time("schedule_time", nullable=True),
    _time("send_by_time", nullable=True),
    Column("messages_per_second", Integer, nullable=False, server_default=text("0"), comment="0 is as fast as allowed"),
    Column("transactional", Boolean, nullable=False, server_default=text("false"), comment="no quiet hours, no frequency cap"),
    Column("track_links", Boolean, nullable=False, server_default=text("true")),
    Column("links", ARRAY(Text), nullable=False, server_default=text("'{}'"), comment="tracked ones by number, since the launch"),
    _time("launch_time", nullable=True),
    _time("finish_time", nullable=True),
    Column("holdout_percent", Integer, nullable=False, server_default=text("0"), comment="of the audience, not messaged"),
    Column("holdout_count", BigInteger, nullable=False, server_default=text("0"), comment="length of the holdout's roll"),
    Column("source_id", BigInteger, comment="of a follow-up: the campaign after whose sending it is launched"),
    Column("delay_seconds", BigInteger, comment="and how long after"),
    UniqueConstraint("app_id", "campaign"),
    Index(None, "root_id", postgresql_where=text("root_id IS NOT NULL")),
    Index(None, "app_id", "campaign_id"),
    Index(None, "schedule_time", postgresql_where=text("state = 'SCHEDULED'")),
)

rolls = Table(
    "rolls",
    metadata,
    Column("slot", BigInteger, primary_key=True, autoincrement=False, comment="campaign_id << 20 | chunk"),
    Column("first", BigInteger, nullable=False, comment="smallest contact number"),
    Column("last", BigInteger, nullable=False),
    Column("members", Integer, nullable=False),
    Column(
        "numbers",
        LargeBinary,
        nullable=False,
        comment="less the first: 32-bit little-endian, or a bit each where that is shorter",
    ),
    comment="who is at which position; written once",
)

kinds = Table(
    "kinds",
    metadata,
    Column("kind", Integer, Identity(always=True), primary_key=True),
    Column("signal", Text, nullable=False),
    Column("reason_class", Text, nullable=False),
    Column("reason_code", Text, nullable=False),
    UniqueConstraint("signal", "reason_class", "reason_code"),
    comment="a signal with its reason as one small number",
)

receipts = Table(
    "receipts",
    metadata,
    Column("slot", BigInteger, nullable=False),
    Column("kind", Integer, nullable=False),
    Column("bits", BIT(varying=True), nullable=False, comment="one bit a position, rounded up to bytes"),
    PrimaryKeyConstraint("slot", "kind"),
    comment="of whom it became true; only ever OR-ed",
    # Rows are written again and again: with room in the page an update leaves the index and other pages alone, takes half as
    # long and leaves a tenth of the dead rows.
    postgresql_with={"fillfactor": 50},
)

events = Table(
    "events",
    metadata,
    _time("arrive_time"),
    Column("commit_id", BigInteger, nullable=False, comment="of the transaction that stored it; ever higher"),
    Column("slot", BigInteger, nullable=False),
    Column("position", Integer, nullable=False, comment="within the slot"),
    Column("kind", Integer, nullable=False),
    _time("time"),
    # Rows arrive nearly in the order of their transactions, so a block-range index finds the newest at almost no cost.
    Index(None, "commit_id", postgresql_using="brin", postgresql_with={"autosummarize": "on", "pages_per_range": 32}),
    comment="every event as it came, by the day of its arrival",
    postgresql_partition_by="RANGE (arrive_time)",
)

clusters = Table(
    "clusters",
    metadata,
    Column("system_identifier", BigInteger, primary_key=True, autoincrement=False, comment="PostgreSQL's own, of each initdb"),
    Column("first_commit_id", BigInteger, nullable=False, comment="microseconds since 1970, when the database came here"),
    Column("commit_offset", BigInteger, nullable=False, comment="from the cluster's number of a transaction to its commit_id"),
    comment="where the database is, in one row: its commits are numbered on after those of wherever it was dumped",
)

dropped_days = Table(
    "dropped_days",
    metadata,
    Column("log", Text, nullable=False),
    Column("day", Date, nullable=False),
    Column("last_commit_id", BigInteger, comment="of its events"),
    PrimaryKeyConstraint("log", "day"),
    comment="partitions that are kept no longer",
)

activity = Table(
    "activity",
    metadata,
    Column("slot", BigInteger, nullable=False, comment="the campaign's first"),
    _time("start_time"),
    Column("minutes", Integer, nullable=False, comment="how long, 1 or 60: each event is counted in both"),
    Column("kind", Integer, nullable=False),
    Column("events", BigInteger, nullable=False),
    PrimaryKeyConstraint("slot", "minutes", "start_time", "kind"),
    comment="how many events of a kind happened in a minute, and in an hour",
)

producers = Table(
    "producers",
    metadata,
    Column("app_id", BigInteger, nullable=False),
    Column("producer", Text, nullable=False),
    Column("position", BigInteger, nullable=False, comment="of the last batch that is durable"),
    Column("accepted", BigInteger, nullable=False, comment="events of its batches that were stored"),
    Column("rejected", BigInteger, nullable=False, comment="and that were left out"),
    Column("session", Text, nullable=False, comment="whose the newest stream is, as the caller names it"),
    Column("stream", BigInteger, nullable=False, comment="counts up with every opened stream: the newest commits"),
    _time("update_time", default=True),
    PrimaryKeyConstraint("app_id", "producer"),
)

attempts = Table(
    "attempts",
    metadata,
    _time("arrive_time"),
    Column("slot", BigInteger, nullable=False),
    Column("position", Integer, nullable=False, comment="within the slot"),
    Column("kind", Integer, nullable=False, comment="sent, failed, refused, or attempted when the outcome is unclear"),
    Column("address_hash", LargeBinary, nullable=False),
    Column("channel", Text, nullable=False),
    Column("message_id", Text, nullable=False, comment="the provider's; empty where there is none"),
    Index(None, "message_id", postgresql_where=text("message_id <> ''")),
    Index(None, "slot", "position"),
    # Test sends, by which somebody who is erased is found, whatever became of the draft.
    Index(None, "address_hash", postgresql_where=text("position = -1")),
    # Rows arrive in the order of their times: what was sent in a minute is found at almost no cost.
    Index(None, "arrive_time", postgresql_using="brin", postgresql_with={"autosummarize": "on", "pages_per_range": 32}),
    comment="one row for each message handed to a provider, by day",
    postgresql_partition_by="RANGE (arrive_time)",
)

checkups = Table(
    "checkups",
    metadata,
    Column("channel", Text, nullable=False),
    Column("age", INTERVAL, nullable=False, comment="of the messages that are asked about"),
    _time("checked_until"),
    _time("lease_until", nullable=True),
    PrimaryKeyConstraint("channel", "age"),
    comment="up to which message each channel was asked what became of those it never told of",
)

unrecognized_receipts = Table(
    "unrecognized_receipts",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("channel", Text, nullable=False),
    Column("item", Text, nullable=False),
    _time("arrive_time", default=True),
    comment="authentic news that the channel's plugin does not understand",
)

send_units = Table(
    "send_units",
    metadata,
    Column("slot", BigInteger, primary_key=True, autoincrement=False),
    Column("campaign_id", BigInteger, nullable=False, index=True),
    Column("lease", BigInteger, nullable=False, server_default=text("0"), comment="counts up with every claim"),
    _time("lease_until", nullable=True),
    _time("ready_time", default=True),
    _time("unclear_since", nullable=True),
    comment="chunks that are not dealt with yet; a finished one is deleted",
)

paces = Table(
    "paces",
    metadata,
    Column("key", Text, primary_key=True, comment="as in sms/account"),
    _time("free_time"),
    comment="when each limit has room again; of no use after a crash",
    prefixes=["UNLOGGED"],
)

users = Table(
    "users",
    metadata,
    Column("user_id", BigInteger, Identity(always=True), primary_key=True),
    Column("app_id", BigInteger, ForeignKey(apps.c.app_id), nullable=False),
    Column("email", Text, nullable=False, comment="in lower case"),
    Column("role", Text, nullable=False, comment="viewer, marketer or admin"),
    Column("password_hash", Text, nullable=False, comment="argon2id, with its salt and parameters"),
    _time("create_time", default=True),
    _time("sign_in_time", nullable=True),
    UniqueConstraint("app_id", "email"),
    comment="people who sign in to the console",
)

sessions = Table(
    "sessions",
    metadata,
    Column("session_hash", LargeBinary, primary_key=True, comment="sha256 of the cookie, which has 256 random bits"),
    Column("user_id", BigInteger, ForeignKey(users.c.user_id, ondelete="CASCADE"), nullable=False, index=True),
    _time("create_time", default=True),
    _time("use_time", default=True),
)

sign_in_failures = Table(
    "sign_in_failures",
    metadata,
    Column("account_hash", LargeBinary, nullable=False, comment="of app and email, whether they exist or not"),
    _time("time", default=True),
    Column("failure_id", BigInteger, Identity(always=True), nullable=False),
    PrimaryKeyConstraint("account_hash", "time", "failure_id"),
)

audit_entries = Table(
    "audit_entries",
    metadata,
    Column("app_id", BigInteger, ForeignKey(apps.c.app_id), nullable=False),
    Column("entry_id", BigInteger, Identity(always=True), nullable=False),
    _time("time", default=True),
    Column("actor", Text, nullable=False, comment="as in users/ana@example.com or apiKeys/0123456789ab"),
    Column("method", Text, nullable=False, comment="as in Campaigns/LaunchCampaign"),
    Column("resource", Text, nullable=False),
    PrimaryKeyConstraint("app_id", "entry_id"),
    comment="who changed what",
)

contact_imports = Table(
    "contact_imports",
    metadata,
    Column("app_id", BigInteger, ForeignKey(apps.c.app_id), nullable=False),
    Column("import_id", BigInteger, Identity(always=True), nullable=False),
    Column("file_name", Text, nullable=False),
    Column("state", Text, nullable=False, comment="RUNNING, DONE or FAILED"),
    Column("problem", Text, nullable=False, server_default=text("''"), comment="why it failed"),
    Column("read_count", BigInteger, nullable=False, server_default=text("0"), comment="rows that were handed over"),
    Column("created_count", BigInteger, nullable=False, server_default=text("0")),
    Column("updated_count", BigInteger, nullable=False, server_default=text("0")),
    Column("rejected_count", BigInteger, nullable=False, server_default=text("0")),
    Column("rejections", JSONB, nullable=False, server_default=text("'[]'::jsonb"), comment="the first ones, with reasons"),
    _time("create_time", default=True),
    _time("update_time", default=True),
    PrimaryKeyConstraint("app_id", "import_id"),
    comment="files of contacts that came through the console",
)

unfinished_drafts = Table(
    "unfinished_drafts",
    metadata,
    Column("campaign_id", BigInteger, ForeignKey(campaigns.c.campaign_id, ondelete="CASCADE"), primary_key=True),
    Column("content", JSONB(none_as_null=True), comment="what somebody has typed, which the channel does not take yet"),
    Column("plan", JSONB(none_as_null=True), comment="when it is to be launched"),
    comment="what belongs to a draft and is not in it yet",
)
