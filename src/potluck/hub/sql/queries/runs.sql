-- name: add_run
INSERT INTO runs (id, name, recipe, dataset, settings, seed, target_samples, duration_s, created_by, idempotency_key)
VALUES (%(id)s, %(name)s, %(recipe)s, %(dataset)s, %(settings)s, %(seed)s, %(target_samples)s, %(duration_s)s,
    %(created_by)s, %(key)s)
ON CONFLICT (idempotency_key) DO NOTHING RETURNING id;

-- name: run_by_key
SELECT id FROM runs WHERE idempotency_key = %(key)s;

-- name: add_supply
INSERT INTO supplies (run_id, remaining)
VALUES (%(run_id)s, int8multirange(int8range(0, %(target)s::bigint)));

-- name: find_run
-- By id, by name, by the front of an id, or `last`; the newest first. Jobs are found by find_job.
SELECT id FROM runs
WHERE mode = 'pool'
    AND (id = %(ref)s OR name = %(ref)s OR (length(%(ref)s) >= 3 AND starts_with(id, %(ref)s)) OR %(ref)s = 'last')
ORDER BY (id = %(ref)s) DESC, created_at DESC LIMIT 1;

-- name: newest_of
SELECT id FROM runs WHERE id = ANY(%(ids)s::text[]) ORDER BY (id = %(ref)s) DESC, created_at DESC LIMIT 1;

-- name: run
SELECT runs.*, supplies.remaining,
    COALESCE(EXTRACT(EPOCH FROM COALESCE(ended_at, paused_at, now()) - started_at)::float8 - paused_s, 0) AS elapsed_s
FROM runs LEFT JOIN supplies ON supplies.run_id = runs.id WHERE runs.id = %(run_id)s;

-- name: lock_run
-- NO KEY UPDATE: the foreign keys of a task that is just being leased do not have to wait.
SELECT runs.*,
    COALESCE(EXTRACT(EPOCH FROM COALESCE(ended_at, paused_at, now()) - started_at)::float8 - paused_s, 0) AS elapsed_s
FROM runs WHERE id = %(run_id)s FOR NO KEY UPDATE;

-- name: try_lock_run
-- For upkeep: another hub copy that holds the row is settling this run already.
SELECT runs.*, (SELECT isempty(remaining) FROM supplies WHERE supplies.run_id = runs.id) AS dry,
    COALESCE(EXTRACT(EPOCH FROM COALESCE(ended_at, paused_at, now()) - started_at)::float8 - paused_s, 0) AS elapsed_s
FROM runs WHERE id = %(run_id)s FOR NO KEY UPDATE SKIP LOCKED;

-- name: run_ids
SELECT id FROM runs WHERE mode = 'pool' ORDER BY created_at DESC LIMIT %(limit)s;

-- name: live_runs
SELECT id, state FROM runs WHERE mode = 'pool' AND state IN ('queued', 'running', 'paused', 'finishing')
ORDER BY created_at;

-- name: leasable_runs
-- Runs that have positions to give, the one with the fewest workers first; not those in which this worker is struck out.
SELECT runs.id, runs.recipe, runs.dataset, runs.layout, runs.settings, runs.seed, runs.version,
    COALESCE(EXTRACT(EPOCH FROM now() - started_at)::float8 - paused_s, 0) AS elapsed_s, duration_s,
    (SELECT count(*) FROM leases WHERE leases.run_id = runs.id AND ended_at IS NULL AND kind = 'unit') AS crowd,
    (SELECT count(*) FROM leases WHERE leases.run_id = runs.id AND ended_at IS NULL AND kind = 'unit'
        AND worker_id = %(worker_id)s) AS mine,
    (SELECT count(*) FROM updates WHERE updates.run_id = runs.id AND fate = 'pending'
        AND updates.worker_id = %(worker_id)s) AS unmerged,
    (SELECT COALESCE(bool_and(fate = 'rejected') AND count(*) = %(strikes)s, false) FROM (
        SELECT fate FROM updates WHERE updates.run_id = runs.id AND updates.worker_id = %(worker_id)s
        ORDER BY task_id DESC LIMIT %(strikes)s) newest) AS struck
