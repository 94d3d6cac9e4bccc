-- name: add_invite
INSERT INTO invites (id, code_sha256, role, trusted, name, uses, expires_at, created_by)
VALUES (%(id)s, %(code_sha256)s, %(role)s, %(trusted)s, %(name)s, %(uses)s, now() + %(ttl)s, %(created_by)s)
RETURNING expires_at;

-- name: invites
SELECT id, role, trusted, name, uses, used, created_at, expires_at, revoked_at,
    revoked_at IS NULL AND expires_at > now() AND used < uses AS usable
FROM invites ORDER BY created_at DESC LIMIT 200;

-- name: use_invite
-- Takes one use, if there is one; locked, so that the last use goes to one machine only.
WITH wanted AS (
    SELECT *, CASE WHEN revoked_at IS NOT NULL THEN 'revoked'
                   WHEN expires_at <= now() THEN 'expired'
                   WHEN used >= uses THEN 'used up' ELSE 'ok' END AS verdict
    FROM invites WHERE code_sha256 = %(code_sha256)s FOR UPDATE
), taken AS (
    UPDATE invites SET used = invites.used + 1 FROM wanted WHERE invites.id = wanted.id AND wanted.verdict = 'ok'
)
SELECT id, role, trusted, name, uses, used, verdict, expires_at FROM wanted;

-- name: peek_invite
SELECT role, expires_at, revoked_at IS NULL AND expires_at > now() AND used < uses AS usable
FROM invites WHERE code_sha256 = %(code_sha256)s;

-- name: revoke_invite
-- The link and everybody who came by it.
WITH gone AS (
    UPDATE invites SET revoked_at = COALESCE(revoked_at, now()) WHERE id = %(id)s RETURNING id
), credential AS (
    UPDATE credentials SET revoked_at = now() FROM gone
    WHERE credentials.invite_id = gone.id AND credentials.revoked_at IS NULL RETURNING subject
), theirs AS (
    -- in the order of their ids, as a placement pass locks them
    SELECT id FROM workers WHERE id IN (SELECT subject FROM credential) ORDER BY id FOR UPDATE
), worker AS (
    UPDATE workers SET revoked_at = now() FROM theirs WHERE workers.id = theirs.id
)
SELECT (SELECT count(*) FROM gone) AS found, (SELECT array_agg(subject) FROM credential) AS subjects;

-- name: add_credential
INSERT INTO credentials (token_sha256, role, subject, name, invite_id)
VALUES (%(token_sha256)s, %(role)s, %(subject)s, %(name)s, %(invite_id)s)
ON CONFLICT (token_sha256) DO NOTHING RETURNING subject;

-- name: put_admin
INSERT INTO credentials (token_sha256, role, subject, name) VALUES (%(token_sha256)s, 'admin', %(subject)s, 'admin')
ON CONFLICT (token_sha256) DO NOTHING;

-- name: credential
-- Shared: of many who ask at the same moment.
SELECT asked.n, credentials.role, credentials.subject, credentials.name,
    credentials.revoked_at IS NOT NULL AS revoked, COALESCE(workers.trusted, false) AS trusted
FROM unnest(%(token_sha256)s::text[]) WITH ORDINALITY AS asked (token_sha256, n)
JOIN credentials ON credentials.token_sha256 = asked.token_sha256
LEFT JOIN workers ON workers.id = credentials.subject;

-- name: worker_names
SELECT name FROM workers WHERE name LIKE %(prefix)s;

-- name: add_worker
INSERT INTO workers (id, name, device, share, trusted, hardware)
VALUES (%(id)s, %(name)s, %(device)s, %(share)s, %(trusted)s, %(hardware)s);

-- name: update_worker
UPDATE workers SET device = %(device)s, share = %(share)s WHERE id = %(id)s AND (device, share) <> (%(device)s, %(share)s::real);

-- name: revoke_worker
WITH gone AS (
    UPDATE workers SET revoked_at = COALESCE(revoked_at, now()) WHERE id = %(id)s OR name = %(id)s RETURNING id, name
), credential AS (
    UPDATE credentials SET revoked_at = now() FROM gone WHERE credentials.subject = gone.id
)
SELECT id, name FROM gone;

-- name: worker_left
SELECT state = 'left' OR revoked_at IS NOT NULL AS away FROM workers WHERE id = %(worker_id)s;

-- name: other_workers_live
SELECT EXISTS (
    SELECT FROM workers WHERE id <> %(worker_id)s AND NOT trusted AND revoked_at IS NULL AND state <> 'left'
        AND last_seen > now() - interval '30 seconds') AS live;

-- name: anybody_live
SELECT EXISTS (
    SELECT FROM workers WHERE NOT trusted AND revoked_at IS NULL AND state <> 'left'
        AND last_seen > now() - interval '40 seconds') AS live;

-- name: trusted_worker_live
SELECT EXISTS (
    SELECT FROM workers WHERE trusted AND revoked_at IS NULL AND state <> 'left'
        AND last_seen > now() - interval '40 seconds') AS live;

-- name: workers
SELECT w.*, w.last_seen > now() - interval '40 seconds' AS present, w.labels || w.hub_labels AS all_labels,
    COALESCE(person.name, w.owner) AS owner_name, here.jobs,
    live.kind, live.run_id AS doing_run, live.samples AS doing_samples, live.rate, live.task_id,
    span(tasks.positions) AS doing_of
FROM workers w
LEFT JOIN LATERAL (
    SELECT * FROM leases WHERE leases.worker_id = w.id AND ended_at IS NULL AND leases.kind <> 'command'
    ORDER BY samples DESC, granted_at LIMIT 1
) live ON true
LEFT JOIN LATERAL (
    SELECT jsonb_agg(jsonb_build_object('name', runs.name, 'gpus', attempts.granted -> 'gpus') ORDER BY placed_at) AS jobs
    FROM attempts JOIN runs ON runs.id = attempts.run_id
    WHERE attempts.worker_id = w.id AND attempts.ended_at IS NULL
) here ON true
LEFT JOIN credentials person ON person.subject = w.owner AND w.owner <> ''
LEFT JOIN tasks ON tasks.id = live.task_id
WHERE %(only)s::text IS NULL OR w.id = %(only)s
ORDER BY w.joined_at;

-- name: add_event
INSERT INTO events (kind, subject, run_id, actor, text) VALUES (%(kind)s, %(subject)s, %(run_id)s, %(actor)s, %(text)s);

-- name: events
-- What happened to somebody's job or gang is theirs to read (viewer NULL: an admin); others read that it did.
SELECT newest.id, at, kind, subject, actor,
    CASE WHEN COALESCE(jobs.owner, gangs.owner) IS NULL OR %(viewer)s::text IS NULL
        OR COALESCE(jobs.owner, gangs.owner) = %(viewer)s THEN text
        ELSE subject || ' is ' || split_part(kind, '.', 2) END AS text
FROM (
    SELECT * FROM events
    WHERE id > %(after)s AND (%(run_id)s::text IS NULL OR run_id = %(run_id)s) ORDER BY id DESC LIMIT %(limit)s
) newest
LEFT JOIN jobs ON jobs.run_id = newest.run_id AND newest.kind LIKE 'job.%%'
LEFT JOIN gangs ON gangs.run_id = newest.run_id AND newest.kind LIKE 'gang.%%'
ORDER BY newest.id;
