"""Apps, contacts, campaigns, rolls, receipts and the logs."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "activity",
        sa.Column("slot", sa.BigInteger(), nullable=False, comment="the campaign's first"),
        sa.Column("start_time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("minutes", sa.Integer(), nullable=False, comment="how long, 1 or 60: each event is counted in both"),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("events", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("slot", "minutes", "start_time", "kind", name=op.f("activity_pkey")),
        comment="how many events of a kind happened in a minute, and in an hour",
    )
    op.create_table(
        "app_secrets",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, comment="identity, or keys/, settings/ or changed/ and a channel"),
        sa.Column("secret_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False, comment="AES-GCM under a key of the server's"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("app_id", "name", "secret_id", name=op.f("app_secrets_pkey")),
    )
    op.create_table(
        "apps",
        sa.Column("app_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("app", sa.Text(), nullable=False, comment="last part of the resource name"),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("retargeting_enabled", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("retargetable_since", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("retention_days", sa.Integer(), server_default=sa.text("30"), nullable=False),
        sa.Column("quiet_start", sa.Integer(), nullable=True, comment="minutes after midnight; null when no hours are quiet"),
        sa.Column("quiet_end", sa.Integer(), nullable=True),
        sa.Column(
            "quiet_time_zone", sa.Text(), server_default=sa.text("'UTC'"), nullable=False, comment="of contacts that have none"
        ),
        sa.Column(
            "cap_messages",
            sa.Integer(),
            nullable=True,
            comment="most messages a contact gets within cap_hours; null when there is no cap",
        ),
        sa.Column("cap_hours", sa.Integer(), nullable=True),
        sa.Column(
            "web_origins",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="whose pages may subscribe browsers",
        ),
        sa.Column(
            "link_url",
            sa.Text(),
            server_default=sa.text("''"),
            nullable=False,
            comment="where tracked links lead; empty: to the server",
        ),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("app_id", name=op.f("apps_pkey")),
        sa.UniqueConstraint("app", name=op.f("apps_app_key")),
    )
    op.create_table(
        "attempts",
        sa.Column("arrive_time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, comment="within the slot"),
        sa.Column(
            "kind", sa.Integer(), nullable=False, comment="sent, failed, refused, or attempted when the outcome is unclear"
        ),
        sa.Column("address_hash", sa.LargeBinary(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("message_id", sa.Text(), nullable=False, comment="the provider's; empty where there is none"),
        comment="one row for each message handed to a provider, by day",
        postgresql_partition_by="RANGE (arrive_time)",
    )
    op.create_index(
        op.f("attempts_message_id_idx"), "attempts", ["message_id"], unique=False, postgresql_where=sa.text("message_id <> ''")
    )
    op.create_index(op.f("attempts_slot_position_idx"), "attempts", ["slot", "position"], unique=False)
    op.create_index(
        op.f("attempts_address_hash_idx"), "attempts", ["address_hash"], unique=False, postgresql_where=sa.text("position = -1")
    )
    op.create_index(
        op.f("attempts_arrive_time_idx"),
        "attempts",
        ["arrive_time"],
        unique=False,
        postgresql_using="brin",
        postgresql_with={"autosummarize": "on", "pages_per_range": 32},
    )
    op.create_table(
        "checkups",
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("age", postgresql.INTERVAL(), nullable=False, comment="of the messages that are asked about"),
        sa.Column("checked_until", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("lease_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("channel", "age", name=op.f("checkups_pkey")),
        comment="up to which message each channel was asked what became of those it never told of",
    )
    op.create_table(
        "clusters",
        sa.Column(
            "system_identifier",
            sa.BigInteger(),
            autoincrement=False,
            nullable=False,
            comment="PostgreSQL's own, of each initdb",
        ),
        sa.Column(
            "first_commit_id",
            sa.BigInteger(),
            nullable=False,
            comment="microseconds since 1970, when the database came here",
        ),
        sa.Column(
            "commit_offset",
            sa.BigInteger(),
            nullable=False,
            comment="from the cluster's number of a transaction to its commit_id",
        ),
        sa.PrimaryKeyConstraint("system_identifier", name=op.f("clusters_pkey")),
        comment="where the database is, in one row: its commits are numbered on after those of wherever it was dumped",
    )
    op.create_table(
        "contact_counters",
        sa.Column("app_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("next_number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app_id", name=op.f("contact_counters_pkey")),
        comment="the row is locked while contacts are made, so numbers have no holes",
    )
    op.create_table(
        "contact_ids",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("external_id", sa.Text(collation="C"), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app_id", "external_id", name=op.f("contact_ids_pkey")),
    )
    op.create_table(
        "contact_paces",
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column(
            "recent",
            postgresql.ARRAY(postgresql.TIMESTAMP(timezone=True)),
            nullable=False,
            comment="when messages were sent, as far as they count",
        ),
        sa.Column("full_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("block", "number", name=op.f("contact_paces_pkey")),
        comment="how often contacts were messaged lately, in apps with a frequency cap",
    )
    op.create_index(
        op.f("contact_paces_block_full_until_idx"),
        "contact_paces",
        ["block", "full_until"],
        unique=False,
        postgresql_where=sa.text("full_until IS NOT NULL"),
    )
    op.create_table(
        "erasures",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("erase_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("app_id", "erase_time", "number", name=op.f("erasures_pkey")),
        comment="contact numbers that lead to nobody any more",
    )
    op.create_table(
        "contact_sets",
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, comment="as in active/sms, list/7"),
        sa.Column("bits", postgresql.BIT(varying=True), nullable=False, comment="8,192 bits by contact number"),
        sa.PrimaryKeyConstraint("block", "name", name=op.f("contact_sets_pkey")),
    )
    op.create_table(
        "contacts",
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("external_id", sa.Text(), nullable=False),
        sa.Column("attributes", postgresql.JSONB(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("block", "number", name=op.f("contacts_pkey")),
    )
    op.create_table(
        "dropped_days",
        sa.Column("log", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("last_commit_id", sa.BigInteger(), nullable=True, comment="of its events"),
        sa.PrimaryKeyConstraint("log", "day", name=op.f("dropped_days_pkey")),
        comment="partitions that are kept no longer",
    )
    op.create_table(
        "events",
        sa.Column("arrive_time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("commit_id", sa.BigInteger(), nullable=False, comment="of the transaction that stored it; ever higher"),
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, comment="within the slot"),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        comment="every event as it came, by the day of its arrival",
        postgresql_partition_by="RANGE (arrive_time)",
    )
    op.create_index(
        op.f("events_commit_id_idx"),
        "events",
        ["commit_id"],
        unique=False,
        postgresql_using="brin",
        postgresql_with={"autosummarize": "on", "pages_per_range": 32},
    )
    op.create_table(
        "kinds",
        sa.Column("kind", sa.Integer(), sa.Identity(always=True), nullable=False),
        sa.Column("signal", sa.Text(), nullable=False),
        sa.Column("reason_class", sa.Text(), nullable=False),
        sa.Column("reason_code", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("kind", name=op.f("kinds_pkey")),
        sa.UniqueConstraint("signal", "reason_class", "reason_code", name=op.f("kinds_signal_reason_class_reason_code_key")),
        comment="a signal with its reason as one small number",
    )
    op.create_table(
        "paces",
        sa.Column("key", sa.Text(), nullable=False, comment="as in sms/account"),
        sa.Column("free_time", postgresql.TIMESTAMP(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("paces_pkey")),
        comment="when each limit has room again; of no use after a crash",
        prefixes=["UNLOGGED"],
    )
    op.create_table(
        "producers",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("producer", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False, comment="of the last batch that is durable"),
        sa.Column("accepted", sa.BigInteger(), nullable=False, comment="events of its batches that were stored"),
        sa.Column("rejected", sa.BigInteger(), nullable=False, comment="and that were left out"),
        sa.Column("session", sa.Text(), nullable=False, comment="whose the newest stream is, as the caller names it"),
        sa.Column("stream", sa.BigInteger(), nullable=False, comment="counts up with every opened stream: the newest commits"),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("app_id", "producer", name=op.f("producers_pkey")),
    )
    op.create_table(
        "receipts",
        sa.Column("slot", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.Integer(), nullable=False),
        sa.Column("bits", postgresql.BIT(varying=True), nullable=False, comment="one bit a position, rounded up to bytes"),
        sa.PrimaryKeyConstraint("slot", "kind", name=op.f("receipts_pkey")),
        comment="of whom it became true; only ever OR-ed",
        postgresql_with={"fillfactor": 50},
    )
    op.create_table(
        "requests",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False, comment="of method and request"),
        sa.Column("answer", sa.LargeBinary(), nullable=True, comment="null only while the transaction that makes it runs"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("app_id", "request_id", name=op.f("requests_pkey")),
        comment="what a request_id was answered with",
    )
    op.create_table(
        "rolls",
        sa.Column("slot", sa.BigInteger(), autoincrement=False, nullable=False, comment="campaign_id << 20 | chunk"),
        sa.Column("first", sa.BigInteger(), nullable=False, comment="smallest contact number"),
        sa.Column("last", sa.BigInteger(), nullable=False),
        sa.Column("members", sa.Integer(), nullable=False),
        sa.Column(
            "numbers",
            sa.LargeBinary(),
            nullable=False,
            comment="less the first: 32-bit little-endian, or a bit each where that is shorter",
        ),
        sa.PrimaryKeyConstraint("slot", name=op.f("rolls_pkey")),
        comment="who is at which position; written once",
    )
    # Trying to compress what does not compress took half a second for 500,000 people.
    op.execute("ALTER TABLE rolls ALTER COLUMN numbers SET STORAGE EXTERNAL")
    op.create_table(
        "send_units",
        sa.Column("slot", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("campaign_id", sa.BigInteger(), nullable=False),
        sa.Column("lease", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="counts up with every claim"),
        sa.Column("lease_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("ready_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("unclear_since", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("slot", name=op.f("send_units_pkey")),
        comment="chunks that are not dealt with yet; a finished one is deleted",
    )
    op.create_index(op.f("send_units_campaign_id_idx"), "send_units", ["campaign_id"], unique=False)
    op.create_table(
        "subscriptions",
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("address_hash", sa.LargeBinary(), nullable=False, comment="blake2b-128 of the address's key"),
        sa.Column("address", postgresql.JSONB(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="active, opted_out or invalid"),
        sa.Column("reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("held_until", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("heard_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("block", "number", "channel", "address_hash", name=op.f("subscriptions_pkey")),
    )
    op.create_index(
        op.f("subscriptions_block_channel_held_until_idx"),
        "subscriptions",
        ["block", "channel", "held_until"],
        unique=False,
        postgresql_where=sa.text("held_until IS NOT NULL"),
    )
    op.create_index(
        op.f("subscriptions_address_hash_idx"), "subscriptions", ["address_hash"], unique=False, postgresql_using="hash"
    )
    op.create_table(
        "unrecognized_receipts",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("item", sa.Text(), nullable=False),
        sa.Column("arrive_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("unrecognized_receipts_pkey")),
        comment="authentic news that the channel's plugin does not understand",
    )
    op.create_table(
        "api_keys",
        sa.Column("api_key", sa.Text(), nullable=False, comment="public part of the secret"),
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("scopes", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False, comment="sha256; the secret has 256 random bits, so no salt"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("revoke_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["app_id"], ["apps.app_id"], name=op.f("api_keys_app_id_fkey")),
        sa.PrimaryKeyConstraint("api_key", name=op.f("api_keys_pkey")),
    )
    op.create_index(op.f("api_keys_app_id_idx"), "api_keys", ["app_id"], unique=False)
    op.create_table(
        "lists",
        sa.Column("list_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("list", sa.Text(), nullable=False, comment="last part of the resource name"),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.app_id"], name=op.f("lists_app_id_fkey")),
        sa.PrimaryKeyConstraint("list_id", name=op.f("lists_pkey")),
        sa.UniqueConstraint("app_id", "list", name=op.f("lists_app_id_list_key")),
        comment="the members are the contact set list/<list_id>",
    )
    op.create_table(
        "campaigns",
        sa.Column("campaign_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("campaign", sa.Text(), nullable=False, comment="last part of the resource name"),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("content", postgresql.JSONB(), nullable=True),
        sa.Column("audience", postgresql.JSONB(), nullable=True, comment="the Audience message as JSON"),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("state_reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("version", sa.BigInteger(), server_default=sa.text("1"), nullable=False, comment="the etag"),
        sa.Column("recipients", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="length of the roll"),
        sa.Column("root_id", sa.BigInteger(), nullable=True, comment="campaign at the root of the chain, of a wave"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("schedule_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("send_by_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "messages_per_second",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="0 is as fast as allowed",
        ),
        sa.Column(
            "transactional",
            sa.Boolean(),
            server_default=sa.text("false"),
            nullable=False,
            comment="no quiet hours, no frequency cap",
        ),
        sa.Column("track_links", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column(
            "links",
            postgresql.ARRAY(sa.Text()),
            server_default=sa.text("'{}'"),
            nullable=False,
            comment="tracked ones by number, since the launch",
        ),
        sa.Column("launch_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column("finish_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "holdout_percent",
            sa.Integer(),
            server_default=sa.text("0"),
            nullable=False,
            comment="of the audience, not messaged",
        ),
        sa.Column(
            "holdout_count",
            sa.BigInteger(),
            server_default=sa.text("0"),
            nullable=False,
            comment="length of the holdout's roll",
        ),
        sa.Column(
            "source_id",
            sa.BigInteger(),
            nullable=True,
            comment="of a follow-up: the campaign after whose sending it is launched",
        ),
        sa.Column("delay_seconds", sa.BigInteger(), nullable=True, comment="and how long after"),
        sa.ForeignKeyConstraint(["app_id"], ["apps.app_id"], name=op.f("campaigns_app_id_fkey")),
        sa.PrimaryKeyConstraint("campaign_id", name=op.f("campaigns_pkey")),
        sa.UniqueConstraint("app_id", "campaign", name=op.f("campaigns_app_id_campaign_key")),
    )
    op.create_index(op.f("campaigns_app_id_campaign_id_idx"), "campaigns", ["app_id", "campaign_id"], unique=False)
    op.create_index(
        op.f("campaigns_root_id_idx"),
        "campaigns",
        ["root_id"],
        unique=False,
        postgresql_where=sa.text("root_id IS NOT NULL"),
    )
    op.create_index(
        op.f("campaigns_schedule_time_idx"),
        "campaigns",
        ["schedule_time"],
        unique=False,
        postgresql_where=sa.text("state = 'SCHEDULED'"),
    )
    op.create_table(
        "users",
        sa.Column("user_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("email", sa.Text(), nullable=False, comment="in lower case"),
        sa.Column("role", sa.Text(), nullable=False, comment="viewer, marketer or admin"),
        sa.Column("password_hash", sa.Text(), nullable=False, comment="argon2id, with its salt and parameters"),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sign_in_time", postgresql.TIMESTAMP(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["app_id"], ["apps.app_id"], name=op.f("users_app_id_fkey")),
        sa.PrimaryKeyConstraint("user_id", name=op.f("users_pkey")),
        sa.UniqueConstraint("app_id", "email", name=op.f("users_app_id_email_key")),
        comment="people who sign in to the console",
    )
    op.create_table(
        "sessions",
        sa.Column("session_hash", sa.LargeBinary(), nullable=False, comment="sha256 of the cookie, which has 256 random bits"),
        sa.Column("user_id", sa.BigInteger(), nullable=False),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("use_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=op.f("sessions_user_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("session_hash", name=op.f("sessions_pkey")),
    )
    op.create_index(op.f("sessions_user_id_idx"), "sessions", ["user_id"], unique=False)
    op.create_table(
        "sign_in_failures",
        sa.Column("account_hash", sa.LargeBinary(), nullable=False, comment="of app and email, whether they exist or not"),
        sa.Column("time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("failure_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.PrimaryKeyConstraint("account_hash", "time", "failure_id", name=op.f("sign_in_failures_pkey")),
    )
    op.create_table(
        "audit_entries",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("entry_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False, comment="as in users/ana@example.com or apiKeys/0123456789ab"),
        sa.Column("method", sa.Text(), nullable=False, comment="as in Campaigns/LaunchCampaign"),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.app_id"], name=op.f("audit_entries_app_id_fkey")),
        sa.PrimaryKeyConstraint("app_id", "entry_id", name=op.f("audit_entries_pkey")),
        comment="who changed what",
    )
    op.create_table(
        "contact_imports",
        sa.Column("app_id", sa.BigInteger(), nullable=False),
        sa.Column("import_id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("file_name", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="RUNNING, DONE or FAILED"),
        sa.Column("problem", sa.Text(), server_default=sa.text("''"), nullable=False, comment="why it failed"),
        sa.Column(
            "read_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False, comment="rows that were handed over"
        ),
        sa.Column("created_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("updated_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("rejected_count", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column(
            "rejections",
            postgresql.JSONB(),
            server_default=sa.text("'[]'::jsonb"),
            nullable=False,
            comment="the first ones, with reasons",
        ),
        sa.Column("create_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("update_time", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["app_id"], ["apps.app_id"], name=op.f("contact_imports_app_id_fkey")),
        sa.PrimaryKeyConstraint("app_id", "import_id", name=op.f("contact_imports_pkey")),
        comment="files of contacts that came through the console",
    )
    op.create_table(
        "unfinished_drafts",
        sa.Column("campaign_id", sa.BigInteger(), nullable=False),
        sa.Column(
            "content", postgresql.JSONB(), nullable=True, comment="what somebody has typed, which the channel does not take yet"
        ),
        sa.Column("plan", postgresql.JSONB(), nullable=True, comment="when it is to be launched"),
        sa.ForeignKeyConstraint(
            ["campaign_id"], ["campaigns.campaign_id"], name=op.f("unfinished_drafts_campaign_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("campaign_id", name=op.f("unfinished_drafts_pkey")),
        comment="what belongs to a draft and is not in it yet",
    )