FROM runs JOIN supplies ON supplies.run_id = runs.id
WHERE runs.mode = 'pool' AND runs.state = 'running' AND runs.version >= 0 AND NOT isempty(supplies.remaining)
    AND (duration_s IS NULL OR now() < started_at + make_interval(secs => duration_s + paused_s))
ORDER BY crowd, runs.created_at;

-- name: set_settings
UPDATE runs SET settings = %(settings)s WHERE id = %(run_id)s;

-- name: set_state
UPDATE runs SET state = %(state)s, reason = %(reason)s,
    paused_s = paused_s + CASE WHEN paused_at IS NOT NULL AND %(state)s <> 'paused'
        THEN EXTRACT(EPOCH FROM now() - paused_at)::float8 ELSE 0 END,
    paused_at = CASE WHEN %(state)s = 'paused' THEN COALESCE(paused_at, now()) END,
    ended_at = CASE WHEN %(state)s IN ('done', 'stopped', 'failed') THEN now() ELSE ended_at END
WHERE id = %(run_id)s;

-- name: begin_run
UPDATE runs SET layout = %(layout)s, version = 0, state = CASE WHEN state = 'queued' THEN 'running' ELSE state END,
    started_at = now() WHERE id = %(run_id)s;

-- name: advance_run
UPDATE runs SET version = %(version)s WHERE id = %(run_id)s;

-- name: cancel_open_tasks
WITH live AS (
    SELECT id FROM leases WHERE run_id = %(run_id)s AND ended_at IS NULL ORDER BY id FOR UPDATE
), ended AS (
    UPDATE leases SET ended_at = now(), outcome = 'cancelled', reason = %(reason)s
    FROM live WHERE leases.id = live.id RETURNING leases.task_id
), back AS (
    UPDATE supplies SET remaining = remaining + COALESCE((
        SELECT range_agg(r) FROM tasks JOIN ended ON ended.task_id = tasks.id, unnest(tasks.positions) AS r
    ), '{}') WHERE run_id = %(run_id)s
), leased AS (
    UPDATE tasks SET state = 'cancelled', ended_at = now(), reason = %(reason)s
    FROM ended WHERE tasks.id = ended.task_id
), queued AS (
    UPDATE tasks SET state = 'cancelled', ended_at = now(), reason = %(reason)s
    WHERE run_id = %(run_id)s AND kind <> 'unit' AND state = 'queued'
)
SELECT count(*) AS cancelled FROM ended;

-- name: supersede_pending
-- After cancel_open_tasks, as a statement of its own: a report that was under way is only seen by a new snapshot.
WITH ended AS (
    UPDATE updates SET fate = 'superseded', fate_reason = %(reason)s WHERE run_id = %(run_id)s AND fate = 'pending'
    RETURNING done
)
UPDATE supplies SET remaining = remaining + COALESCE((
    SELECT range_agg(r) FROM ended, unnest(ended.done) AS r
), '{}') WHERE run_id = %(run_id)s;

-- name: open_tasks
SELECT id, kind, state FROM tasks WHERE run_id = %(run_id)s AND kind <> 'unit' AND state IN ('queued', 'leased');

-- name: failed_tasks
SELECT id, kind, reason, spec FROM tasks WHERE run_id = %(run_id)s AND state = 'failed';

