-- What replicas share about the certificate that an ACME server issues: one of them at a time renews it, all serve it.
CREATE TABLE ingress.acme_certificates (
    -- Sorted, with commas between them.
    names text PRIMARY KEY,
    -- PEM.
    chain text,
    sealing_key text,
    private_key bytea,
    issued_at timestamptz,
    not_after timestamptz,
    renew_at timestamptz,
    -- The replica that renews it, and until when nobody else does.
    holder uuid,
    held_until timestamptz,
    -- Tries since the last success.
    failures integer NOT NULL DEFAULT 0,
    retry_at timestamptz,
    failed_at timestamptz,
    error text
);
CREATE TABLE ingress.acme_accounts (
    directory text PRIMARY KEY,
    sealing_key text NOT NULL,
    credentials bytea NOT NULL,
    created_at timestamptz NOT NULL
);
CREATE TABLE ingress.acme_challenges (
    names text NOT NULL REFERENCES ingress.acme_certificates ON DELETE CASCADE,
    name text NOT NULL,
    token text NOT NULL,
    key_authorization text NOT NULL,
    PRIMARY KEY (names, name)
);
