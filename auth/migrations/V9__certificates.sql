-- Certificates of clients (RFC 8705), each as the SHA-256 of its DER.
ALTER TABLE auth.users
    ADD COLUMN certificate_bound boolean NOT NULL DEFAULT false;  -- only tokens that are bound to a certificate are good
CREATE INDEX users_certificate_bound ON auth.users (id) WHERE certificate_bound;

-- A family of refresh tokens that was begun with a certificate goes on with that one only.
ALTER TABLE auth.refresh_tokens
    ADD COLUMN certificate bytea CHECK (length(certificate) = 32);

-- A certificate may be what a client proves itself with.
ALTER TABLE auth.credentials
    DROP CONSTRAINT credentials_check,
    ADD COLUMN certificate bytea CHECK (length(certificate) = 32),
    ADD CONSTRAINT credentials_check CHECK (num_nonnulls(secret_hash, jwk, certificate) = 1);
