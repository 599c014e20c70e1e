-- Registered clients. The schema itself is made by the operator, who owns the database.
CREATE TABLE auth.users (
    id            uuid PRIMARY KEY,
    username      text NOT NULL UNIQUE CHECK (username ~ '^[a-z0-9][a-z0-9._@-]{0,62}$'),
    password_hash text NOT NULL,               -- argon2id in PHC string format
    disabled      boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL
);

-- Ingress checks passwords and can do nothing else here: it cannot register anybody.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_ingress') THEN
        GRANT USAGE ON SCHEMA auth TO dermflow_ingress;
        GRANT SELECT ON auth.users TO dermflow_ingress;
    END IF;
END $$;
