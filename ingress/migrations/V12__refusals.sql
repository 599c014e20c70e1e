-- A refused line takes the place of the one before it, of its name or, without one, of its number.
CREATE INDEX batch_refusals_lines ON ingress.batch_refusals (batch, custom_id, line);
