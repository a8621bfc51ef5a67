"""What a process counts for whoever watches it, in Prometheus's format; docs/operations.md says what each is for.

They count in memory, and each process for itself. Nothing here names an app, a campaign or a person: a label has few values.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

CALLS = Histogram(
    "aftertouch_call_seconds",
    "Calls over gRPC that have one answer, by method and status code, and how long they took.",
    ("method", "code"),
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10),
)
WEBHOOKS = Counter(
    "aftertouch_webhooks", "Webhooks, by channel and by the status that they were answered with.", ("channel", "status")
)
EVENTS = Counter("aftertouch_events", "Events that became durable, of streams, calls, webhooks and our own sending.")
COMMITS = Histogram(
    "aftertouch_commit_seconds",
    "Groups of events that became durable, and how long their transactions took.",
    buckets=(0.005, 0.02, 0.1, 0.5, 2, 10),
)
EVENTS_WAITING = Gauge("aftertouch_events_waiting", "Events that are not durable yet.")
SPOOLED = Gauge("aftertouch_spooled_webhooks", "Webhooks in the spool: waiting for the database, or set aside.", ("state",))
MESSAGES = Counter("aftertouch_messages", "Messages that were handed to a channel, by what came of it.", ("channel", "outcome"))
CONNECTIONS = Gauge("aftertouch_database_connections", "Connections to the database that are in use, without the ledger's.")
DATABASE_UP = Gauge("aftertouch_database_up", "1 when the database answers, or else 0.")
CAMPAIGNS = Gauge("aftertouch_campaigns", "Campaigns of all apps, by state; the same from every process.", ("state",))
