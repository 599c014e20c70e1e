-- Rates of a client, a minute. NULL: the default of the build.
ALTER TABLE auth.users
    ADD COLUMN quota_requests bigint CHECK (quota_requests >= 1),
    ADD COLUMN quota_images   bigint CHECK (quota_images >= 1);
CREATE INDEX users_with_rates ON auth.users (id) WHERE num_nonnulls(quota_requests, quota_images) > 0;

-- Guesses, by a keyed hash of what they are counted for: an account at one source, an account at all sources that
-- are strange to it, a source. A level sinks with time; a row whose level is 0 again is removed by later logins.
CREATE TABLE auth.login_guesses (
    key           bytea PRIMARY KEY,
    level         double precision NOT NULL,  -- guesses that count at the time `at`
    failures      integer NOT NULL,           -- in a row
    at            timestamptz NOT NULL,
    blocked_until timestamptz NOT NULL,       -- or 'epoch': callers' clocks are not in the order of their turns
    expires_at    timestamptz NOT NULL
);
CREATE INDEX login_guesses_expiry ON auth.login_guesses (expires_at);

-- Where an account signed in from, by a keyed hash of both.
CREATE TABLE auth.login_sources (
    key        bytea PRIMARY KEY,
    account    bytea NOT NULL,                -- a keyed hash of the name
    expires_at timestamptz NOT NULL
);
CREATE INDEX login_sources_account ON auth.login_sources (account, expires_at);
CREATE INDEX login_sources_expiry ON auth.login_sources (expires_at);

-- The level of a key at a time, when `hourly` guesses are forgotten an hour.
CREATE FUNCTION auth.login_level(guesses auth.login_guesses, hourly double precision, now timestamptz)
RETURNS double precision LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(greatest(0, (guesses).level
        - hourly / 3600 * greatest(0, extract(epoch FROM now - (guesses).at))), 0)
$$;

-- Counts one guess for a key whose level has room for it. A guess counts before it is checked, so that those at the
-- same time do not all pass.
CREATE FUNCTION auth.login_count(counted bytea, hourly double precision, now timestamptz)
RETURNS void LANGUAGE sql AS $$
    INSERT INTO auth.login_guesses AS g VALUES (counted, 1, 0, now, 'epoch', now + interval '1 hour' / hourly)
    ON CONFLICT (key) DO UPDATE SET
        level = auth.login_level(g, hourly, now) + 1, at = greatest(now, g.at),
        expires_at = greatest(g.blocked_until,
            greatest(now, g.at) + (auth.login_level(g, hourly, now) + 1) * interval '1 hour' / hourly,
            -- How often in a row is remembered for a day.
            CASE WHEN g.failures > 0 THEN g.expires_at END)
$$;

