-- The audit trail is auth's now: auth.audit, which `auth migrate` makes. What was recorded here goes along; it is
-- recorded there now, so the time at which it happened is in the detail.
DO $$
BEGIN
    IF EXISTS (SELECT FROM ingress.audit) THEN
        INSERT INTO auth.audit (at, actor_kind, actor, action, outcome, client, object_kind, object, detail)
            SELECT date_trunc('milliseconds', now()),
                   CASE WHEN actor ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' THEN 'user' ELSE 'part' END,
                   actor, action, 'success', client, CASE WHEN job IS NOT NULL THEN 'job' END, job::text,
                   detail || jsonb_build_object('moved', true, 'at', at)
            FROM ingress.audit ORDER BY id;
    END IF;
END $$;
DROP TABLE ingress.audit;
DROP FUNCTION ingress.audit_is_append_only();
