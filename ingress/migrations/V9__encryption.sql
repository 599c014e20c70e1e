-- What `auth encryption` sees: how ingress's own connections are encrypted, and whether what is to be sealed is.
--
-- A function of ingress's own role sees that role's connections and no other's. What another role has put into pg_temp is
-- looked for last, as it is looked for first where it is not named.
CREATE FUNCTION ingress.connections() RETURNS TABLE (version text, on_network boolean, number bigint)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT ssl.version, activity.client_addr IS NOT NULL, count(*)
    FROM pg_catalog.pg_stat_activity AS activity JOIN pg_catalog.pg_stat_ssl AS ssl USING (pid)
    WHERE activity.usename = current_user GROUP BY 1, 2
$$;
-- Reports that begin as one does that is not sealed.
CREATE FUNCTION ingress.reports_in_clear() RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT count(*) FROM ingress.reports
    WHERE position('"resourceType"'::pg_catalog.bytea IN substring(sealed FROM 1 FOR 256)) > 0
$$;
-- Accounts at ACME servers, and keys of certificates, that are a text: JSON or PEM.
CREATE FUNCTION ingress.secrets_in_clear() RETURNS bigint
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (SELECT count(*) FROM ingress.acme_accounts WHERE substring(credentials FROM 1 FOR 2) = '{"'::pg_catalog.bytea)
         + (SELECT count(*) FROM ingress.acme_certificates
            WHERE substring(private_key FROM 1 FOR 10) = '-----BEGIN'::pg_catalog.bytea
               OR (private_key IS NOT NULL AND sealing_key IS NULL))
$$;
-- The same for those from before.
ALTER FUNCTION ingress.sealed_with SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION ingress.unreadable SET search_path = pg_catalog, pg_temp;
ALTER FUNCTION ingress.unsettled_before SET search_path = pg_catalog, pg_temp;
REVOKE EXECUTE ON FUNCTION ingress.connections, ingress.reports_in_clear, ingress.secrets_in_clear FROM PUBLIC;
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_auth') THEN
        GRANT EXECUTE ON FUNCTION ingress.connections, ingress.reports_in_clear, ingress.secrets_in_clear
            TO dermflow_auth;
    END IF;
END $$;
