-- name: keeping_job
SELECT run_id AS id, owner, project FROM jobs WHERE run_id = %(run_id)s;

-- name: attempt_of_lease
-- Whose attempt is this lease, and is it still the worker's? By primary key and unique index: logs ask this all the time.
SELECT leases.run_id, attempts.number, leases.worker_id, leases.ended_at IS NOT NULL AS ended
FROM leases JOIN attempts ON attempts.lease_id = leases.id WHERE leases.id = %(lease_id)s;

-- name: attempt_to_read
-- One attempt, or with 0 the newest, and how many there are. The row is there also if the attempt is not.
SELECT jobs.finished, newest.number AS newest, attempts.number, attempts.ended_at IS NOT NULL AS ended
FROM jobs
CROSS JOIN LATERAL (
    SELECT COALESCE(max(number), 0) AS number FROM attempts WHERE run_id = jobs.run_id
) newest
LEFT JOIN attempts ON attempts.run_id = jobs.run_id
    AND attempts.number = CASE WHEN %(attempt)s::integer = 0 THEN newest.number ELSE %(attempt)s::integer END
WHERE jobs.run_id = %(run_id)s;

-- name: tree_of_attempt
-- The newest attempt (or the one that is asked for) that left something of this kind.
SELECT number, CASE %(what)s::text WHEN 'outputs' THEN outputs ELSE checkpoint END AS tree FROM attempts
WHERE run_id = %(run_id)s AND (%(attempt)s::integer = 0 OR number = %(attempt)s::integer)
    AND CASE %(what)s::text WHEN 'outputs' THEN outputs ELSE checkpoint END IS NOT NULL
ORDER BY number DESC LIMIT 1;

-- name: add_points
-- What is there already stays as it is: a worker that did not hear our answer sends its points again.
INSERT INTO points (run_id, attempt, seq, step, at, "values", images)
SELECT %(run_id)s, %(attempt)s, seq, step, at, "values", images
FROM jsonb_to_recordset(%(points)s::jsonb) AS p(seq bigint, step bigint, at double precision, "values" jsonb, images jsonb)
ON CONFLICT DO NOTHING;

-- name: points
-- At least one, and no more than so many bytes: a point may be large.
SELECT attempt, seq, step, at, "values", images FROM (
    SELECT *, sum(octet_length("values"::text) + octet_length(images::text)) OVER (ORDER BY seq) AS bytes,
        row_number() OVER (ORDER BY seq) AS place
    FROM (
        SELECT * FROM points WHERE run_id = %(run_id)s AND attempt = %(attempt)s AND seq > %(after_seq)s
        ORDER BY seq LIMIT %(limit)s
    ) next
) counted WHERE place = 1 OR bytes <= %(most_bytes)s ORDER BY seq;

-- name: put_blobs
-- In the order of their hashes, so that two who bring the same blobs do not wait for one another in a circle.
INSERT INTO blobs (hash, size_bytes)
SELECT hash, size_bytes FROM jsonb_to_recordset(%(blobs)s::jsonb) AS b(hash text, size_bytes bigint)
ORDER BY hash ON CONFLICT (hash) DO NOTHING;

-- name: keep_blobs
-- From now on no sweep takes them, even if an update of a pool run has the same bytes.
WITH wanted AS (
    SELECT hash FROM blobs WHERE hash = ANY(%(hashes)s) AND NOT kept ORDER BY hash FOR UPDATE
)
UPDATE blobs SET kept = true FROM wanted WHERE blobs.hash = wanted.hash;

-- name: put_secret
INSERT INTO secrets (owner, name, sealed) VALUES (%(owner)s, %(name)s, %(sealed)s)
ON CONFLICT (owner, name) DO UPDATE SET sealed = EXCLUDED.sealed, changed_at = now()
RETURNING changed_at;

-- name: lock_secrets_of
-- One at a time for one person: the count must not be overtaken.
SELECT pg_advisory_xact_lock(hashtextextended('secrets ' || %(owner)s, 0));

-- name: secrets_of
SELECT name, changed_at FROM secrets WHERE owner = %(owner)s ORDER BY name;

-- name: sealed_secrets
SELECT name, sealed FROM secrets WHERE owner = %(owner)s AND name = ANY(%(names)s);

-- name: remove_secret
DELETE FROM secrets WHERE owner = %(owner)s AND name = %(name)s;
