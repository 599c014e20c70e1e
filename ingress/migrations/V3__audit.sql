-- What was done to jobs and to the queue by others than workers, and by whom. Nothing personal is in it.
CREATE TABLE ingress.audit (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at     timestamptz NOT NULL,
    actor  text NOT NULL,                      -- 'sweeper', 'ingress', or the id of a user
    action text NOT NULL,
    client uuid,                               -- whose job it was
    job    uuid,
    detail jsonb NOT NULL
);
CREATE INDEX audit_job ON ingress.audit (job) WHERE job IS NOT NULL;

-- Entries are only ever added. Who owns the table could drop these triggers, but no statement of ours does.
CREATE FUNCTION ingress.audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'ingress.audit is append-only' USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ingress.audit
    FOR EACH STATEMENT EXECUTE FUNCTION ingress.audit_is_append_only();
ALTER TABLE ingress.audit ENABLE ALWAYS TRIGGER append_only;

-- Dead letters that went back into the queue.
ALTER TABLE ingress.jobs
    ADD COLUMN requeues        integer NOT NULL DEFAULT 0,     -- how often
    ADD COLUMN requeue_of      bigint,                         -- sequence of the last one in DEAD
    ADD COLUMN requeue_pending boolean NOT NULL DEFAULT false, -- it is not yet in JOBS and out of DEAD
    ADD COLUMN purged_at       timestamptz;                    -- an operator had its payload removed
CREATE INDEX jobs_requeue_of ON ingress.jobs (requeue_of) WHERE requeue_of IS NOT NULL;
CREATE INDEX jobs_requeue_pending ON ingress.jobs (id) WHERE requeue_pending;
CREATE INDEX jobs_purged ON ingress.jobs (id) WHERE purged_at IS NOT NULL AND claim_check;
-- Where open jobs wait: which messages are missing, and whose.
CREATE INDEX jobs_stream_seq ON ingress.jobs (stream_seq) WHERE finished_at IS NULL;
