-- name: placement_lock
-- One hub copy places at a time. It holds this until its pass is committed.
SELECT pg_try_advisory_xact_lock(1886348396, 1) AS mine; -- "potl"

-- name: anything_waits
SELECT EXISTS (
    SELECT FROM jobs JOIN runs ON runs.id = jobs.run_id WHERE NOT jobs.finished AND runs.state = 'queued') AS waits;

-- name: clock
SELECT EXTRACT(EPOCH FROM now())::float8 AS now;

-- name: waiting_jobs
SELECT runs.id, runs.name, jobs.owner, jobs.needs::text AS needs, jobs.priority, jobs.rank,
    EXTRACT(EPOCH FROM jobs.queued_at)::float8 AS queued_at, (jobs.spec ->> 'timeout_s')::float8 AS timeout_s,
    NULLIF(jobs.avoid, '{}') AS avoid, jobs.gang, jobs.member,
    COALESCE(jobs.held_back > now(), false) AS held_back
FROM jobs JOIN runs ON runs.id = jobs.run_id
WHERE NOT jobs.finished AND runs.state = 'queued';

-- name: waiting_ids
SELECT runs.id FROM jobs JOIN runs ON runs.id = jobs.run_id WHERE NOT jobs.finished AND runs.state = 'queued';

-- name: machines
-- A worker counts as present while it asks: it asks again after at most thirty seconds.
SELECT id, name, owner, machine, rules, executors, labels || hub_labels AS labels,
    draining_at IS NOT NULL AS draining,
    state <> 'left' AND hung_up_at IS NULL AND ordered_at > now() - interval '45 seconds' AS present,
    door IS NOT NULL AS has_door
FROM workers WHERE revoked_at IS NULL AND ordered_at IS NOT NULL;

-- name: held_places
-- Every place that is taken: an attempt has one until its lease is over, whatever became of its job.
SELECT attempts.worker_id, attempts.run_id, runs.name, jobs.owner, attempts.granted,
    EXTRACT(EPOCH FROM attempts.placed_at)::float8 AS placed_at,
    EXTRACT(EPOCH FROM attempts.started_at)::float8 AS started_at, (jobs.spec ->> 'timeout_s')::float8 AS timeout_s,
    jobs.gang
FROM attempts JOIN jobs ON jobs.run_id = attempts.run_id JOIN runs ON runs.id = attempts.run_id
WHERE attempts.ended_at IS NULL;

-- name: usages
SELECT owner, amount, EXTRACT(EPOCH FROM now() - at)::float8 AS age_s FROM usages;

-- name: quota_use
-- What those who have a quota used in the last seven days.
SELECT quotas.owner, quotas.running, quotas.gpu_hours, quotas.cpu_hours,
    COALESCE((SELECT name FROM credentials WHERE subject = quotas.owner), '') AS name,
    COALESCE(used.gpu, 0)::float8 AS gpu_hours_used, COALESCE(used.cpu, 0)::float8 AS cpu_hours_used
FROM quotas LEFT JOIN LATERAL (
    SELECT SUM(hours * jsonb_array_length(granted -> 'gpus')) AS gpu, SUM(hours * (granted ->> 'cpu')::float8) AS cpu
    FROM (
        SELECT granted, EXTRACT(EPOCH FROM COALESCE(ended_at, now()) - GREATEST(placed_at, now() - interval '7 days'))
            ::float8 / 3600 AS hours
        FROM jobs JOIN attempts ON attempts.run_id = jobs.run_id
        WHERE jobs.owner = quotas.owner AND (ended_at IS NULL OR ended_at > now() - interval '7 days')
            AND (quotas.gpu_hours IS NOT NULL OR quotas.cpu_hours IS NOT NULL)
    ) times
) used ON true;

-- name: lock_workers_to_place
-- Nobody is revoked or drained until this pass is committed. In the order of their ids, as everywhere.
SELECT id, name FROM workers
WHERE id = ANY(%(ids)s::text[]) AND revoked_at IS NULL AND draining_at IS NULL AND state <> 'left'
ORDER BY id FOR SHARE;

-- name: lock_jobs_to_place
-- Those that still wait: somebody may have stopped one since the pass began.
SELECT runs.id, runs.name, jobs.task_id, jobs.owner, COALESCE((jobs.spec ->> 'patience_s')::float8, 120) AS patience_s,
    jobs.gang
