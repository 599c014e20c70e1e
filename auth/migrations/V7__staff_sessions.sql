-- A session of staff is good with the certificate that it was opened with, for as long as it is used. There has been
-- none before this.
ALTER TABLE auth.sessions
    ADD COLUMN certificate  bytea       NOT NULL CHECK (length(certificate) = 32), -- SHA-256 of its DER
    ADD COLUMN created_at   timestamptz NOT NULL,
    ADD COLUMN last_used_at timestamptz NOT NULL;                                  -- to the minute
CREATE INDEX sessions_account ON auth.sessions (account, created_at);
CREATE INDEX sessions_expire ON auth.sessions (expires_at);
