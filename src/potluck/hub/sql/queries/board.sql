-- name: curve_of_many
-- The losses of at most so many versions, evenly chosen, the newest among them: a drawing has only so many pixels.
WITH newest AS (
    SELECT max(number) AS number FROM versions WHERE run_id = %(run_id)s
), wanted AS (
    SELECT DISTINCT CASE WHEN newest.number <= %(most)s THEN i ELSE (i * newest.number::bigint / %(most)s)::integer END AS number
    FROM newest, generate_series(1, LEAST(newest.number, %(most)s)) AS i
)
SELECT number, applied_samples, losses FROM versions JOIN wanted USING (number) WHERE run_id = %(run_id)s ORDER BY number;

-- name: run_briefs
-- Runs as lines of a list: those that are not over first, then the newest.
WITH listed AS (
    SELECT id, name, state, recipe ->> 'name' AS recipe, dataset ->> 'name' AS dataset, version, created_at, ended_at,
        array_position(ARRAY['running', 'finishing', 'paused', 'queued'], state) AS liveliness
    FROM runs WHERE mode = 'pool' ORDER BY liveliness, created_at DESC LIMIT %(limit)s
)
SELECT listed.*, COALESCE(versions.applied_samples, 0) AS samples, newest.metrics
FROM listed
LEFT JOIN versions ON versions.run_id = listed.id AND versions.number = listed.version
LEFT JOIN LATERAL (
    SELECT metrics FROM tastes WHERE tastes.run_id = listed.id ORDER BY version DESC LIMIT 1
) newest ON true
ORDER BY liveliness, created_at DESC;

-- name: job_lines
-- Jobs as lines of a list, the newest first: those that wait (of these ids), are at work, or ended.
SELECT runs.id, runs.name, runs.state, runs.created_at, runs.started_at, runs.ended_at, jobs.priority, jobs.queued_at,
    jobs.needs, COALESCE(credentials.name, jobs.owner) AS owner, COALESCE(last.worker, '') AS worker, last.exit_code,
    g.id AS gang, g.name AS gang_name, g.state AS gang_state, g.started_at AS gang_started_at, g.ended_at AS gang_ended_at
FROM runs JOIN jobs ON jobs.run_id = runs.id
LEFT JOIN runs g ON g.id = jobs.gang
LEFT JOIN credentials ON credentials.subject = jobs.owner
LEFT JOIN LATERAL (
    SELECT workers.name AS worker, attempts.exit_code FROM attempts JOIN workers ON workers.id = attempts.worker_id
    WHERE attempts.run_id = runs.id ORDER BY attempts.number DESC LIMIT 1
) last ON true
WHERE runs.id IN (
    SELECT unnest(%(ids)s::text[])
    UNION ALL (SELECT run_id FROM tasks WHERE kind = 'command' AND state = 'leased' ORDER BY id DESC LIMIT %(at_work)s)
    UNION ALL (SELECT id FROM runs r WHERE r.mode = 'job' AND r.ended_at IS NOT NULL
        AND r.state IN ('succeeded', 'failed', 'cancelled', 'lost') ORDER BY r.ended_at DESC LIMIT %(ended)s))
ORDER BY runs.created_at DESC, jobs.member;

-- name: job_counts
SELECT count(*) FILTER (WHERE state = 'queued') AS waiting, count(*) FILTER (WHERE state <> 'queued') AS at_work
FROM tasks WHERE kind = 'command' AND state IN ('queued', 'leased');

-- name: newest_figures
-- Of each of these jobs, what its newest points after a place say under these names; no more than so many points.
SELECT p.run_id, p.attempt, p.seq, p.step,
    COALESCE((SELECT jsonb_object_agg(key, value) FROM jsonb_each(p."values") WHERE key = ANY(%(names)s)), '{}') AS "values"
FROM jsonb_to_recordset(%(after)s::jsonb) AS known(run_id text, attempt integer, seq bigint)
CROSS JOIN LATERAL (
    SELECT * FROM points WHERE points.run_id = known.run_id AND (points.attempt, points.seq) > (known.attempt, known.seq)
    ORDER BY points.attempt DESC, points.seq DESC LIMIT %(most)s
) p ORDER BY p.at, p.run_id, p.attempt, p.seq;

-- name: other_figures
-- Of each of these jobs its next points after a place, without these names: at least one, and no more than so many bytes.
SELECT run_id, attempt, seq, step, "values" FROM (
    SELECT p.run_id, p.attempt, p.seq, p.step, p."values" - %(names)s::text[] AS "values",
        sum(octet_length(p."values"::text)) OVER place AS bytes, row_number() OVER place AS number
    FROM jsonb_to_recordset(%(after)s::jsonb) AS known(run_id text, attempt integer, seq bigint)
    CROSS JOIN LATERAL (
        SELECT * FROM points WHERE points.run_id = known.run_id AND (points.attempt, points.seq) > (known.attempt, known.seq)
        ORDER BY points.attempt, points.seq LIMIT %(most)s
    ) p
    WINDOW place AS (PARTITION BY p.run_id ORDER BY p.attempt, p.seq)
) counted WHERE number = 1 OR bytes <= %(most_bytes)s ORDER BY run_id, attempt, seq;

-- name: newest_attempts
-- Of each of these jobs the attempts whose output is worth following.
SELECT run_id, number, ended_at IS NOT NULL AS ended FROM (
    SELECT run_id, number, ended_at, row_number() OVER (PARTITION BY run_id ORDER BY number DESC) AS place
    FROM attempts WHERE run_id = ANY(%(ids)s)
) counted WHERE place <= %(most)s ORDER BY run_id, number;

-- name: events_of_many
-- What happened to several runs, the newest so many; `inside`: with the reasons.
SELECT * FROM (
    SELECT id, at, kind, subject, actor,
        CASE WHEN %(inside)s THEN text ELSE subject || ' is ' || substr(kind, strpos(kind, '.') + 1) END AS text
    FROM events WHERE run_id = ANY(%(ids)s) ORDER BY id DESC LIMIT %(limit)s
) newest ORDER BY id;
