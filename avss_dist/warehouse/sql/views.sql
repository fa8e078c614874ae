-- Rows of the tables that most questions are about, without a number to compare.
CREATE TEMP VIEW published AS
SELECT *
FROM scores
WHERE site = 'block' AND recipe = 'pooled' AND threshold_kind = 'absolute' AND threshold = 1e-5;

CREATE TEMP VIEW latest AS
SELECT *
FROM runs
WHERE status = 'done'
QUALIFY row_number() OVER (PARTITION BY model, revision, corpus ORDER BY created_at DESC, run_id DESC) = 1;

CREATE TEMP VIEW layers AS
SELECT p.*, r.* EXCLUDE (run_id, model, revision, family)
FROM published AS p
JOIN latest AS r USING (run_id);
