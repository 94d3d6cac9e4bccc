-- name: add_job
-- A run, its one task, the job, the event and the news, in one statement; nothing if the key was used before.
WITH run AS (
    INSERT INTO runs (id, name, mode, created_by, idempotency_key)
    VALUES (%(id)s, %(name)s, 'job', %(created_by)s, %(key)s)
    ON CONFLICT (idempotency_key) DO NOTHING RETURNING id
), task AS (
    INSERT INTO tasks (run_id, kind) SELECT id, 'command' FROM run RETURNING id, run_id
), event AS (
    INSERT INTO events (kind, subject, run_id, actor, text)
    SELECT 'job.queued', id, id, %(created_by)s, %(text)s FROM run
)
INSERT INTO jobs (run_id, task_id, owner, spec, needs, project, git, priority, retries_left)
SELECT run_id, id, %(owner)s, %(spec)s, %(needs)s, %(project)s, %(git)s, %(priority)s, %(retries_left)s FROM task
RETURNING run_id, pg_notify(%(channel)s, 'job:' || run_id);

-- name: job_by_id
SELECT run_id AS id FROM jobs WHERE run_id = %(ref)s;

-- name: find_job
-- By name, by the front of an id, or `last`: one's own first, then the newest. A name is sure, a front may fit several.
SELECT runs.id, runs.name = %(ref)s OR %(ref)s = 'last' AS sure
FROM runs JOIN jobs ON jobs.run_id = runs.id
WHERE runs.mode = 'job'
    AND (runs.name = %(ref)s OR (%(ref)s = 'last' AND jobs.gang IS NULL) OR (length(%(ref)s) >= 3 AND starts_with(runs.id, %(ref)s)))
ORDER BY sure DESC, (jobs.owner = %(owner)s) DESC, runs.created_at DESC LIMIT 3;

-- name: job_ids
SELECT run_id AS id FROM jobs WHERE NOT %(open)s::boolean OR NOT finished ORDER BY queued_at DESC LIMIT %(limit)s;

-- name: open_jobs_of
SELECT run_id AS id FROM jobs WHERE owner = %(owner)s AND NOT finished ORDER BY queued_at;

-- name: count_open_jobs_of
SELECT count(*) AS count FROM jobs WHERE owner = %(owner)s AND NOT finished;

-- name: job_views
SELECT runs.id, runs.name, runs.state, runs.reason, runs.created_at, runs.started_at, runs.ended_at,
    jobs.owner, jobs.spec, jobs.needs, jobs.project, jobs.git, jobs.priority, jobs.retries_left, jobs.cancelled_by,
    jobs.finished, jobs.gang, jobs.member, COALESCE(credentials.name, jobs.owner) AS owner_name, last.worker, last.exit_code
FROM runs JOIN jobs ON jobs.run_id = runs.id
LEFT JOIN credentials ON credentials.subject = jobs.owner
LEFT JOIN LATERAL (
    SELECT workers.name AS worker, attempts.exit_code FROM attempts JOIN workers ON workers.id = attempts.worker_id
    WHERE attempts.run_id = runs.id ORDER BY attempts.number DESC LIMIT 1
) last ON true
WHERE runs.id = ANY(%(ids)s::text[]);

-- name: job_state
SELECT state FROM runs WHERE id = %(run_id)s;

-- name: attempts_of
SELECT attempts.*, workers.name AS worker FROM attempts JOIN workers ON workers.id = attempts.worker_id
WHERE attempts.run_id = %(run_id)s ORDER BY number;

-- name: lock_job
-- The run before anything else of a job; then leases by id, tasks, attempts, and last what its owner has used.
SELECT runs.id, runs.name, runs.state, runs.reason, jobs.task_id, jobs.owner, jobs.retries_left, jobs.returns,
    jobs.attempts, jobs.cancelled_by, jobs.finished, jobs.spec, jobs.gang
FROM runs JOIN jobs ON jobs.run_id = runs.id
WHERE runs.id = %(run_id)s FOR NO KEY UPDATE OF runs, jobs;

-- name: lock_live_lease_of_job
SELECT leases.id, leases.agent, leases.worker_id FROM attempts JOIN leases ON leases.id = attempts.lease_id
WHERE attempts.run_id = %(run_id)s AND attempts.ended_at IS NULL AND leases.ended_at IS NULL
ORDER BY leases.id FOR UPDATE OF leases;

