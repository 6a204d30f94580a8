"""Run by Alembic, on the connection and in the transaction that `finetune.jobs.store` opens for it."""

from alembic import context

from finetune.jobs.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
