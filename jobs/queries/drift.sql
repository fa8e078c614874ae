-- How does the score of a layer move over training? Revisions of a model in the order in which they were scored.
-- AVSS as published (block site, pooled recipe, 1e-5): rank by revision, and the change since the one before it.
WITH revisions AS (
    SELECT run_id, model, revision, dtype, corpus, sequence_length, created_at
    FROM runs
    WHERE status = 'done'
    QUALIFY count(DISTINCT revision) OVER (PARTITION BY model, dtype, corpus, sequence_length) > 1
)
SELECT
    r.model,
    s.layer,
    r.revision,
    r.dtype,
    r.corpus,
    s.avss_smoothed,
    s.rank,
    s.rank - lag(s.rank) OVER training AS rank_change,
    s.avss_smoothed / lag(s.avss_smoothed) OVER training AS score_ratio
FROM scores AS s
JOIN revisions AS r USING (run_id)
WHERE s.site = 'block' AND s.recipe = 'pooled' AND s.threshold = 1e-5 AND s.threshold_kind = 'absolute'
WINDOW training AS (PARTITION BY r.model, r.dtype, r.corpus, r.sequence_length, s.layer ORDER BY r.created_at, run_id)
ORDER BY r.model, r.dtype, r.corpus, r.sequence_length, s.layer, r.created_at, run_id
