-- The uploads to a batch that go on, and when each was last seen: one that is counted by name ends once, and nobody else's
-- place. Those of an ingress that dies do not end, and stay with their batch. The columns of V11, which count them without
-- names, stay for replicas of the version before.
CREATE TABLE ingress.uploads (
    id      uuid PRIMARY KEY,                  -- UUIDv7
    batch   uuid NOT NULL REFERENCES ingress.batches ON DELETE CASCADE,
    seen_at timestamptz NOT NULL
);
CREATE INDEX uploads_batch ON ingress.uploads (batch);