-- name: stop_job
WITH run AS (
    UPDATE runs SET state = 'cancelled', reason = %(reason)s, ended_at = now() WHERE id = %(run_id)s
), task AS (
    UPDATE tasks SET state = 'cancelled', ended_at = now(), reason = %(reason)s
    WHERE id = %(task_id)s AND %(finished)s::boolean
)
UPDATE jobs SET cancelled_by = %(by)s, finished = %(finished)s WHERE run_id = %(run_id)s;

-- name: retry_job
WITH run AS (
    UPDATE runs SET state = 'queued', reason = %(reason)s, started_at = NULL, ended_at = NULL WHERE id = %(run_id)s
), task AS (
    UPDATE tasks SET state = 'queued', ended_at = NULL, reason = '' WHERE id = %(task_id)s
)
UPDATE jobs SET queued_at = now(), retries_left = %(retries_left)s, returns = 0, avoid = '{}', rank = NULL,
    cancelled_by = NULL, finished = false,
    checkpoint = CASE WHEN %(fresh)s::boolean THEN NULL ELSE checkpoint END
WHERE run_id = %(run_id)s;

-- name: command_lease
-- Shared.
SELECT n, run_id, kind, worker_id, ended_at IS NOT NULL AS ended
FROM unnest(%(lease_id)s::uuid[]) WITH ORDINALITY AS asked (lease_id, n) JOIN leases ON leases.id = asked.lease_id;

-- name: lock_command
-- After lock_job. Who has the lease, and whether its worker still gives a sign of life.
SELECT leases.id, leases.worker_id, leases.agent, leases.ended_at, leases.outcome, leases.ttl,
    leases.deadline < now() AS late, COALESCE(workers.hung_up_at < now() - %(hung_up)s, false) AS hung_up,
    COALESCE(runs.state = 'cancelled' AND runs.ended_at < now() - %(overdue)s, false) AS overdue,
    workers.name AS worker, attempts.number, attempts.state, attempts.granted, attempts.started_at IS NOT NULL AS ran,
    attempts.reason AS said, attempts.exit_code, attempts.signal, EXTRACT(EPOCH FROM now() - attempts.placed_at)::float8 AS seconds
FROM leases JOIN attempts ON attempts.lease_id = leases.id JOIN workers ON workers.id = leases.worker_id
JOIN runs ON runs.id = leases.run_id
WHERE leases.id = %(lease_id)s FOR UPDATE OF leases;

-- name: settle_attempt
-- An attempt ends: its lease, its task, its job and its run go on together or not at all. All are locked by now. The
-- event, and what its owner has used (see `charge`), are in the same statement: half of all statements were such ends.
WITH event AS (
    INSERT INTO events (kind, subject, run_id, actor, text)
    VALUES ('job.' || %(state)s, %(run_id)s, %(run_id)s, %(actor)s, %(text)s)
), used AS (
    INSERT INTO usages (owner, amount, at) VALUES (%(owner)s, %(used)s, now())
    ON CONFLICT (owner) DO UPDATE SET at = now(), amount = excluded.amount
        + usages.amount * exp(-ln(2) * GREATEST(EXTRACT(EPOCH FROM now() - usages.at)::float8, 0) / %(half_life_s)s)
), lease AS (
    UPDATE leases SET ended_at = now(), outcome = %(outcome)s, reason = %(attempt_reason)s WHERE id = %(lease_id)s
), task AS (
    UPDATE tasks SET state = %(task_state)s, reason = %(attempt_reason)s,
        ended_at = CASE WHEN %(task_state)s <> 'queued' THEN now() END
    WHERE id = %(task_id)s
), attempt AS (
    UPDATE attempts SET state = %(attempt_state)s, reason = %(attempt_reason)s, ended_at = now(),
        exit_code = %(exit_code)s, signal = %(signal)s, usage = %(usage)s, outputs = %(outputs)s,
        log_bytes = GREATEST(log_bytes, %(log_bytes)s),
        executor = COALESCE(NULLIF(%(executor)s, ''), executor), environment = environment || %(environment)s
    WHERE run_id = %(run_id)s AND number = %(number)s
), run AS (
    UPDATE runs SET state = %(state)s, reason = %(reason)s,
        ended_at = CASE WHEN %(final)s::boolean THEN COALESCE(ended_at, now()) END
    WHERE id = %(run_id)s
)
UPDATE jobs SET retries_left = %(retries_left)s, returns = %(returns)s, finished = %(final)s,
    avoid = CASE WHEN %(avoid)s::text = '' THEN avoid
        ELSE avoid || jsonb_build_object(%(avoid)s::text, EXTRACT(EPOCH FROM now() + %(avoid_for)s)) END
