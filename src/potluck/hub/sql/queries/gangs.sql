-- name: add_gang
-- A run, the gang and its members in one statement; nothing if the key was used before.
WITH run AS (
    INSERT INTO runs (id, name, mode, created_by, idempotency_key)
    VALUES (%(id)s, %(name)s, 'gang', %(created_by)s, %(key)s)
    ON CONFLICT (idempotency_key) DO NOTHING RETURNING id
), gang AS (
    INSERT INTO gangs (run_id, owner, spec, project, least, most, compat)
    SELECT id, %(owner)s, %(spec)s, %(project)s, %(least)s, %(most)s, %(compat)s FROM run RETURNING run_id
), member_run AS (
    INSERT INTO runs (id, name, mode, created_by)
    SELECT new.id, new.name, 'job', %(created_by)s
    FROM run, unnest(%(members)s::text[], %(names)s::text[]) AS new (id, name) RETURNING id
), task AS (
    INSERT INTO tasks (run_id, kind) SELECT id, 'command' FROM member_run RETURNING id, run_id
), member AS (
    INSERT INTO jobs (run_id, task_id, owner, spec, needs, project, priority, retries_left, gang, member)
    SELECT task.run_id, task.id, %(owner)s, %(spec)s, %(needs)s, %(project)s, %(priority)s, %(retries_left)s,
        gang.run_id, new.number
    FROM gang, task JOIN unnest(%(members)s::text[]) WITH ORDINALITY AS new (id, number) ON new.id = task.run_id
)
SELECT id FROM run;

-- name: gang_by_id
SELECT run_id AS id FROM gangs WHERE run_id = %(ref)s;

-- name: find_gang
-- By name, by the front of an id, or `last`: one's own first, then the newest. A name is sure, a front may fit several.
SELECT runs.id, runs.name = %(ref)s OR %(ref)s = 'last' AS sure
FROM runs JOIN gangs ON gangs.run_id = runs.id
WHERE runs.mode = 'gang'
    AND (runs.name = %(ref)s OR %(ref)s = 'last' OR (length(%(ref)s) >= 3 AND starts_with(runs.id, %(ref)s)))
ORDER BY sure DESC, (gangs.owner = %(owner)s) DESC, runs.created_at DESC LIMIT 3;

-- name: gang_ids
SELECT gangs.run_id AS id FROM gangs JOIN runs ON runs.id = gangs.run_id
WHERE runs.mode = 'gang' AND (NOT %(open)s::boolean OR NOT gangs.finished)
ORDER BY runs.created_at DESC LIMIT %(limit)s;

-- name: gang_views
SELECT runs.id, runs.name, runs.state, runs.reason, runs.created_at, runs.started_at, runs.ended_at,
    gangs.owner, gangs.spec, gangs.least, gangs.most, gangs.engine, gangs.exit_code, gangs.finished,
    COALESCE(credentials.name, gangs.owner) AS owner_name, COALESCE(host.name, '') AS host
FROM gangs JOIN runs ON runs.id = gangs.run_id
LEFT JOIN credentials ON credentials.subject = gangs.owner
LEFT JOIN leases ON leases.id = gangs.host
LEFT JOIN workers host ON host.id = leases.worker_id
WHERE gangs.run_id = ANY(%(ids)s::text[]);

-- name: member_views
-- The members of these gangs, with where each is or was last, and the newest of its figures that says its rank.
SELECT jobs.gang, jobs.member, runs.id, runs.state, runs.reason, COALESCE(last.worker, '') AS worker,
    COALESCE(last.address, '') AS address, figures."values" AS figures
FROM jobs JOIN runs ON runs.id = jobs.run_id
LEFT JOIN LATERAL (
    SELECT workers.name AS worker, attempts.address FROM attempts JOIN workers ON workers.id = attempts.worker_id
    WHERE attempts.run_id = jobs.run_id ORDER BY attempts.number DESC LIMIT 1
) last ON true
LEFT JOIN LATERAL (
    SELECT newest."values" FROM (
        SELECT points."values" FROM points
        WHERE points.run_id = jobs.run_id AND points.attempt = jobs.attempts ORDER BY points.seq DESC LIMIT 20
    ) newest WHERE newest."values" ? 'gang/rank' LIMIT 1
) figures ON true
WHERE jobs.gang = ANY(%(ids)s::text[])
ORDER BY jobs.gang, jobs.member;

-- name: gangs_to_place
SELECT run_id, least, most, compat, engine, formed_at IS NOT NULL AS formed, due,
    spec ->> 'image' <> '' OR spec ->> 'requirements' <> '' AS brings,
    COALESCE(spec -> 'gang' ->> 'engine', 'auto') AS asked
FROM gangs WHERE run_id = ANY(%(ids)s::text[]) AND NOT finished;

