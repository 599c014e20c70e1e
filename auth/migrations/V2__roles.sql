-- What a user is for; it decides the scope of the user's tokens.
ALTER TABLE auth.users
    ADD COLUMN role text NOT NULL DEFAULT 'integrator' CHECK (role IN ('integrator', 'operator'));
