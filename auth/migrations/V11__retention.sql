-- Days that a client's reports are kept after the job's end; 0: no longer than the answer. NULL: the default of the build.
ALTER TABLE auth.users ADD COLUMN retention_days smallint CHECK (retention_days BETWEEN 0 AND 365);
CREATE INDEX users_with_retention ON auth.users (id) WHERE retention_days IS NOT NULL;
