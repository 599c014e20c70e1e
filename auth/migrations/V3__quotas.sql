-- What a client may have open at once, and its share of the workers. NULL: the default of the build.
ALTER TABLE auth.users
    ADD COLUMN quota_jobs    bigint   CHECK (quota_jobs >= 0),
    ADD COLUMN quota_bytes   bigint   CHECK (quota_bytes >= 0),
    ADD COLUMN quota_running bigint   CHECK (quota_running >= 1),
    ADD COLUMN weight        smallint CHECK (weight BETWEEN 1 AND 100);
CREATE INDEX users_exceptional ON auth.users (id)
    WHERE disabled OR num_nonnulls(quota_jobs, quota_bytes, quota_running, weight) > 0;
