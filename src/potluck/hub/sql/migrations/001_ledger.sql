-- The ledger: everything that must be true tomorrow. Bytes live in blobs; here are their hashes.

-- How many positions a multirange holds.
CREATE FUNCTION span(positions int8multirange) RETURNS bigint
    LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURNS NULL ON NULL INPUT
    RETURN (SELECT COALESCE(SUM(upper(r) - lower(r)), 0)::bigint FROM unnest(positions) AS r);

CREATE TABLE blobs (
    hash text PRIMARY KEY CHECK (hash ~ '^[0-9a-f]{64}$'),
    size_bytes bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- People and machines -----------------------------------------------------------------------------------------------

CREATE TABLE invites (
    id text PRIMARY KEY,
    code_sha256 text NOT NULL UNIQUE,       -- the code itself is shown once and never kept
    role text NOT NULL CHECK (role IN ('worker', 'member', 'viewer')),
    trusted boolean NOT NULL DEFAULT false,
    name text NOT NULL DEFAULT '',
    uses integer NOT NULL,
    used integer NOT NULL DEFAULT 0 CHECK (used <= uses),
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    created_by text NOT NULL DEFAULT '',
    revoked_at timestamptz
);

CREATE TABLE credentials (
    token_sha256 text PRIMARY KEY,          -- tokens are made on the machine that uses them
    role text NOT NULL CHECK (role IN ('admin', 'member', 'worker', 'viewer')),
    subject text NOT NULL UNIQUE,           -- the worker's or the member's id
    name text NOT NULL,
    invite_id text REFERENCES invites,
    created_at timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
);
CREATE INDEX credentials_invite ON credentials (invite_id);

CREATE TABLE workers (
    id text PRIMARY KEY,
    name text NOT NULL UNIQUE,
    device text NOT NULL DEFAULT 'cpu',
    share real NOT NULL DEFAULT 1,
    trusted boolean NOT NULL DEFAULT false,
    hardware jsonb NOT NULL DEFAULT '{}',
    state text NOT NULL DEFAULT 'idle',     -- idle | working | leaving | left
    joined_at timestamptz NOT NULL DEFAULT now(),
    last_seen timestamptz NOT NULL DEFAULT now(),
    revoked_at timestamptz
) WITH (fillfactor = 70);                   -- heartbeats rewrite rows: leave room on the page

-- Runs ---------------------------------------------------------------------------------------------------------------

CREATE TABLE runs (
    id text PRIMARY KEY,
    name text NOT NULL,
    mode text NOT NULL DEFAULT 'pool',
    state text NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'running', 'paused', 'finishing', 'done', 'stopped', 'failed')),
    reason text NOT NULL DEFAULT '',
    recipe jsonb NOT NULL,
    dataset jsonb NOT NULL,
    layout jsonb,                           -- known once version 0 is built
    settings jsonb NOT NULL,
    seed bigint NOT NULL DEFAULT 0,
    target_samples bigint,
    duration_s double precision,
    version integer NOT NULL DEFAULT -1,
    created_by text NOT NULL DEFAULT '',
    idempotency_key text UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now(),
    started_at timestamptz,
    paused_at timestamptz,
    paused_s double precision NOT NULL DEFAULT 0,
    ended_at timestamptz
) WITH (fillfactor = 70);
CREATE INDEX runs_live ON runs (created_at) WHERE state IN ('queued', 'running', 'paused', 'finishing');

-- The positions that nobody works on yet. Alone in a table, because every lease rewrites it.
CREATE TABLE supplies (
    run_id text PRIMARY KEY REFERENCES runs,
    remaining int8multirange NOT NULL
) WITH (fillfactor = 50);

-- Tasks and leases ---------------------------------------------------------------------------------------------------

