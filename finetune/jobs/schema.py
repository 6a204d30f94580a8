"""The tables of the database that a server and its workers share.

Times are Unix seconds; structured values are JSON text, so that psql can read them.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text

# The revision of migrations/versions these tables are at; a test compares both.
REVISION = "0002"

metadata = MetaData()

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("filename", Text, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("status", String(16), nullable=False),
    Column("report", Text),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("name", String(128), nullable=False),
    Column("recipe", Text, nullable=False),
    # No foreign keys: a finished job outlives its files.
    Column("training_file", String(64), nullable=False),
    Column("validation_file", String(64)),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("finished_at", Float(53)),
    Column("estimated_finish", Float(53)),
    Column("worker_id", String(128)),
    Column("lease_expires_at", Float(53)),
    Column("attempts_without_progress", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("events", Integer, nullable=False),
    Column("trained_samples", BigInteger, nullable=False),
    Column("trained_tokens", BigInteger),
    Column("metrics", Text, nullable=False),
    Column("error", Text),
    Column("result", Text),
    Index("jobs_by_age", "created_at", "id"),
    Index("jobs_by_state", "state", "created_at"),
)

events = Table(
    "events",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("sequence", Integer, primary_key=True),
    Column("created_at", Float(53), nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", Text),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id"), primary_key=True),
    Column("step", Integer, primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", Float(53), nullable=False),
    Column("path", Text, nullable=False),
    Column("metrics", Text, nullable=False),
)

# Who may call. A key that is revoked stays, so that what it used can still be told.
api_keys = Table(
    "api_keys",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("scopes", Text, nullable=False),
    Column("limits", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("revoked_at", Float(53)),
)

# What a key used on a day, e.g. "2026-11-26", of UTC.
key_usage = Table(
    "key_usage",
    metadata,
    Column("key_number", Integer, ForeignKey("api_keys.number"), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("last_at", Float(53), nullable=False),
)