WHERE run_id = %(run_id)s RETURNING pg_notify(%(channel)s, 'job:' || run_id);

-- name: progress_of_job
-- After lock_job and lock_command. An attempt never goes back; a job that was stopped stays so.
WITH run AS (
    UPDATE runs SET state = %(state)s, started_at = CASE WHEN %(state)s = 'running' THEN COALESCE(started_at, now())
        ELSE started_at END
    WHERE id = %(run_id)s AND NOT %(cancelled)s::boolean
)
UPDATE attempts SET state = %(state)s, prepared_at = COALESCE(prepared_at, now()),
    started_at = CASE WHEN %(state)s = 'running' THEN COALESCE(started_at, now()) ELSE started_at END,
    executor = COALESCE(NULLIF(%(executor)s, ''), executor),
    environment = CASE WHEN pg_column_size(environment || %(environment)s) > 1048576 THEN environment -- grown enough
        ELSE environment || %(environment)s END
WHERE run_id = %(run_id)s AND number = %(number)s;

-- name: keep_checkpoint
WITH attempt AS (
    UPDATE attempts SET checkpoint = %(checkpoint)s WHERE run_id = %(run_id)s AND number = %(number)s
)
UPDATE jobs SET checkpoint = %(checkpoint)s WHERE run_id = %(run_id)s;

-- name: gone_commands
-- Jobs whose worker is silent for longer than their patience, or whose agent ended; and stopped ones that do not end.
SELECT leases.id, leases.run_id
FROM attempts JOIN leases ON leases.id = attempts.lease_id JOIN workers ON workers.id = attempts.worker_id
JOIN runs ON runs.id = attempts.run_id
WHERE attempts.ended_at IS NULL AND leases.ended_at IS NULL
    AND (leases.deadline < now() OR workers.hung_up_at < now() - %(hung_up)s
        OR (runs.state = 'cancelled' AND runs.ended_at < now() - %(overdue)s))
ORDER BY leases.deadline LIMIT 1000;

-- name: commands_of_worker
SELECT leases.id, leases.run_id FROM attempts JOIN leases ON leases.id = attempts.lease_id
WHERE attempts.worker_id = %(worker_id)s AND attempts.ended_at IS NULL AND leases.ended_at IS NULL ORDER BY leases.id;

-- name: charge
-- What people have used fades: halved every half-life. In the order of their ids, so that two never wait for each other.
INSERT INTO usages (owner, amount, at)
SELECT owner, amount, now() FROM unnest(%(owners)s::text[], %(amounts)s::float8[]) AS used (owner, amount) ORDER BY owner
ON CONFLICT (owner) DO UPDATE SET at = now(), amount = excluded.amount
    + usages.amount * exp(-ln(2) * GREATEST(EXTRACT(EPOCH FROM now() - usages.at)::float8, 0) / %(half_life_s)s);

-- name: quotas
SELECT quotas.owner, COALESCE(credentials.name, quotas.owner) AS name, running, gpu_hours, cpu_hours
FROM quotas LEFT JOIN credentials ON credentials.subject = quotas.owner ORDER BY name;

-- name: put_quota
INSERT INTO quotas (owner, running, gpu_hours, cpu_hours)
VALUES (%(owner)s, %(running)s, %(gpu_hours)s, %(cpu_hours)s)
ON CONFLICT (owner) DO UPDATE SET running = excluded.running, gpu_hours = excluded.gpu_hours,
    cpu_hours = excluded.cpu_hours;

-- name: remove_quota
DELETE FROM quotas WHERE owner = %(owner)s;

-- name: find_person
SELECT subject, name FROM credentials WHERE role IN ('admin', 'member') AND (subject = %(ref)s OR name = %(ref)s)
ORDER BY (subject = %(ref)s) DESC, created_at LIMIT 2;

-- name: add_events
INSERT INTO events (kind, subject, run_id, actor, text)
SELECT %(kind)s, run_id, run_id, %(actor)s, text FROM unnest(%(runs)s::text[], %(texts)s::text[]) AS new (run_id, text);
