-- How many uploads to a batch go on, and when one of them was last seen: those of an ingress that dies do not end.
ALTER TABLE ingress.batches
    ADD COLUMN uploads        integer NOT NULL DEFAULT 0,
    ADD COLUMN upload_seen_at timestamptz;
