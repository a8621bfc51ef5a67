"""PostgreSQL: tables, migrations and one module of statements per noun.

Besides ``rolls.sql`` this is the only place with SQL. Every function takes a connection and works inside the caller's
transaction; none commits.
"""
