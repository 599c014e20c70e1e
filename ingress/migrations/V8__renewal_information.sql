-- When an ACME server wants a certificate renewed (RFC 9773).
ALTER TABLE ingress.acme_certificates
    -- The window that it suggested last, in which renew_at is.
    ADD COLUMN window_start timestamptz,
    ADD COLUMN window_end timestamptz,
    -- When it is asked again; NULL: at once.
    ADD COLUMN ask_at timestamptz;