-- name: round
-- The updates that wait, and who is at work.
SELECT
    (SELECT COALESCE(jsonb_agg(jsonb_build_object('task_id', task_id, 'worker_id', worker_id, 'blob_hash', blob_hash,
        'size_bytes', size_bytes, 'codec', codec, 'base_version', base_version, 'samples', samples, 'steps', steps,
        'waited_s', EXTRACT(EPOCH FROM now() - reported_at)) ORDER BY task_id), '[]')
     FROM updates WHERE run_id = %(run_id)s AND fate = 'pending' AND merge_task IS NULL) AS pending,
    (SELECT count(DISTINCT worker_id) FROM (
        SELECT worker_id FROM leases WHERE run_id = %(run_id)s AND ended_at IS NULL AND kind = 'unit'
        UNION ALL SELECT worker_id FROM updates WHERE run_id = %(run_id)s AND fate = 'pending') w) AS active,
    (SELECT count(*) FROM leases WHERE run_id = %(run_id)s AND ended_at IS NULL AND kind = 'unit') AS leased,
    (SELECT COALESCE(array_agg(lag), '{}') FROM (
        SELECT EXTRACT(EPOCH FROM MAX(reported_at) - MIN(reported_at))::float8 AS lag FROM updates
        WHERE run_id = %(run_id)s AND fate_version > %(version)s - 8 GROUP BY fate_version) lags) AS offsets;

-- name: assign_updates
UPDATE updates SET merge_task = %(task_id)s WHERE task_id = ANY(%(updates)s);

-- name: settle_update
-- Samples whose update is not in the model go back to the supply: a position is used up only by being applied.
WITH settled AS (
    UPDATE updates SET fate = %(fate)s, fate_reason = %(reason)s, fate_version = %(version)s, weight = %(weight)s,
        norm = %(norm)s, cosine = %(cosine)s
    WHERE task_id = %(task_id)s AND run_id = %(run_id)s RETURNING done, fate
)
UPDATE supplies SET remaining = remaining + settled.done
FROM settled WHERE supplies.run_id = %(run_id)s AND settled.fate IN ('superseded', 'rejected');

-- name: merged_updates
SELECT task_id, worker_id, samples, losses, fate FROM updates WHERE merge_task = %(task_id)s AND run_id = %(run_id)s;

-- name: add_version
INSERT INTO versions (run_id, number, weights_sha256, codec, delta, snapshot, state, applied_samples, updates, active,
    losses, metrics, reason, task_id)
VALUES (%(run_id)s, %(number)s, %(weights_sha256)s, %(codec)s, %(delta)s, %(snapshot)s, %(state)s, %(applied_samples)s,
    %(updates)s, %(active)s, %(losses)s, %(metrics)s, %(reason)s, %(task_id)s);

-- name: version
SELECT * FROM versions WHERE run_id = %(run_id)s AND number = %(number)s;

-- name: chain
-- From the newest snapshot at or after the caller's version, or its own version, to the newest.
WITH start AS (
    SELECT COALESCE(MAX(number) FILTER (WHERE snapshot IS NOT NULL), 0) AS newest FROM versions WHERE run_id = %(run_id)s
)
SELECT number, weights_sha256, codec, delta, snapshot, state FROM versions, start
WHERE run_id = %(run_id)s AND number > %(after)s
    AND (%(after)s >= 0 OR number >= start.newest)
ORDER BY number;

-- name: put_blob
INSERT INTO blobs (hash, size_bytes) VALUES (%(hash)s, %(size_bytes)s) ON CONFLICT (hash) DO NOTHING;

-- name: blobs_known
SELECT hash, size_bytes FROM blobs WHERE hash = ANY(%(hashes)s);

-- name: add_taste
INSERT INTO tastes (run_id, version, samples, image, metrics)
VALUES (%(run_id)s, %(version)s, %(samples)s, %(image)s, %(metrics)s)
ON CONFLICT (run_id, version) DO NOTHING;

-- name: tastes
SELECT version, created_at, samples, metrics, image FROM tastes WHERE run_id = %(run_id)s ORDER BY version;

-- name: newest_taste
SELECT version, EXTRACT(EPOCH FROM now() - created_at)::float8 AS age_s FROM tastes
WHERE run_id = %(run_id)s ORDER BY version DESC LIMIT 1;

-- name: curve
SELECT number, created_at, applied_samples, losses, updates, active, reason FROM versions
WHERE run_id = %(run_id)s AND number > 0 ORDER BY number;