-- name: lock_gangs_to_place
-- After their members. Those to which nothing has happened since the pass began.
SELECT run_id FROM gangs WHERE run_id = ANY(%(ids)s::text[]) AND NOT finished AND NOT due AND cancelled_by IS NULL
ORDER BY run_id FOR NO KEY UPDATE;

-- name: form_gang
WITH gang AS (
    UPDATE gangs SET engine = %(engine)s, formed_at = now(), host = NULL, host_since = NULL, address = '',
        own_failures = 0, misfortunes = 0, hurt_at = NULL
    WHERE run_id = %(gang)s AND formed_at IS NULL RETURNING run_id
)
UPDATE runs SET reason = %(reason)s FROM gang WHERE runs.id = gang.run_id;

-- name: membership
SELECT runs.id AS gang, runs.name AS gang_name, gangs.engine FROM gangs JOIN runs ON runs.id = gangs.run_id
WHERE gangs.run_id = %(gang)s;

-- name: meetings
-- Where these gangs meet, or which lease's agent shall open the place.
SELECT run_id, host, turn, address FROM gangs WHERE run_id = ANY(%(ids)s::text[]);

-- name: meet_at
-- The host says where. Only the one that keeps the place now, of its own machine, and only if it is new.
WITH met AS (
    UPDATE gangs SET address = %(address)s FROM attempts
    WHERE gangs.host = %(lease_id)s AND gangs.turn = %(turn)s AND gangs.address <> %(address)s
        AND attempts.lease_id = gangs.host AND attempts.worker_id = %(worker_id)s AND attempts.ended_at IS NULL
        AND attempts.address = %(ip)s
    RETURNING gangs.run_id
)
SELECT met.run_id AS gang, attempts.worker_id
FROM met JOIN jobs ON jobs.gang = met.run_id JOIN attempts ON attempts.run_id = jobs.run_id AND attempts.ended_at IS NULL;

-- name: touch_gang
UPDATE gangs SET due = true WHERE run_id = %(gang)s AND NOT due AND NOT finished;

-- name: gang_is_open
SELECT NOT finished AND cancelled_by IS NULL AS open FROM gangs WHERE run_id = %(gang)s;

-- name: member_ended
-- After lock_job. Somebody has to look at the gang; a member that failed by itself rests for a while, longer each time.
WITH gang AS (
    UPDATE gangs SET due = true, own_failures = own_failures + %(own)s::integer,
        misfortunes = misfortunes + %(misfortune)s::integer,
        hurt_at = CASE WHEN %(own)s::integer + %(misfortune)s::integer > 0 THEN COALESCE(hurt_at, now()) ELSE hurt_at END
    WHERE run_id = %(gang)s
)
UPDATE jobs SET held_back = CASE WHEN %(own)s::integer > 0
    THEN now() + make_interval(secs => LEAST(60, 5 * 2 ^ LEAST(GREATEST(attempts - 1, 0), 5))) END
WHERE run_id = %(run_id)s;

-- name: start_gang
-- After lock_job of a member whose command runs.
UPDATE runs SET state = 'running', started_at = COALESCE(started_at, now())
WHERE id = %(gang)s AND mode = 'gang' AND state = 'queued';

-- name: gangs_to_tend
-- Something happened to them, or nobody keeps their meeting place, or whoever does gives no sign of life.
SELECT run_id FROM gangs WHERE due AND NOT finished
UNION
SELECT gangs.run_id FROM gangs
JOIN jobs ON jobs.gang = gangs.run_id
JOIN attempts ON attempts.run_id = jobs.run_id AND attempts.ended_at IS NULL
JOIN leases ON leases.id = attempts.lease_id JOIN workers ON workers.id = leases.worker_id
WHERE gangs.formed_at IS NOT NULL AND NOT gangs.finished AND gangs.cancelled_by IS NULL AND leases.agent <> ''
    AND (gangs.host IS NULL
        OR (gangs.host = leases.id AND (workers.hung_up_at < now() - %(hung_up)s OR workers.ordered_at < now() - %(silent)s
            OR (gangs.address = '' AND gangs.host_since < now() - %(late)s))));

-- name: lock_members
-- All of a gang, in the order of their ids, as a placement pass locks them; then the gang itself.
SELECT runs.id FROM runs JOIN jobs ON jobs.run_id = runs.id
WHERE jobs.gang = %(gang)s ORDER BY runs.id FOR NO KEY UPDATE OF runs, jobs;