FROM runs JOIN jobs ON jobs.run_id = runs.id
WHERE runs.id = ANY(%(ids)s::text[]) AND runs.state = 'queued' AND NOT jobs.finished
ORDER BY runs.id FOR NO KEY UPDATE OF runs, jobs;

-- name: place_jobs
-- All placements of a pass at once: a lease and an attempt each, and the job goes on. The rows are locked already.
WITH new AS (
    SELECT * FROM unnest(%(runs)s::text[], %(tasks)s::bigint[], %(leases)s::uuid[], %(workers)s::text[],
        %(grants)s::jsonb[], %(patience)s::float8[], %(reasons)s::text[], %(addresses)s::text[])
        AS new (run_id, task_id, lease_id, worker_id, granted, patience_s, reason, address)
), lease AS (
    -- a minute to reach the worker; from then on its job's patience counts
    INSERT INTO leases (id, task_id, run_id, worker_id, kind, deadline, ttl)
    SELECT lease_id, task_id, run_id, worker_id, 'command', now() + interval '60 seconds',
        make_interval(secs => patience_s) FROM new
), task AS (
    UPDATE tasks SET state = 'leased', attempts = attempts + 1, ended_at = NULL, reason = ''
    FROM new WHERE tasks.id = new.task_id
), run AS (
    UPDATE runs SET state = 'placed', reason = new.reason FROM new WHERE runs.id = new.run_id
), job AS (
    UPDATE jobs SET attempts = attempts + 1 FROM new WHERE jobs.run_id = new.run_id
    RETURNING jobs.run_id, jobs.attempts AS number
)
INSERT INTO attempts (run_id, number, lease_id, worker_id, granted, reason, address)
SELECT new.run_id, job.number, new.lease_id, new.worker_id, new.granted, new.reason, new.address
FROM new JOIN job ON job.run_id = new.run_id;

-- name: set_ranks
-- Locked in the order of ids, as a placement pass does: else the two could wait for each other.
WITH new AS (
    SELECT jobs.run_id, new.rank FROM unnest(%(ids)s::text[], %(ranks)s::float8[]) AS new (id, rank)
    JOIN jobs ON jobs.run_id = new.id WHERE jobs.rank IS DISTINCT FROM new.rank ORDER BY jobs.run_id FOR UPDATE OF jobs
)
UPDATE jobs SET rank = new.rank FROM new WHERE jobs.run_id = new.run_id;

-- name: orders_arrive
-- Shared. A worker asks for orders: a sign of life. What it was before tells whether the placement should look again.
WITH asked AS MATERIALIZED (
    SELECT * FROM unnest(%(worker_id)s::text[], %(agent)s::text[], %(machine)s::jsonb[], %(rules)s::jsonb[],
        %(executors)s::jsonb[], %(labels)s::jsonb[])
        WITH ORDINALITY AS asked (worker_id, agent, machine, rules, executors, labels, n)
), old AS (
    SELECT asked.n, id, workers.machine, workers.rules, workers.executors, workers.labels, workers.door,
        state <> 'left' AND hung_up_at IS NULL AND ordered_at > now() - interval '45 seconds' AS was_present,
        -- one agent at a time: the next may come when the one before said good-bye, hung up, or has long been silent
        workers.agent IN ('', asked.agent) OR state = 'left' OR hung_up_at IS NOT NULL OR ordered_at IS NULL
            OR ordered_at < now() - interval '30 seconds' AS is_next
    FROM workers JOIN asked ON asked.worker_id = workers.id ORDER BY id FOR NO KEY UPDATE OF workers
)
UPDATE workers SET agent = asked.agent, ordered_at = now(), last_seen = now(), hung_up_at = NULL,
    machine = asked.machine, rules = asked.rules, executors = asked.executors, labels = asked.labels,
    -- the last request of an agent that said good-bye does not bring it back; a new agent does
    state = CASE WHEN workers.state = 'left' AND workers.agent <> asked.agent THEN 'idle' ELSE workers.state END
FROM old JOIN asked ON asked.n = old.n WHERE workers.id = old.id AND old.is_next
RETURNING old.n, old.machine, old.rules, old.executors, old.labels, old.door,
    COALESCE(old.was_present, false) AS was_present,
    workers.ordered_at, workers.draining_at IS NOT NULL AS draining,
    set_config('synchronous_commit', 'off', true) AS relaxed;

