-- What is still to be removed of deleted batches, without those jobs whose reports are.
CREATE INDEX jobs_undeleted ON ingress.jobs (batch, id)
    WHERE batch IS NOT NULL AND finished_at IS NOT NULL AND deleted_at IS NULL;