-- name: fates
SELECT
    COALESCE(SUM(samples) FILTER (WHERE fate = 'applied'), 0)::bigint AS applied,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'late'), 0)::bigint AS late,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'superseded'), 0)::bigint AS superseded,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'rejected'), 0)::bigint AS rejected,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'pending'), 0)::bigint AS pending,
    COALESCE(SUM(bytes_up), 0)::bigint AS bytes_up, COALESCE(SUM(bytes_down), 0)::bigint AS bytes_down
FROM updates WHERE run_id = %(run_id)s;

-- name: lost_samples
-- What a lost lease had reported to have trained by its last heartbeat: those samples' work is gone, their positions
-- are trained again.
SELECT COALESCE(SUM(samples), 0)::bigint AS lost FROM leases
WHERE run_id = %(run_id)s AND kind = 'unit' AND outcome IN ('lost', 'failed', 'revoked');

-- name: pace
-- Now: what the updates of the last minute and a half brought, and the mean losses of the newest version.
SELECT
    (SELECT COALESCE(SUM(samples), 0) FROM updates WHERE run_id = %(run_id)s
        AND reported_at > now() - interval '60 seconds')::float8 AS recent_samples,
    (SELECT LEAST(60, EXTRACT(EPOCH FROM COALESCE(runs.ended_at, now()) - runs.started_at))::float8 FROM runs WHERE id = %(run_id)s)
        AS window_s,
    (SELECT COALESCE(SUM(rate), 0) FROM leases WHERE run_id = %(run_id)s AND ended_at IS NULL AND samples > 0)::float8 AS rate,
    (SELECT count(DISTINCT worker_id) FROM leases WHERE run_id = %(run_id)s AND ended_at IS NULL AND kind = 'unit')
        AS active,
    (SELECT COALESCE(SUM(samples), 0) FROM leases WHERE run_id = %(run_id)s AND ended_at IS NULL AND kind = 'unit')::bigint
        AS leased_samples,
    (SELECT losses FROM versions WHERE run_id = %(run_id)s AND number > 0 ORDER BY number DESC LIMIT 1) AS losses,
    (SELECT metrics FROM tastes WHERE run_id = %(run_id)s ORDER BY version DESC LIMIT 1) AS metrics,
    (SELECT metrics FROM tastes WHERE run_id = %(run_id)s ORDER BY version LIMIT 1) AS first_metrics;

-- name: contributions
WITH handed AS (
    SELECT worker_id, count(*) AS units,
        COALESCE(SUM(samples) FILTER (WHERE fate = 'applied'), 0)::bigint AS applied,
        COALESCE(SUM(samples) FILTER (WHERE fate = 'late'), 0)::bigint AS late,
        COALESCE(SUM(samples) FILTER (WHERE fate = 'superseded'), 0)::bigint AS superseded,
        COALESCE(SUM(samples) FILTER (WHERE fate = 'rejected'), 0)::bigint AS rejected,
        COALESCE(SUM(samples) FILTER (WHERE fate = 'pending'), 0)::bigint AS pending,
        SUM(seconds) AS seconds, MIN(reported_at) AS first, MAX(reported_at) AS last,
        SUM(bytes_up)::bigint AS bytes_up, SUM(bytes_down)::bigint AS bytes_down
    FROM updates WHERE run_id = %(run_id)s GROUP BY worker_id
), gone AS (
    SELECT worker_id, SUM(samples)::bigint AS lost, MIN(granted_at) AS first, MAX(ended_at) AS last FROM leases
    WHERE run_id = %(run_id)s AND kind = 'unit' AND outcome IN ('lost', 'failed', 'revoked') GROUP BY worker_id
)
SELECT w.id, w.name, w.device, w.share, COALESCE(units, 0) AS units, COALESCE(applied, 0) AS applied,
    COALESCE(late, 0) AS late, COALESCE(superseded, 0) AS superseded, COALESCE(rejected, 0) AS rejected,
    COALESCE(pending, 0) AS pending, COALESCE(lost, 0) AS lost, COALESCE(seconds, 0) AS seconds,
    COALESCE(handed.first, gone.first) AS first, COALESCE(handed.last, gone.last) AS last,
    COALESCE(bytes_up, 0) AS bytes_up, COALESCE(bytes_down, 0) AS bytes_down