-- Whether a guess may be checked: `wait` is 0, and it is counted, or the seconds until it may be repeated. The keys are
-- locked in one order: pair, account, source.
CREATE FUNCTION auth.login_admit(
    pair bytea, account bytea, source bytea,
    burst double precision, hourly double precision, source_burst double precision, source_hourly double precision,
    now timestamptz,
    OUT known boolean, OUT wait double precision
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = auth, pg_temp AS $$
DECLARE
    guesses auth.login_guesses;
BEGIN
    -- A crash of the server may forget the guesses of its last second; a login costs others no flush.
    PERFORM set_config('synchronous_commit', 'off', true);
    known := EXISTS (SELECT FROM auth.login_sources s WHERE s.key = pair AND s.expires_at > now);
    -- Who has no row yet could pass in any number at once.
    PERFORM pg_advisory_xact_lock(hashtextextended(encode(CASE WHEN known THEN pair ELSE account END, 'hex'), 0));
    SELECT * INTO guesses FROM auth.login_guesses g WHERE g.key = pair FOR UPDATE;
    wait := greatest(0, extract(epoch FROM guesses.blocked_until - now));
    IF known THEN
        wait := greatest(wait, (auth.login_level(guesses, hourly, now) + 1 - burst) * 3600 / hourly);
    ELSE
        SELECT * INTO guesses FROM auth.login_guesses g WHERE g.key = account FOR UPDATE;
        wait := greatest(wait, (auth.login_level(guesses, hourly, now) + 1 - burst) * 3600 / hourly);
        SELECT * INTO guesses FROM auth.login_guesses g WHERE g.key = source FOR UPDATE;
        wait := greatest(wait,
            (auth.login_level(guesses, source_hourly, now) + 1 - source_burst) * 3600 / source_hourly);
    END IF;
    IF wait > 0 THEN
        RETURN;
    END IF;
    wait := 0;
    PERFORM auth.login_count(pair, hourly, now);
    IF NOT known THEN
        PERFORM auth.login_count(account, hourly, now);
        PERFORM auth.login_count(source, source_hourly, now);
    END IF;
    -- More than a login adds, so that the table never holds much that has expired.
    DELETE FROM auth.login_guesses WHERE key IN (
        SELECT g.key FROM auth.login_guesses g WHERE g.expires_at < now
        ORDER BY g.expires_at LIMIT 8 FOR UPDATE SKIP LOCKED);
    DELETE FROM auth.login_sources WHERE key IN (
        SELECT s.key FROM auth.login_sources s WHERE s.expires_at < now
        ORDER BY s.expires_at LIMIT 2 FOR UPDATE SKIP LOCKED);
END $$;

-- What came of an admitted guess. `wrong`: it stays counted, and from `free` in a row on the next one at this source
-- waits, twice as long each time up to `longest`. `right`: it does not count, and the source is known from now on.
-- `void`: it was not checked.
CREATE FUNCTION auth.login_settle(
    pair bytea, account bytea, source bytea, known boolean, outcome text,
    free integer, longest interval, remembered interval, sources integer, now timestamptz
) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = auth, pg_temp AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    IF outcome = 'wrong' THEN
        UPDATE auth.login_guesses g SET
            failures = g.failures + 1,
            blocked_until = CASE WHEN g.failures + 1 < free THEN g.blocked_until ELSE
                now + least(longest, interval '1 second' * 2 ^ least(g.failures + 1 - free, 20)) END,
            expires_at = now + interval '1 day'
        WHERE g.key = pair;
        RETURN;
    END IF;
    -- In the order of login_admit.
    UPDATE auth.login_guesses g SET level = greatest(0, g.level - 1) WHERE g.key = pair;
    IF NOT known THEN
        UPDATE auth.login_guesses g SET level = greatest(0, g.level - 1) WHERE g.key = account;
        UPDATE auth.login_guesses g SET level = greatest(0, g.level - 1) WHERE g.key = source;
    END IF;
    IF outcome = 'right' THEN
        UPDATE auth.login_guesses g SET failures = 0, blocked_until = 'epoch', expires_at = now + interval '1 hour'
        WHERE g.key = pair;
        INSERT INTO auth.login_sources AS s VALUES (pair, account, now + remembered)
        ON CONFLICT (key) DO UPDATE SET expires_at = excluded.expires_at
            WHERE s.expires_at < excluded.expires_at - interval '1 hour';
        IF NOT known THEN
            DELETE FROM auth.login_sources WHERE key IN (
                SELECT s.key FROM auth.login_sources s WHERE s.account = login_settle.account
                ORDER BY s.expires_at DESC OFFSET sources);
        END IF;
    END IF;
END $$;

-- Stores a stronger hash of the same password, as long as nobody has changed it meanwhile.
CREATE FUNCTION auth.rehash(id uuid, old_hash text, new_hash text) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = auth, pg_temp AS $$
    WITH updated AS (
        UPDATE auth.users u SET password_hash = new_hash
        WHERE u.id = rehash.id AND u.password_hash = old_hash AND new_hash LIKE '$argon2id$%'
        RETURNING 1)
    SELECT EXISTS (SELECT FROM updated)
$$;

REVOKE EXECUTE ON FUNCTION auth.login_level, auth.login_count, auth.login_admit, auth.login_settle, auth.rehash
    FROM PUBLIC;
-- Ingress may count and settle guesses and replace a hash, and touches none of these tables otherwise.
DO $$
BEGIN
    IF EXISTS (SELECT FROM pg_roles WHERE rolname = 'dermflow_ingress') THEN
        GRANT EXECUTE ON FUNCTION auth.login_admit, auth.login_settle, auth.rehash TO dermflow_ingress;
    END IF;
END $$;
