-- Accounts live longer than one password: they expire, are deleted, and hold several credentials.
ALTER TABLE auth.users DROP CONSTRAINT IF EXISTS users_role_check;
ALTER TABLE auth.users
    ADD CONSTRAINT users_role_check CHECK (role IN ('integrator', 'operator', 'auditor', 'administrator')),
    ALTER COLUMN password_hash DROP NOT NULL,  -- NULL: no way in by password
    ADD COLUMN contact      text CHECK (length(contact) BETWEEN 1 AND 200),
    ADD COLUMN expires_at   timestamptz,
    ADD COLUMN deleted_at   timestamptz,       -- the row stays for the audit trail, without what is personal
    ADD COLUMN valid_after  timestamptz,       -- tokens issued until then are refused
    ADD COLUMN last_used_at timestamptz;

-- What a client proves itself with besides its password: any number, so that one replaces another with an overlap.
CREATE TABLE auth.credentials (
    id           uuid PRIMARY KEY,
    account      uuid NOT NULL REFERENCES auth.users,
    label        text NOT NULL CHECK (length(label) BETWEEN 1 AND 100),
    secret_hash  bytea,                        -- SHA-256 of 256 random bits
    jwk          jsonb,                        -- a public key
    created_at   timestamptz NOT NULL,
    expires_at   timestamptz,
    last_used_at timestamptz,
    CHECK (num_nonnulls(secret_hash, jwk) = 1)
);
CREATE INDEX credentials_account ON auth.credentials (account);

-- Ids of tokens, of credentials and of families of refresh tokens that are refused. A row is of no use once every
-- token that it concerns has expired.
CREATE TABLE auth.revocations (
    id         uuid PRIMARY KEY,
    expires_at timestamptz NOT NULL
);
CREATE INDEX revocations_expire ON auth.revocations (expires_at);

-- Refresh tokens: each is good once, and using one a second time ends its whole family.
CREATE TABLE auth.refresh_tokens (
    hash       bytea PRIMARY KEY,              -- SHA-256 of 256 random bits
    family     uuid NOT NULL,
    account    uuid NOT NULL REFERENCES auth.users,
    credential uuid NOT NULL,                  -- what the first one of the family was given for
    scope      text NOT NULL,
    expires_at timestamptz NOT NULL,           -- the family's: it does not move
    used_at    timestamptz
);
CREATE INDEX refresh_tokens_family ON auth.refresh_tokens (family);
CREATE INDEX refresh_tokens_account ON auth.refresh_tokens (account);
CREATE INDEX refresh_tokens_expire ON auth.refresh_tokens (expires_at);

-- Ids of client assertions that were used (RFC 7523 section 3): each is good once.
CREATE TABLE auth.assertions (
    account    uuid NOT NULL,
    hash       bytea NOT NULL,                 -- SHA-256 of the jti
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (account, hash)
);
CREATE INDEX assertions_expire ON auth.assertions (expires_at);

-- Sessions of staff at the registration service.
CREATE TABLE auth.sessions (
    hash       bytea PRIMARY KEY,              -- SHA-256 of 256 random bits
    account    uuid NOT NULL REFERENCES auth.users,
    expires_at timestamptz NOT NULL
);

-- Ingress signs in and revokes; it registers nobody and changes no account.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_ingress') THEN
        GRANT SELECT ON auth.credentials TO dermflow_ingress;
        GRANT UPDATE (last_used_at) ON auth.users, auth.credentials TO dermflow_ingress;
        GRANT SELECT, INSERT, DELETE ON auth.revocations, auth.assertions TO dermflow_ingress;
        GRANT UPDATE (expires_at) ON auth.revocations TO dermflow_ingress;
        GRANT SELECT, INSERT, DELETE, UPDATE (used_at) ON auth.refresh_tokens TO dermflow_ingress;
    END IF;
END $$;