CREATE TABLE tasks (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id text NOT NULL REFERENCES runs,
    kind text NOT NULL CHECK (kind IN ('init', 'unit', 'merge', 'taste')),
    state text NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'leased', 'done', 'lost', 'failed', 'cancelled')),
    attempts integer NOT NULL DEFAULT 0,
    spec jsonb NOT NULL DEFAULT '{}',
    positions int8multirange,               -- units only: what was carved
    reason text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz
) WITH (fillfactor = 80, autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
-- Only tasks that are minted ahead wait here; units are born leased and never enter these indexes as 'queued'.
CREATE INDEX tasks_queued ON tasks (kind, id) WHERE state = 'queued';
CREATE INDEX tasks_upkeep ON tasks (run_id, kind) WHERE kind <> 'unit' AND state IN ('queued', 'leased');
CREATE INDEX tasks_failed ON tasks (run_id) WHERE state = 'failed';

CREATE TABLE leases (
    id uuid PRIMARY KEY,                    -- unguessable: it is the fence
    task_id bigint NOT NULL REFERENCES tasks,
    run_id text NOT NULL,
    worker_id text NOT NULL REFERENCES workers,
    kind text NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT now(),
    deadline timestamptz NOT NULL,
    steps bigint NOT NULL DEFAULT 0,        -- progress, from heartbeats
    samples bigint NOT NULL DEFAULT 0,
    rate real NOT NULL DEFAULT 0,           -- samples per second
    ended_at timestamptz,
    outcome text,                           -- done | returned | failed | lost | revoked | cancelled
    reason text NOT NULL DEFAULT ''
) WITH (fillfactor = 70, autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
-- No deadline in it, so that a heartbeat stays a heap-only update.
CREATE INDEX leases_live ON leases (run_id, worker_id) WHERE ended_at IS NULL;
CREATE INDEX leases_lost ON leases (run_id, worker_id) WHERE outcome IN ('lost', 'failed', 'revoked');

-- One row for each unit that was handed in. Its fate is settled in the transaction that publishes a version.
CREATE TABLE updates (
    task_id bigint PRIMARY KEY REFERENCES tasks,
    lease_id uuid NOT NULL UNIQUE,
    run_id text NOT NULL,
    worker_id text NOT NULL,
    blob_hash text NOT NULL DEFAULT '',
    size_bytes bigint NOT NULL DEFAULT 0,
    codec text NOT NULL DEFAULT '',
    base_version integer NOT NULL,
    steps bigint NOT NULL,
    samples bigint NOT NULL,
    done int8multirange NOT NULL,
    losses jsonb NOT NULL DEFAULT '{}',
    seconds double precision NOT NULL DEFAULT 0,
    bytes_up bigint NOT NULL DEFAULT 0,
    bytes_down bigint NOT NULL DEFAULT 0,
    reported_at timestamptz NOT NULL DEFAULT now(),
    merge_task bigint,
    fate text NOT NULL DEFAULT 'pending' CHECK (fate IN ('pending', 'applied', 'late', 'superseded', 'rejected')),
    fate_reason text NOT NULL DEFAULT '',
    fate_version integer,
    weight real, norm real, cosine real,
    swept boolean NOT NULL DEFAULT false    -- its bytes are gone: the model has them
) WITH (fillfactor = 80, autovacuum_analyze_scale_factor = 0.02, autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX updates_pending ON updates (run_id) WHERE fate = 'pending';
CREATE INDEX updates_to_sweep ON updates (reported_at) WHERE NOT swept;
CREATE INDEX updates_by_worker ON updates (run_id, worker_id, task_id);
CREATE INDEX updates_recent ON updates (run_id, reported_at);

CREATE TABLE versions (
    run_id text NOT NULL REFERENCES runs,
    number integer NOT NULL,
    weights_sha256 text NOT NULL,
    codec text NOT NULL DEFAULT '',
    delta jsonb, snapshot jsonb, state jsonb, -- blobs: {"hash", "size_bytes"}
    applied_samples bigint NOT NULL DEFAULT 0,
    updates integer NOT NULL DEFAULT 0,     -- K
    active integer NOT NULL DEFAULT 0,      -- M
    losses jsonb NOT NULL DEFAULT '{}',
    metrics jsonb NOT NULL DEFAULT '{}',
    reason text NOT NULL DEFAULT '',
    task_id bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, number)
);

CREATE TABLE tastes (
    run_id text NOT NULL REFERENCES runs,
    version integer NOT NULL,
    samples bigint NOT NULL,
    image jsonb,
    metrics jsonb NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run_id, version)
);

CREATE TABLE events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT now(),
    kind text NOT NULL,
    subject text NOT NULL,
    run_id text,
    actor text NOT NULL DEFAULT '',
    text text NOT NULL
);
CREATE INDEX events_by_run ON events (run_id, id);
