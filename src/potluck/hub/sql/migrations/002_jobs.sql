-- Jobs: the second mode. A job is a run with mode 'job', one row beside it in `jobs`, one task of kind 'command' and,
-- for each time it was placed, one lease and one attempt.

ALTER TABLE runs ALTER COLUMN recipe DROP NOT NULL;
ALTER TABLE runs ALTER COLUMN dataset DROP NOT NULL;
ALTER TABLE runs ALTER COLUMN settings DROP NOT NULL;
ALTER TABLE runs ADD CONSTRAINT runs_pool_is_whole
    CHECK (mode <> 'pool' OR (recipe IS NOT NULL AND dataset IS NOT NULL AND settings IS NOT NULL));
ALTER TABLE runs DROP CONSTRAINT runs_state_check;
ALTER TABLE runs ADD CONSTRAINT runs_state_check CHECK (
    CASE mode WHEN 'job'
        THEN state IN ('queued', 'placed', 'preparing', 'running', 'succeeded', 'failed', 'cancelled', 'lost')
        ELSE state IN ('queued', 'running', 'paused', 'finishing', 'done', 'stopped', 'failed')
    END);
ALTER TABLE tasks DROP CONSTRAINT tasks_kind_check;
ALTER TABLE tasks ADD CONSTRAINT tasks_kind_check CHECK (kind IN ('init', 'unit', 'merge', 'taste', 'command'));

-- Upkeep walks through the pool runs that are not over; jobs by the thousand may wait beside them.
DROP INDEX runs_live;
CREATE INDEX runs_live ON runs (created_at)
    WHERE mode = 'pool' AND state IN ('queued', 'running', 'paused', 'finishing');
CREATE INDEX runs_by_name ON runs (name);
CREATE INDEX runs_jobs_ended ON runs (ended_at) WHERE mode = 'job'; -- the newest that ended, on the pages

ALTER TABLE workers
    ADD COLUMN owner text NOT NULL DEFAULT '',      -- the person's id; empty: nobody said
    ADD COLUMN agent text NOT NULL DEFAULT '',      -- the running agent's own id, new at each start
    ADD COLUMN machine jsonb NOT NULL DEFAULT '{}', -- MachineNow, from the newest POST /orders
    ADD COLUMN rules jsonb NOT NULL DEFAULT '{}',   -- Rules
    ADD COLUMN executors jsonb NOT NULL DEFAULT '[]',
    ADD COLUMN labels jsonb NOT NULL DEFAULT '{}',  -- what its owner says
    ADD COLUMN hub_labels jsonb NOT NULL DEFAULT '{}', -- what an admin says: wins
    ADD COLUMN ordered_at timestamptz,              -- the newest POST /orders
    ADD COLUMN hung_up_at timestamptz,              -- its connection ended and it has not come back
    ADD COLUMN draining_at timestamptz;

ALTER TABLE leases
    ADD COLUMN ttl interval,                        -- of a command: its job's patience
    ADD COLUMN agent text NOT NULL DEFAULT '';      -- the agent that has it; empty: not delivered yet

ALTER TABLE blobs ADD COLUMN kept boolean NOT NULL DEFAULT false; -- belongs to a job's tree or point: never swept

CREATE TABLE jobs (
    run_id text PRIMARY KEY REFERENCES runs,
    task_id bigint NOT NULL UNIQUE REFERENCES tasks, -- the one task of this job, leased once an attempt
    owner text NOT NULL,                            -- credentials.subject of the person
    spec jsonb NOT NULL,                            -- JobSpec
    needs jsonb NOT NULL,                           -- domain/resources.py Demand, read once
    project jsonb NOT NULL,                         -- Blob of a Tree
    git jsonb,
    priority integer NOT NULL DEFAULT 0,
    rank double precision,                          -- an admin moved it: before all that have none, smallest first
    queued_at timestamptz NOT NULL DEFAULT now(),   -- its place in the line; a retry gets a new one
    retries_left integer NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    returns integer NOT NULL DEFAULT 0,             -- how often a worker gave it back before it ran
    avoid jsonb NOT NULL DEFAULT '{}',              -- worker id → seconds since 1970 until when it is not tried there
    checkpoint jsonb,                               -- Blob of a Tree: the newest of any attempt
    cancelled_by text,                              -- set as soon as somebody stops it; it stays stopped
    finished boolean NOT NULL DEFAULT false         -- no lease is live, no attempt will follow
) WITH (fillfactor = 70);
CREATE INDEX jobs_open ON jobs (queued_at) WHERE NOT finished;
CREATE INDEX jobs_by_age ON jobs (queued_at);
CREATE INDEX jobs_by_owner ON jobs (owner, queued_at);

CREATE TABLE attempts (
    run_id text NOT NULL REFERENCES runs,
    number integer NOT NULL,
    lease_id uuid NOT NULL UNIQUE,
    worker_id text NOT NULL REFERENCES workers,
    granted jsonb NOT NULL,                         -- what is reserved: domain/placement.py Grant
    state text NOT NULL DEFAULT 'placed'
        CHECK (state IN ('placed', 'preparing', 'running', 'succeeded', 'failed', 'cancelled', 'lost')),
    reason text NOT NULL DEFAULT '',
    executor text NOT NULL DEFAULT '',
    environment jsonb NOT NULL DEFAULT '{}',
    placed_at timestamptz NOT NULL DEFAULT now(),
    prepared_at timestamptz,
    started_at timestamptz,
    ended_at timestamptz,
    exit_code integer,
    signal text NOT NULL DEFAULT '',
    usage jsonb NOT NULL DEFAULT '{}',
    log_bytes bigint NOT NULL DEFAULT 0,
    outputs jsonb,
    checkpoint jsonb,
    PRIMARY KEY (run_id, number)
) WITH (fillfactor = 80);
CREATE INDEX attempts_live ON attempts (worker_id) WHERE ended_at IS NULL;
CREATE INDEX attempts_ended ON attempts (ended_at); -- what was used in the last days

CREATE TABLE points (
    run_id text NOT NULL REFERENCES runs,
    attempt integer NOT NULL,
    seq bigint NOT NULL,
    step bigint NOT NULL,
    at double precision NOT NULL,
    values jsonb NOT NULL DEFAULT '{}',
    images jsonb NOT NULL DEFAULT '{}',
    PRIMARY KEY (run_id, attempt, seq)
);

CREATE TABLE secrets (
    owner text NOT NULL,
    name text NOT NULL,
    sealed bytea NOT NULL,                          -- AES-256-GCM: nonce, ciphertext, tag; the key is not in here
    changed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (owner, name)
);

-- What a person has used, fading: halved every half-life. Charged at placement (an entry fee) and while running.
CREATE TABLE usages (
    owner text PRIMARY KEY,
    amount double precision NOT NULL DEFAULT 0,     -- core-seconds; a GPU counts as many cores
    at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 70);

CREATE TABLE quotas (
    owner text PRIMARY KEY,
    running integer,
    gpu_hours double precision,
    cpu_hours double precision
);