-- name: lock_gang
SELECT runs.id, runs.name, runs.state, runs.reason, gangs.owner, gangs.least, gangs.compat, gangs.engine,
    gangs.formed_at IS NOT NULL AS formed, gangs.host, gangs.address, gangs.turn, gangs.own_failures, gangs.misfortunes,
    COALESCE(EXTRACT(EPOCH FROM now() - gangs.hurt_at)::float8, 0) AS hurt_s, gangs.cancelled_by, gangs.finished, gangs.due,
    gangs.host_since < now() - %(late)s AS late
FROM gangs JOIN runs ON runs.id = gangs.run_id
WHERE gangs.run_id = %(gang)s FOR NO KEY UPDATE OF gangs, runs;

-- name: members
-- After lock_members: how each stands, with its newest attempt.
SELECT runs.id, runs.state, jobs.member, last.lease_id, last.exit_code, last.reason AS said,
    COALESCE(last.worker, '') AS worker, last.worker_id, COALESCE(last.agent <> '', false) AS delivered,
    COALESCE(last.live, false) AS live, COALESCE(last.sound, false) AS sound
FROM jobs JOIN runs ON runs.id = jobs.run_id
LEFT JOIN LATERAL (
    SELECT attempts.lease_id, attempts.exit_code, attempts.reason, attempts.ended_at IS NULL AS live, leases.agent,
        workers.id AS worker_id,
        workers.name AS worker,
        COALESCE(workers.hung_up_at > now() - %(hung_up)s, true) AND workers.ordered_at > now() - %(silent)s AS sound
    FROM attempts JOIN leases ON leases.id = attempts.lease_id JOIN workers ON workers.id = attempts.worker_id
    WHERE attempts.run_id = jobs.run_id ORDER BY attempts.number DESC LIMIT 1
) last ON true
WHERE jobs.gang = %(gang)s ORDER BY jobs.member;

-- name: cancel_members
-- Those that wait, when nobody waits for them any more. All are locked.
WITH run AS (
    UPDATE runs SET state = 'cancelled', reason = %(reason)s, ended_at = now() WHERE id = ANY(%(ids)s::text[])
), task AS (
    UPDATE tasks SET state = 'cancelled', reason = %(reason)s, ended_at = now()
    FROM jobs WHERE jobs.run_id = ANY(%(ids)s::text[]) AND tasks.id = jobs.task_id
)
UPDATE jobs SET cancelled_by = 'the gang', finished = true WHERE run_id = ANY(%(ids)s::text[]);

-- name: host_gang
UPDATE gangs SET host = %(host)s, host_since = now(), turn = turn + 1, address = '' WHERE run_id = %(gang)s;

-- name: unform_gang
-- No member has a place any more: the next ones come together again, and none of them has to rest.
WITH gang AS (
    UPDATE gangs SET engine = '', formed_at = NULL, host = NULL, host_since = NULL, address = '' WHERE run_id = %(gang)s
), run AS (
    UPDATE runs SET state = 'queued', reason = %(reason)s WHERE id = %(gang)s AND state IN ('queued', 'running')
)
UPDATE jobs SET held_back = NULL WHERE gang = %(gang)s AND held_back IS NOT NULL;

-- name: end_gang
WITH gang AS (
    UPDATE gangs SET finished = true, due = false, exit_code = %(exit_code)s, host = NULL, host_since = NULL, address = ''
    WHERE run_id = %(gang)s
)
UPDATE runs SET state = %(state)s, reason = %(reason)s, ended_at = COALESCE(ended_at, now()) WHERE id = %(gang)s;

-- name: tended_gang
UPDATE gangs SET due = %(due)s WHERE run_id = %(gang)s AND due <> %(due)s::boolean;

-- name: stop_gang
-- After lock_members and lock_gang. Its members are stopped one after another, by whoever tends it.
WITH gang AS (
    UPDATE gangs SET cancelled_by = %(by)s, due = true WHERE run_id = %(gang)s
)
UPDATE runs SET state = 'cancelled', reason = %(reason)s, ended_at = now() WHERE id = %(gang)s;

-- name: set_door
UPDATE workers SET door = %(door)s WHERE id = %(worker_id)s;

-- name: neighbours
-- Workers that are here and have a door, when nothing new is known of the way there or back; the last comers first.
SELECT other.id FROM workers me JOIN workers other ON other.id <> me.id
WHERE me.id = %(worker_id)s AND other.door IS NOT NULL AND other.revoked_at IS NULL AND other.state <> 'left'
    AND other.hung_up_at IS NULL AND other.ordered_at > now() - interval '45 seconds'
    AND 2 > (
        SELECT count(*) FROM reaches JOIN workers target ON target.id = reaches.target
        WHERE (reaches.source, reaches.target) IN ((me.id, other.id), (other.id, me.id))
            AND reaches.at > now() - interval '10 minutes' AND reaches.door = door_mark(target.door))
ORDER BY other.joined_at DESC, other.id LIMIT %(most)s;

