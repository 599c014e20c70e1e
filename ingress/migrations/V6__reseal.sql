-- Which reports are sealed with which key.
CREATE INDEX reports_key ON ingress.reports (key_id, job);
-- The key that a report was to be sealed with anew when it did not open: it is tried again when the next one seals.
ALTER TABLE ingress.reports ADD COLUMN unopened text;
CREATE INDEX reports_unopened ON ingress.reports (key_id) WHERE unopened IS NOT NULL;

-- What `auth keys` sees of what is sealed: ids of keys, numbers, ids of jobs.
CREATE FUNCTION ingress.sealed_with(sealing text)
    RETURNS TABLE (key_id text, reports bigint, unopened bigint, secrets bigint)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT key_id, sum(reports)::bigint, sum(unopened)::bigint, sum(secrets)::bigint FROM (
        SELECT key_id, count(*) AS reports, 0 AS unopened, 0 AS secrets FROM ingress.reports GROUP BY key_id
        UNION ALL SELECT key_id, 0, count(*), 0 FROM ingress.reports
            WHERE unopened IS NOT NULL AND unopened = sealing AND key_id <> sealing GROUP BY key_id
        UNION ALL SELECT sealing_key, 0, 0, count(*) FROM ingress.acme_accounts GROUP BY sealing_key
        UNION ALL SELECT sealing_key, 0, 0, count(*) FROM ingress.acme_certificates
            WHERE sealing_key IS NOT NULL GROUP BY sealing_key
    ) AS counts GROUP BY key_id ORDER BY key_id
$$;
-- Jobs whose report is sealed with none of `keys`, or did not open when it was to be sealed with `sealing`; those after
-- `after`, `most` at most.
CREATE FUNCTION ingress.unreadable(keys text[], sealing text, after uuid, most bigint) RETURNS SETOF uuid
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT job FROM ingress.reports
    WHERE (key_id <> ALL (keys) OR (unopened = sealing AND key_id <> sealing)) AND job > after
    ORDER BY job LIMIT most
$$;
-- Jobs that were accepted before `moment` and whose payload may be needed: they have not ended, or an operator may put them
-- back into the queue.
CREATE FUNCTION ingress.unsettled_before(moment timestamptz) RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT count(*) FROM ingress.jobs WHERE accepted_at < moment AND state NOT IN ('succeeded', 'cancelled')
$$;
REVOKE EXECUTE ON FUNCTION ingress.sealed_with, ingress.unreadable, ingress.unsettled_before FROM PUBLIC;
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_auth') THEN
        GRANT USAGE ON SCHEMA ingress TO dermflow_auth;
        GRANT EXECUTE ON FUNCTION ingress.sealed_with, ingress.unreadable, ingress.unsettled_before TO dermflow_auth;
    END IF;
END $$;
