-- The record of jobs. Images are never here; reports are sealed. The schema itself is made by the operator.
CREATE TABLE ingress.jobs (
    id          uuid PRIMARY KEY,              -- UUIDv7: sorts by time of acceptance; the report has the same id
    client      uuid NOT NULL,
    lane        text NOT NULL,
    state       text NOT NULL CHECK (state IN ('accepted', 'queued', 'running', 'succeeded', 'failed', 'cancelled')),
    images      smallint NOT NULL,
    attempts    integer NOT NULL DEFAULT 0,
    accepted_at timestamptz NOT NULL,
    queued_at   timestamptz,
    started_at  timestamptz,                   -- of the last attempt
    finished_at timestamptz,
    deadline    timestamptz NOT NULL,
    stream_seq  bigint,                        -- where the payload waits in JOBS
    claim_check boolean NOT NULL,              -- the payload is in the object store
    model_us    bigint,
    failure     jsonb,                         -- code, and the image at fault
    deleted_at  timestamptz,                   -- the client had the result removed
    CHECK ((finished_at IS NOT NULL) = (state IN ('succeeded', 'failed', 'cancelled'))),
    CHECK ((failure IS NOT NULL) = (state = 'failed'))
);
CREATE INDEX jobs_open ON ingress.jobs (deadline) WHERE finished_at IS NULL;
CREATE INDEX jobs_finished ON ingress.jobs (finished_at) WHERE finished_at IS NOT NULL;

-- Which request a client's Idempotency-Key stands for. Claimed in the transaction that records the job.
CREATE TABLE ingress.idempotency_keys (
    client uuid NOT NULL,
    key    text NOT NULL,
    digest bytea NOT NULL,                     -- SHA-256 of the decoded request
    job    uuid NOT NULL REFERENCES ingress.jobs ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY (client, key)
);
CREATE INDEX idempotency_keys_job ON ingress.idempotency_keys (job);

CREATE TABLE ingress.reports (
    job    uuid PRIMARY KEY REFERENCES ingress.jobs ON DELETE CASCADE,
    key_id text NOT NULL,
    sealed bytea NOT NULL                      -- AES-256-GCM, bound to the job's id
);

-- What a client is billed for: jobs with a report, counted in the transaction that records it.
CREATE TABLE ingress.usage (
    client uuid NOT NULL,
    day    date NOT NULL,                      -- UTC
    jobs   bigint NOT NULL,
    images bigint NOT NULL,
    PRIMARY KEY (client, day)
);
