-- The audit trail: who did what to whose data. Codes, numbers and opaque ids; no image, no token, no password, no
-- name of a person. Rows are only ever added.
CREATE TABLE auth.audit (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at          timestamptz NOT NULL,
    actor_kind  text NOT NULL CHECK (actor_kind IN ('user', 'part', 'unknown')),
    actor       text,                          -- id of a user, or name of a part of the system
    action      text NOT NULL,                 -- the words of dermflow_auth::audit::Action
    outcome     text NOT NULL CHECK (outcome IN ('success', 'refused', 'failed')),
    code        text,                          -- stable error code
    client      uuid,                          -- whose data
    object_kind text,
    object      text,
    source      text,                          -- network address of the caller
    request     uuid,                          -- id of the HTTP request
    detail      jsonb NOT NULL DEFAULT '{}',   -- codes and numbers
    CHECK ((actor IS NULL) = (actor_kind = 'unknown')),
    CHECK ((object IS NULL) = (object_kind IS NULL))
);
CREATE INDEX audit_at ON auth.audit (at, id);
CREATE INDEX audit_actor ON auth.audit (actor, at) WHERE actor IS NOT NULL;
CREATE INDEX audit_object ON auth.audit (object) WHERE object IS NOT NULL;

-- The chain over it: hash = SHA-256(hash of the link before || every column of the event).
CREATE TABLE auth.audit_chain (
    link  bigint PRIMARY KEY,                  -- 1, 2, 3 ... without a gap
    event bigint NOT NULL UNIQUE REFERENCES auth.audit,
    hash  bytea NOT NULL CHECK (length(hash) = 32)
);

-- Where the chain begins after its oldest links were removed under retention.
CREATE TABLE auth.audit_checkpoints (
    link bigint PRIMARY KEY,                   -- the last one that was removed
    hash bytea NOT NULL CHECK (length(hash) = 32),
    at   timestamptz NOT NULL
);

-- Who owns the tables could drop these triggers, but no statement of ours does. The one exception is
-- auth.audit_prune, which says so in a setting of its transaction.
CREATE FUNCTION auth.audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('dermflow.pruning', true) = 'yes' THEN
        RETURN NULL;
    END IF;
    RAISE EXCEPTION '% is append-only', TG_RELID::regclass USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON auth.audit
    FOR EACH STATEMENT EXECUTE FUNCTION auth.audit_is_append_only();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON auth.audit_chain
    FOR EACH STATEMENT EXECUTE FUNCTION auth.audit_is_append_only();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON auth.audit_checkpoints
    FOR EACH STATEMENT EXECUTE FUNCTION auth.audit_is_append_only();
ALTER TABLE auth.audit ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE auth.audit_chain ENABLE ALWAYS TRIGGER append_only;
ALTER TABLE auth.audit_checkpoints ENABLE ALWAYS TRIGGER append_only;

-- Removes the oldest events as long as they are from before `before`, `most` at most, and never the last one. Leaves
-- a checkpoint and an event. Returns how many it removed.
CREATE FUNCTION auth.audit_prune(before timestamptz, most bigint, detail jsonb) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    first   bigint;
    last    bigint;
    removed bigint;
    events  bigint[];
BEGIN
    -- The same lock as the chain's.
    PERFORM pg_advisory_xact_lock(x'6175646974636861'::bigint);
    SELECT min(link) INTO first FROM auth.audit_chain;
    SELECT least(min(link), first + most) - 1 INTO last FROM (
        SELECT c.link FROM auth.audit_chain c JOIN auth.audit e ON e.id = c.event WHERE e.at >= before
        UNION ALL SELECT max(link) FROM auth.audit_chain) kept;
    IF last IS NULL OR last < first THEN
        RETURN 0;
    END IF;
    INSERT INTO auth.audit_checkpoints SELECT link, hash, date_trunc('milliseconds', now())
        FROM auth.audit_chain WHERE link = last;
    PERFORM set_config('dermflow.pruning', 'yes', true);
    events := ARRAY(SELECT event FROM auth.audit_chain WHERE link <= last);
    DELETE FROM auth.audit_chain WHERE link <= last;
    DELETE FROM auth.audit WHERE id = ANY(events);
    GET DIAGNOSTICS removed = ROW_COUNT;
    PERFORM set_config('dermflow.pruning', 'no', true);
    INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, detail)
        VALUES (date_trunc('milliseconds', now()), 'part', 'auth', 'trail-pruned', 'success',
                detail || jsonb_build_object('link', last, 'events', removed));
    RETURN removed;
END $$;
REVOKE EXECUTE ON FUNCTION auth.audit_prune FROM PUBLIC;

-- Auditors read the trail, and nothing else.
ALTER TABLE auth.users
    DROP CONSTRAINT users_role_check,
    ADD CONSTRAINT users_role_check CHECK (role IN ('integrator', 'operator', 'auditor'));

-- Ingress adds events, chains them and shows them.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_ingress') THEN
        GRANT SELECT, INSERT ON auth.audit, auth.audit_chain TO dermflow_ingress;
    END IF;
END $$;