-- name: orders_look
-- Shared. How a worker stands, and the live leases of its jobs with all that it must be told of them (id NULL: none).
SELECT asked.n, workers.draining_at IS NOT NULL AS draining, workers.revoked_at IS NOT NULL AS revoked,
    workers.owner AS worker_owner, workers.name AS worker_name, workers.must_knock, todo.*
FROM unnest(%(worker_id)s::text[]) WITH ORDINALITY AS asked (worker_id, n)
JOIN workers ON workers.id = asked.worker_id
LEFT JOIN LATERAL (
    SELECT leases.id, leases.task_id, leases.run_id, leases.agent, EXTRACT(EPOCH FROM leases.ttl)::float8 AS ttl_s,
        attempts.number, attempts.granted, attempts.address, runs.name, jobs.owner, jobs.spec, jobs.project,
        jobs.checkpoint, jobs.cancelled_by, jobs.gang, jobs.member,
        COALESCE(credentials.name, jobs.owner) AS owner_name
    FROM attempts JOIN leases ON leases.id = attempts.lease_id
    JOIN runs ON runs.id = attempts.run_id JOIN jobs ON jobs.run_id = attempts.run_id
    LEFT JOIN credentials ON credentials.subject = jobs.owner
    WHERE attempts.worker_id = workers.id AND attempts.ended_at IS NULL AND leases.ended_at IS NULL
) todo ON true
ORDER BY asked.n, todo.id;

-- name: renew_commands
-- Shared. Those that are at the worker last as long as their job's patience from here on.
WITH asked AS (
    SELECT n, worker_id, agent, id::uuid FROM unnest(%(worker_id)s::text[], %(agent)s::text[], %(ids)s::jsonb[])
        WITH ORDINALITY AS asked (worker_id, agent, ids, n), jsonb_array_elements_text(ids) AS id
), held AS (
    SELECT leases.id, asked.agent, asked.n FROM leases JOIN asked ON asked.id = leases.id
        AND asked.worker_id = leases.worker_id
    WHERE kind = 'command' AND ended_at IS NULL ORDER BY leases.id FOR UPDATE OF leases
)
UPDATE leases SET deadline = now() + ttl, agent = held.agent FROM held WHERE leases.id = held.id
RETURNING held.n, set_config('synchronous_commit', 'off', true) AS relaxed;

-- name: give_commands
-- Shared. The same for what is given to a worker now: it goes to one agent only. Not relaxed: a crash that forgot whose it
-- is would let it go after a minute, though it may run for its whole patience.
WITH asked AS (
    SELECT n, worker_id, agent, id::uuid FROM unnest(%(worker_id)s::text[], %(agent)s::text[], %(ids)s::jsonb[])
        WITH ORDINALITY AS asked (worker_id, agent, ids, n), jsonb_array_elements_text(ids) AS id
), held AS (
    SELECT leases.id, asked.agent, asked.n FROM leases JOIN asked ON asked.id = leases.id
        AND asked.worker_id = leases.worker_id
    WHERE kind = 'command' AND ended_at IS NULL AND leases.agent IN ('', asked.agent)
    ORDER BY leases.id FOR UPDATE OF leases
)
UPDATE leases SET deadline = now() + ttl, agent = held.agent FROM held WHERE leases.id = held.id
RETURNING held.n, leases.id;

-- name: hang_up
-- Its connection ended. Unless it has asked again meanwhile.
UPDATE workers SET hung_up_at = now() WHERE id = %(worker_id)s AND ordered_at = %(ordered_at)s;

-- name: forget_hang_ups
-- At start: connections that ended because the hub did, say nothing about the agents.
UPDATE workers SET hung_up_at = NULL WHERE hung_up_at IS NOT NULL;

-- name: drain_worker
UPDATE workers SET draining_at = CASE WHEN %(draining)s::boolean THEN COALESCE(draining_at, now()) END
WHERE id = %(id)s;

-- name: find_worker
SELECT id, name FROM workers WHERE id = %(ref)s OR name = %(ref)s ORDER BY (id = %(ref)s) DESC LIMIT 1;

-- name: label_worker
UPDATE workers SET hub_labels = %(labels)s WHERE id = %(id)s;

-- name: own_worker
UPDATE workers SET owner = %(owner)s FROM credentials
WHERE credentials.token_sha256 = %(token_sha256)s AND credentials.role = 'worker' AND credentials.revoked_at IS NULL
    AND workers.id = credentials.subject
RETURNING workers.id, workers.name;
