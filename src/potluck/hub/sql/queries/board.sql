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
    FROM runs ORDER BY liveliness, created_at DESC LIMIT %(limit)s
)
SELECT listed.*, COALESCE(versions.applied_samples, 0) AS samples, newest.metrics
FROM listed
LEFT JOIN versions ON versions.run_id = listed.id AND versions.number = listed.version
LEFT JOIN LATERAL (
    SELECT metrics FROM tastes WHERE tastes.run_id = listed.id ORDER BY version DESC LIMIT 1
) newest ON true
ORDER BY liveliness, created_at DESC;
