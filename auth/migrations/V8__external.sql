-- Which account a subject of an external identity provider is here: staff says so, and nobody else.
CREATE TABLE auth.external_identities (
    id         uuid PRIMARY KEY,
    issuer     text NOT NULL CHECK (length(issuer) BETWEEN 1 AND 255),
    subject    text NOT NULL CHECK (length(subject) BETWEEN 1 AND 255),
    account    uuid NOT NULL REFERENCES auth.users,
    created_at timestamptz NOT NULL,
    UNIQUE (issuer, subject)
);
CREATE INDEX external_identities_account ON auth.external_identities (account);

-- Ingress looks and never links.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_ingress') THEN
        GRANT SELECT ON auth.external_identities TO dermflow_ingress;
    END IF;
END $$;
