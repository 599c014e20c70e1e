-- Whose reports they are, for searches. What a caller says of the patient and of its order is only here as keyed digests:
-- HMAC-SHA-256, cut to 16 bytes, of the client, what it is, and the text.
CREATE TABLE ingress.search_keys (
    id          uuid PRIMARY KEY,              -- UUIDv7: the latest that opens makes new digests, all of them are looked for
    sealing_key text NOT NULL,
    secret      bytea NOT NULL                 -- AES-256-GCM, bound to the id
);
-- Until there is a report. Jobs from before have none, and are found by everything but the patient and the order.
ALTER TABLE ingress.jobs ADD COLUMN search bytea[];
CREATE TABLE ingress.report_tokens (
    client uuid NOT NULL,
    token  bytea NOT NULL,
    job    uuid NOT NULL REFERENCES ingress.reports ON DELETE CASCADE,
    PRIMARY KEY (client, token, job)
);
CREATE INDEX report_tokens_job ON ingress.report_tokens (job);

CREATE OR REPLACE FUNCTION ingress.sealed_with(sealing text)
    RETURNS TABLE (key_id text, reports bigint, unopened bigint, secrets bigint)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog AS $$
    SELECT key_id, sum(reports)::bigint, sum(unopened)::bigint, sum(secrets)::bigint FROM (
        SELECT key_id, count(*) AS reports, 0 AS unopened, 0 AS secrets FROM ingress.reports GROUP BY key_id
        UNION ALL SELECT key_id, 0, count(*), 0 FROM ingress.reports
            WHERE unopened IS NOT NULL AND unopened = sealing AND key_id <> sealing GROUP BY key_id
        UNION ALL SELECT sealing_key, 0, 0, count(*) FROM ingress.acme_accounts GROUP BY sealing_key
        UNION ALL SELECT sealing_key, 0, 0, count(*) FROM ingress.acme_certificates
            WHERE sealing_key IS NOT NULL GROUP BY sealing_key
        UNION ALL SELECT sealing_key, 0, 0, count(*) FROM ingress.search_keys GROUP BY sealing_key
    ) AS counts GROUP BY key_id ORDER BY key_id
$$;
