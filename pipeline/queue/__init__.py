"""The PostgreSQL door: takes jobs from a queue in the database that the orchestrator has anyway.

Its engine is procrastinate: tables, claims, retries, priorities, locks and cancellation with no server beside PostgreSQL.
celery needs Redis or RabbitMQ, and its early acknowledgement and prefetching do not fit jobs of minutes; ray, temporal and
hatchet bring servers of their own for what one table does.
"""
