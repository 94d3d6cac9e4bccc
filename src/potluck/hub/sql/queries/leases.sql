-- name: lease_unit
-- Carve the first `want` positions of a run and lease them, in one statement. The row lock on `supplies` is the only
-- place where workers of one run meet. So this is a transaction of its own (Ledger.once) that does not wait for the disk:
-- the row is held for less than a millisecond, not until the caller gets round to COMMIT. A lease that a crash forgets is
-- carved again: nothing is lost.
WITH relaxed AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true)
), supply AS (
    SELECT remaining FROM supplies WHERE run_id = %(run_id)s FOR UPDATE
), ranges AS (
    SELECT r, COALESCE(SUM(upper(r) - lower(r)) OVER (
        ORDER BY r ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)::bigint AS before
    FROM supply, unnest(supply.remaining) AS r
), taken AS (
    -- LEAST ignores the NULL that is the upper bound of an endless range
    SELECT range_agg(int8range(lower(r), LEAST(upper(r), lower(r) + %(want)s::bigint - before))) AS positions
    FROM ranges WHERE before < %(want)s::bigint
), carved AS (
    UPDATE supplies SET remaining = supplies.remaining - taken.positions
    FROM taken WHERE supplies.run_id = %(run_id)s AND taken.positions IS NOT NULL
    RETURNING taken.positions
), task AS (
    INSERT INTO tasks (run_id, kind, state, attempts, positions)
    SELECT %(run_id)s, 'unit', 'leased', 1, positions FROM carved
    RETURNING id, positions
), lease AS (
    INSERT INTO leases (id, task_id, run_id, worker_id, kind, deadline)
    SELECT %(lease_id)s, id, %(run_id)s, %(worker_id)s, 'unit', now() + %(ttl)s FROM task
)
SELECT id AS task_id, positions FROM task, relaxed;

-- name: lease_task
-- The oldest waiting task of the kinds that this worker may do.
WITH next AS (
    SELECT tasks.id FROM tasks JOIN runs ON runs.id = tasks.run_id
    WHERE tasks.state = 'queued' AND tasks.kind = ANY(%(kinds)s) AND runs.state IN ('queued', 'running', 'paused', 'finishing')
    ORDER BY tasks.id LIMIT 1
    FOR UPDATE OF tasks SKIP LOCKED
), task AS (
    UPDATE tasks SET state = 'leased', attempts = attempts + 1 FROM next WHERE tasks.id = next.id
    RETURNING tasks.*
), lease AS (
    INSERT INTO leases (id, task_id, run_id, worker_id, kind, deadline)
    SELECT %(lease_id)s, id, run_id, %(worker_id)s, kind, now() + %(ttl)s FROM task
)
SELECT id AS task_id, run_id, kind, spec, attempts FROM task;

-- name: flush
-- Anything that writes to the log and commits durably: the log is one sequence, so all before it is on the disk too.
WITH message AS MATERIALIZED (SELECT pg_logical_emit_message(true, 'potluck', '') AS at)
SELECT n FROM unnest(%(one)s::integer[]) WITH ORDINALITY AS asked (one, n), message;

-- name: report_unit
-- A transaction of its own, which does not wait for the disk: `supplies` is locked for a moment only. The caller flushes
-- before it answers (Ledger.flush).
-- Hand in a unit: fenced by the lease id and completed by primary keys only. Conditions on `ended_at` and `state` are
-- looked at after the rows are locked, never in a WHERE that could tempt the planner to a partial index with stale
-- statistics (that cost a factor of 40: docs/decisions/0003).
WITH relaxed AS MATERIALIZED (
    SELECT set_config('synchronous_commit', 'off', true)
), held AS (
    SELECT leases.*, runs.state AS run_state
    FROM leases JOIN runs ON runs.id = leases.run_id
    WHERE leases.id = %(lease_id)s FOR UPDATE OF leases
), task AS (
    SELECT tasks.id, tasks.positions FROM tasks, held WHERE tasks.id = held.task_id
), fit AS (
    SELECT held.*, task.positions,
        CASE
            WHEN held.worker_id <> %(worker_id)s THEN 'foreign'
            WHEN held.ended_at IS NOT NULL THEN COALESCE(held.outcome, 'ended')
            WHEN NOT (%(done)s::int8multirange <@ task.positions) THEN 'overreach'
            WHEN held.run_state IN ('stopped', 'failed', 'done') THEN 'run_over'
            ELSE 'ok'
        END AS verdict
    FROM held, task
), ended AS (
    UPDATE leases SET ended_at = now(), outcome = 'done', steps = %(steps)s, samples = %(samples)s
    FROM fit WHERE leases.id = fit.id AND fit.verdict IN ('ok', 'run_over')
), closed AS (
    UPDATE tasks SET state = 'done', ended_at = now()
    FROM fit WHERE tasks.id = fit.task_id AND fit.verdict IN ('ok', 'run_over')
), kept AS (
    INSERT INTO updates (task_id, lease_id, run_id, worker_id, blob_hash, size_bytes, codec, base_version, steps,
        samples, done, losses, seconds, bytes_up, bytes_down, fate, fate_reason)
    SELECT task_id, id, run_id, worker_id, %(blob_hash)s, %(size_bytes)s, %(codec)s, %(base_version)s, %(steps)s,
        -- without positions it is what a worker claims to have tried: at most its unit
        CASE WHEN isempty(%(done)s::int8multirange) THEN LEAST(%(samples)s, span(positions)) ELSE %(samples)s END,
        %(done)s::int8multirange, %(losses)s, %(seconds)s, %(bytes_up)s, %(bytes_down)s,
        CASE WHEN verdict = 'run_over' THEN 'superseded' ELSE %(fate)s END,
        CASE WHEN verdict = 'run_over' THEN 'the run is over' ELSE %(fate_reason)s END
    FROM fit WHERE verdict IN ('ok', 'run_over')
), returned AS (
    UPDATE supplies SET remaining = supplies.remaining
        + CASE WHEN fit.verdict = 'run_over' OR %(fate)s = 'rejected' THEN fit.positions
               ELSE fit.positions - %(done)s::int8multirange END
    FROM fit WHERE supplies.run_id = fit.run_id AND fit.verdict IN ('ok', 'run_over')
        AND (fit.verdict = 'run_over' OR %(fate)s = 'rejected' OR fit.positions <> %(done)s::int8multirange)
)
SELECT verdict, task_id, run_id, reason FROM fit, relaxed;

-- name: earlier_report
SELECT blob_hash, fate_reason, fate = 'rejected' AND merge_task IS NULL AS refused FROM updates
WHERE task_id = %(task_id)s;

-- name: give_back
-- End a lease without a result: the task waits again or is over, and a unit's positions return to the supply.
WITH held AS (
    SELECT leases.*, tasks.positions, tasks.attempts
    FROM leases JOIN tasks ON tasks.id = leases.task_id
    WHERE leases.id = %(lease_id)s FOR UPDATE OF leases
), live AS (
    SELECT * FROM held
    WHERE ended_at IS NULL AND (%(worker_id)s::text IS NULL OR worker_id = %(worker_id)s)
        AND (%(only_if_late)s IS FALSE OR deadline < now())
), ended AS (
    UPDATE leases SET ended_at = now(), outcome = %(outcome)s, reason = %(reason)s,
        samples = LEAST(leases.samples, span(live.positions)) -- what it claims to have trained: at most its unit
    FROM live WHERE leases.id = live.id
), closed AS (
    UPDATE tasks SET
        state = CASE WHEN live.kind = 'unit' THEN 'lost'
                     WHEN %(outcome)s = 'returned' THEN 'queued'
                     WHEN live.attempts >= %(max_attempts)s THEN 'failed'
                     ELSE 'queued' END,
        ended_at = CASE WHEN live.kind = 'unit' OR (%(outcome)s <> 'returned' AND live.attempts >= %(max_attempts)s)
                        THEN now() END,
        attempts = live.attempts - CASE WHEN %(outcome)s = 'returned' THEN 1 ELSE 0 END,
        reason = %(reason)s
    FROM live WHERE tasks.id = live.task_id
), back AS (
    UPDATE supplies SET remaining = supplies.remaining + live.positions
    FROM live WHERE live.kind = 'unit' AND supplies.run_id = live.run_id
)
SELECT held.*, (live.id IS NOT NULL) AS was_live FROM held LEFT JOIN live ON live.id = held.id;

-- name: late_leases
-- Those of jobs have a life of their own: gone_commands.
SELECT id, run_id, worker_id, kind, task_id FROM leases
WHERE ended_at IS NULL AND deadline < now() AND kind <> 'command' LIMIT 1000;

-- name: live_leases_of_worker
-- All are locked before the first is given back: then the supply is never locked before a lease, which would be a
-- deadlock with a report. Rows are locked in one order everywhere: run or worker, leases by id, tasks, updates, supply.
-- Jobs are given up one by one afterwards: their run is locked before their lease.
SELECT id, run_id, kind FROM leases WHERE ended_at IS NULL AND worker_id = %(worker_id)s AND kind <> 'command'
ORDER BY id FOR UPDATE;

-- name: renew
-- One statement for all leases of a heartbeat. By primary key; an ended lease is left as it is.
UPDATE leases SET deadline = CASE WHEN ended_at IS NULL THEN now() + %(ttl)s ELSE deadline END,
    steps = beat.steps, samples = beat.samples, rate = beat.rate
FROM unnest(%(ids)s::uuid[], %(steps)s::bigint[], %(samples)s::bigint[], %(rates)s::real[])
    AS beat (id, steps, samples, rate)
WHERE leases.id = beat.id AND leases.worker_id = %(worker_id)s AND leases.kind <> 'command';

-- name: fate_of_leases
SELECT leases.id, leases.ended_at IS NOT NULL AS ended, leases.kind, runs.state AS run_state,
    EXTRACT(EPOCH FROM now() - runs.started_at)::float8 - runs.paused_s AS elapsed_s, runs.duration_s
FROM leases JOIN runs ON runs.id = leases.run_id
WHERE leases.id = ANY(%(ids)s::uuid[]) AND leases.worker_id = %(worker_id)s;

-- name: spare_leases
-- After the hub was away nobody could renew: give everybody the time to come back before anything counts as lost.
UPDATE leases SET deadline = GREATEST(deadline, now() + %(grace)s) WHERE ended_at IS NULL;

-- name: lock_lease
SELECT leases.*, tasks.spec, tasks.attempts, runs.state AS run_state, runs.version AS run_version
FROM leases JOIN tasks ON tasks.id = leases.task_id JOIN runs ON runs.id = leases.run_id
WHERE leases.id = %(lease_id)s FOR UPDATE OF leases;

-- name: end_lease
UPDATE leases SET ended_at = now(), outcome = %(outcome)s, reason = %(reason)s WHERE id = %(lease_id)s;

-- name: close_task
UPDATE tasks SET state = %(state)s, ended_at = now(), reason = %(reason)s WHERE id = %(task_id)s;

-- name: mint_task
INSERT INTO tasks (run_id, kind, spec) VALUES (%(run_id)s, %(kind)s, %(spec)s) RETURNING id;

-- name: touch_worker
UPDATE workers SET last_seen = now(), state = COALESCE(%(state)s, state) WHERE id = %(worker_id)s;

-- name: lease_facts
-- What a report is checked against before it is taken.
SELECT leases.run_id, leases.kind, leases.worker_id, leases.ended_at IS NOT NULL AS ended, leases.outcome, leases.reason,
    runs.layout, runs.version, updates.blob_hash AS reported_blob
FROM leases JOIN runs ON runs.id = leases.run_id LEFT JOIN updates ON updates.task_id = leases.task_id
WHERE leases.id = %(lease_id)s;
