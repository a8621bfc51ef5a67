"""How Alembic runs our migrations: on the connection that ``store.migrate`` hands over, one at a time.

A migration expands first and contracts one release later, so that servers of both versions can run in between. Keep its
statements to what a distributed PostgreSQL runs too: no triggers, the distribution key in every key.
"""

from alembic import context
from sqlalchemy import text

from aftertouch.store.tables import metadata

connection = context.config.attributes["connection"]
connection.execute(text("select pg_advisory_xact_lock(hashtext('aftertouch migrate'))"))
connection.execute(text("set local lock_timeout = '10s'"))
context.configure(connection=connection, target_metadata=metadata)
context.run_migrations()
