-- What each client has open, kept in the transactions that open and end its jobs: quotas are exact, and a place in
-- the queue is one subtraction. The row also orders a client's ended jobs, as it is locked until they are on disk.
CREATE TABLE ingress.loads (
    client  uuid PRIMARY KEY,
    jobs    bigint NOT NULL DEFAULT 0,         -- open ones
    bytes   bigint NOT NULL DEFAULT 0,         -- of the images of these
    tickets bigint NOT NULL DEFAULT 0,         -- jobs ever accepted
    events  bigint NOT NULL DEFAULT 0          -- jobs ever ended, and lines ever refused
) WITH (fillfactor = 50);

-- Jobs that were submitted together.
CREATE TABLE ingress.batches (
    id         uuid PRIMARY KEY,               -- UUIDv7
    client     uuid NOT NULL,
    key        text,                           -- the Idempotency-Key that it was made with
    created_at timestamptz NOT NULL,
    closed_at  timestamptz,                    -- when an upload reached its end, and none has begun since
    deleted_at timestamptz,
    UNIQUE (client, key)
);

-- Lines of a batch that no job could be made of.
CREATE TABLE ingress.batch_refusals (
    batch     uuid NOT NULL REFERENCES ingress.batches ON DELETE CASCADE,
    event     bigint NOT NULL,                 -- as jobs.event
    line      integer NOT NULL,
    custom_id text,
    error     jsonb NOT NULL,                  -- codes and places, nothing of what was sent
    PRIMARY KEY (batch, event)
);

ALTER TABLE ingress.jobs
    ADD COLUMN bytes     bigint NOT NULL DEFAULT 0,
    ADD COLUMN ticket    bigint NOT NULL DEFAULT 0, -- its number among the client's jobs
    ADD COLUMN event     bigint,               -- its number among the client's ended jobs
    ADD COLUMN batch     uuid,
    ADD COLUMN line      integer,
    ADD COLUMN custom_id text;
CREATE INDEX jobs_client ON ingress.jobs (client, id);
CREATE INDEX jobs_batch ON ingress.jobs (batch, event) WHERE batch IS NOT NULL;
CREATE INDEX jobs_interactive ON ingress.jobs (accepted_at) WHERE finished_at IS NULL AND lane = 'interactive';

INSERT INTO ingress.loads (client, jobs, tickets)
    SELECT client, count(*), count(*) FROM ingress.jobs WHERE finished_at IS NULL GROUP BY client;
