-- When the report of a client that has none kept was first handed out. It is removed a while after.
ALTER TABLE ingress.jobs ADD COLUMN answered_at timestamptz;
CREATE INDEX jobs_answered ON ingress.jobs (answered_at) WHERE answered_at IS NOT NULL;
-- What is past its client's retention.
CREATE INDEX jobs_client_finished ON ingress.jobs (client, finished_at) WHERE finished_at IS NOT NULL;
-- The clients are those of this table; jobs may be older than it.
INSERT INTO ingress.loads (client) SELECT DISTINCT client FROM ingress.jobs ON CONFLICT DO NOTHING;