FROM workers w LEFT JOIN handed ON handed.worker_id = w.id LEFT JOIN gone ON gone.worker_id = w.id
WHERE handed.worker_id IS NOT NULL OR gone.worker_id IS NOT NULL
ORDER BY COALESCE(applied, 0) + COALESCE(late, 0) DESC, w.name;

-- name: credit_of_worker
SELECT COALESCE(SUM(samples) FILTER (WHERE fate IN ('applied', 'late')), 0)::bigint AS applied
FROM updates WHERE worker_id = %(worker_id)s;

-- name: worker_totals
SELECT worker_id, count(*) AS units,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'applied'), 0)::bigint AS applied,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'late'), 0)::bigint AS late,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'superseded'), 0)::bigint AS superseded,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'rejected'), 0)::bigint AS rejected,
    COALESCE(SUM(samples) FILTER (WHERE fate = 'pending'), 0)::bigint AS pending
FROM updates GROUP BY worker_id;

-- name: sweep_updates
-- Updates whose fate is settled, unless the run keeps them or the same bytes wait under another name.
WITH settled AS (
    SELECT task_id, blob_hash FROM updates JOIN runs ON runs.id = updates.run_id
    WHERE NOT swept AND fate <> 'pending' AND reported_at < now() - interval '2 minutes'
        AND NOT COALESCE((runs.settings ->> 'keep_updates')::boolean, false)
    ORDER BY reported_at LIMIT 500
), gone AS (
    UPDATE updates SET swept = true FROM settled WHERE updates.task_id = settled.task_id
), free AS (
    DELETE FROM blobs USING settled WHERE blobs.hash = settled.blob_hash AND NOT blobs.kept
        AND NOT EXISTS (SELECT FROM updates other WHERE other.fate = 'pending' AND other.blob_hash = settled.blob_hash)
    RETURNING blobs.hash
)
SELECT hash FROM free;

-- name: sweep_versions
-- Outer states of versions long past, and all snapshots but the first, the newest two and those of the last ten versions.
WITH old AS (
    SELECT v.run_id, v.number, v.state, v.snapshot, v.number > 0 AND v.number < runs.version - 10 AND v.number < (
        SELECT COALESCE(MIN(number), 0) FROM (SELECT number FROM versions s WHERE s.run_id = v.run_id
            AND s.snapshot IS NOT NULL ORDER BY number DESC LIMIT 2) newest) AS stale
    FROM versions v JOIN runs ON runs.id = v.run_id
    WHERE v.number < runs.version - 10 AND (v.state IS NOT NULL OR (v.snapshot IS NOT NULL AND v.number > 0))
    ORDER BY v.run_id, v.number LIMIT 200
), gone AS (
    UPDATE versions SET state = NULL, snapshot = CASE WHEN old.stale THEN NULL ELSE versions.snapshot END
    FROM old WHERE versions.run_id = old.run_id AND versions.number = old.number
), hashes AS (
    SELECT state ->> 'hash' AS hash FROM old WHERE state IS NOT NULL
    UNION SELECT snapshot ->> 'hash' FROM old WHERE stale AND snapshot IS NOT NULL
), free AS (
    DELETE FROM blobs USING hashes WHERE blobs.hash = hashes.hash AND NOT blobs.kept AND NOT EXISTS (
        SELECT FROM versions v JOIN runs ON runs.id = v.run_id WHERE v.number >= runs.version - 10
            AND (v.state ->> 'hash' = hashes.hash OR v.snapshot ->> 'hash' = hashes.hash))
    RETURNING blobs.hash
)
SELECT hash FROM free;
