-- Gangs: the third mode. A gang is a run with mode 'gang', one row beside it in `gangs`, and one job for each member:
-- those have jobs.gang and jobs.member. What the workers know of one another's addresses is in `reaches`.

ALTER TABLE runs DROP CONSTRAINT runs_state_check;
ALTER TABLE runs ADD CONSTRAINT runs_state_check CHECK (
    CASE mode
        WHEN 'job' THEN state IN ('queued', 'placed', 'preparing', 'running', 'succeeded', 'failed', 'cancelled', 'lost')
        WHEN 'gang' THEN state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')
        ELSE state IN ('queued', 'running', 'paused', 'finishing', 'done', 'stopped', 'failed')
    END);

CREATE TABLE gangs (
    run_id text PRIMARY KEY REFERENCES runs,
    owner text NOT NULL,                            -- credentials.subject of the person
    spec jsonb NOT NULL,                            -- JobSpec, the same for all members
    project jsonb NOT NULL,                         -- Blob of a Tree
    least integer NOT NULL,
    most integer NOT NULL,
    compat boolean NOT NULL,
    engine text NOT NULL DEFAULT '',                -- torchft | plain | compat; empty: not formed
    formed_at timestamptz,                          -- since then at least one member has had a place; NULL: not formed
    host uuid,                                      -- the lease of the member whose agent keeps the meeting place
    host_since timestamptz,
    turn integer NOT NULL DEFAULT 0,                -- grows with each new host
    address text NOT NULL DEFAULT '',               -- of the meeting place; empty: the host has not said it yet
    own_failures integer NOT NULL DEFAULT 0,        -- since it was formed: attempts that failed by themselves
    misfortunes integer NOT NULL DEFAULT 0,         -- since it was formed: attempts that ended by a signal, with their worker, …
    hurt_at timestamptz,                            -- the first of either
    due boolean NOT NULL DEFAULT false,             -- something happened to a member: somebody has to look at the gang
    exit_code integer,
    cancelled_by text,
    finished boolean NOT NULL DEFAULT false
) WITH (fillfactor = 70);
CREATE INDEX gangs_due ON gangs (run_id) WHERE due AND NOT finished;
CREATE INDEX gangs_formed ON gangs (run_id) WHERE formed_at IS NOT NULL AND NOT finished;
CREATE INDEX gangs_by_owner ON gangs (owner) WHERE NOT finished;
CREATE INDEX runs_gangs ON runs (created_at) WHERE mode = 'gang';

ALTER TABLE jobs
    ADD COLUMN gang text REFERENCES gangs,          -- whose member it is
    ADD COLUMN member integer NOT NULL DEFAULT 0,   -- from 1
    ADD COLUMN held_back timestamptz;               -- it failed by itself a moment ago: it is placed again after this
CREATE INDEX jobs_of_gang ON jobs (gang, member) WHERE gang IS NOT NULL;

ALTER TABLE attempts ADD COLUMN address text NOT NULL DEFAULT ''; -- of a gang's member: how the others reach its machine

ALTER TABLE workers
    ADD COLUMN door jsonb,                          -- Door; NULL: no other worker can try to reach it
    ADD COLUMN must_knock boolean NOT NULL DEFAULT false; -- it has something to do in `reaches`

-- Which door this is: an agent that was started again has another one.
CREATE FUNCTION door_mark(door jsonb) RETURNS text
    LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURNS NULL ON NULL INPUT
    RETURN md5((door ->> 'key') || ':' || (door ->> 'port'));

-- What came of it when one worker knocked at another's door.
CREATE TABLE reaches (
    source text NOT NULL REFERENCES workers,
    target text NOT NULL REFERENCES workers,
    door text NOT NULL,                             -- door_mark of the target's, when it was wanted or told: the finding is about it
    address text NOT NULL DEFAULT '',               -- that worked; empty: none did
    rtt_s double precision NOT NULL DEFAULT 0,
    bytes_per_s double precision NOT NULL DEFAULT 0,
    reason text NOT NULL DEFAULT '',                -- why none did
    at timestamptz,                                 -- when it was found out; NULL: not yet
    wanted_at timestamptz,                          -- the source shall find out; NULL: it need not
    told_at timestamptz,                            -- when the source was told to
    PRIMARY KEY (source, target)
) WITH (fillfactor = 70);
CREATE INDEX reaches_wanted ON reaches (source) WHERE wanted_at IS NOT NULL;
CREATE INDEX reaches_by_target ON reaches (target);