-- name: want_reaches
-- Not what was wanted a moment ago, unless the door is another one. Locked in the order of the pairs.
WITH pairs AS (
    SELECT pair.source, pair.target, door_mark(workers.door) AS door
    FROM unnest(%(sources)s::text[], %(targets)s::text[]) WITH ORDINALITY AS pair (source, target, place)
    JOIN workers ON workers.id = pair.target AND workers.door IS NOT NULL AND workers.revoked_at IS NULL
    LEFT JOIN reaches ON reaches.source = pair.source AND reaches.target = pair.target
    WHERE pair.source <> pair.target AND (reaches.wanted_at IS NULL OR reaches.door <> door_mark(workers.door)
        OR COALESCE(reaches.told_at, reaches.wanted_at) < now() - interval '20 seconds')
    ORDER BY pair.place LIMIT %(most)s
), wanted AS (
    INSERT INTO reaches (source, target, door, wanted_at)
    SELECT DISTINCT pairs.source, pairs.target, pairs.door, now() FROM pairs JOIN workers ON workers.id = pairs.source
    ORDER BY 1, 2
    ON CONFLICT (source, target) DO UPDATE SET wanted_at = now(), told_at = NULL, door = excluded.door,
        at = CASE WHEN reaches.door = excluded.door THEN reaches.at END
    RETURNING source
), sources AS (
    SELECT id FROM workers WHERE id IN (SELECT source FROM wanted) ORDER BY id FOR NO KEY UPDATE
)
UPDATE workers SET must_knock = true FROM sources WHERE workers.id = sources.id RETURNING workers.id;

-- name: tell_knocks
-- What the source shall find out and was not told a moment ago, or of a door that is another one by now.
WITH due AS (
    SELECT reaches.target, workers.door FROM reaches JOIN workers ON workers.id = reaches.target
    WHERE reaches.source = %(source)s AND reaches.wanted_at IS NOT NULL AND workers.door IS NOT NULL
        AND workers.revoked_at IS NULL
        AND (reaches.told_at IS NULL OR reaches.told_at < now() - interval '20 seconds'
            OR reaches.door <> door_mark(workers.door))
    ORDER BY reaches.target LIMIT %(most)s FOR NO KEY UPDATE OF reaches
)
UPDATE reaches SET told_at = now(), door = door_mark(due.door),
    at = CASE WHEN reaches.door = door_mark(due.door) THEN reaches.at END
FROM due WHERE reaches.source = %(source)s AND reaches.target = due.target
RETURNING reaches.target, due.door;

-- name: no_knocks_left
UPDATE workers SET must_knock = false WHERE id = %(worker_id)s AND must_knock
    AND NOT EXISTS (SELECT FROM reaches WHERE source = %(worker_id)s AND wanted_at IS NOT NULL);

-- name: keep_findings
-- Only of pairs that were asked for, of the door that is still the target's, and an address that it has said.
WITH new AS (
    SELECT DISTINCT ON (found.target) found.*
    FROM jsonb_to_recordset(%(findings)s::jsonb)
        AS found (target text, address text, rtt_s float8, bytes_per_s float8, reason text)
    JOIN reaches ON reaches.source = %(source)s AND reaches.target = found.target AND reaches.told_at IS NOT NULL
    JOIN workers ON workers.id = found.target AND reaches.door = door_mark(workers.door)
    WHERE found.address = '' OR workers.door -> 'addresses' ? found.address
    ORDER BY found.target
)
UPDATE reaches SET address = new.address, rtt_s = new.rtt_s, bytes_per_s = new.bytes_per_s, reason = new.reason,
    at = now(), wanted_at = NULL, told_at = NULL
FROM new WHERE reaches.source = %(source)s AND reaches.target = new.target;

-- name: ways
-- What is known, and still true as far as one can know: ten minutes, or one for a failure; and about the same door.
SELECT reaches.source, reaches.target, reaches.address
FROM reaches JOIN workers ON workers.id = reaches.target
WHERE reaches.at > now() - CASE WHEN reaches.address = '' THEN interval '1 minute' ELSE interval '10 minutes' END
    AND reaches.door = door_mark(workers.door) AND workers.revoked_at IS NULL;

-- name: links
SELECT source.name AS source, target.name AS target, reaches.address, reaches.rtt_s, reaches.bytes_per_s, reaches.reason,
    EXTRACT(EPOCH FROM now() - reaches.at)::float8 AS seconds_ago
FROM reaches JOIN workers source ON source.id = reaches.source JOIN workers target ON target.id = reaches.target
WHERE reaches.at IS NOT NULL AND source.revoked_at IS NULL AND target.revoked_at IS NULL
    AND source.state <> 'left' AND target.state <> 'left'
ORDER BY source.name, target.name LIMIT 10000;
