-- How does the score of a layer move over training? The checkpoints of a series in the order of their steps (or tokens),
-- the revisions of a model whose names have none in the order in which they were scored.
-- It takes two revisions of a series, on the same text and with the same settings.
-- AVSS as published (block site, pooled recipe, 1e-5): rank by checkpoint, and the change since the one before it.
WITH checkpoints AS (
    SELECT
        run_id, coalesce(series, model) AS series, revision, coalesce(revision_name, revision) AS revision_name,
        training_step, training_tokens, dtype, corpus, sequence_length, created_at
    FROM runs
    WHERE status = 'done'
    QUALIFY count(DISTINCT revision) OVER (PARTITION BY coalesce(series, model), dtype, corpus, sequence_length) > 1
)
SELECT
    c.series,
    s.layer,
    c.revision_name,
    c.training_step,
    c.training_tokens,
    c.dtype,
    c.corpus,
    s.avss_smoothed,
    s.rank,
    s.rank - lag(s.rank) OVER training AS rank_change,
    s.avss_smoothed / lag(s.avss_smoothed) OVER training AS score_ratio
FROM published AS s
JOIN checkpoints AS c USING (run_id)
WINDOW training AS (
    PARTITION BY c.series, c.dtype, c.corpus, c.sequence_length, s.layer
    ORDER BY c.training_step, c.training_tokens, c.created_at, run_id
)
ORDER BY
    c.series, c.dtype, c.corpus, c.sequence_length, s.layer,
    c.training_step, c.training_tokens, c.created_at, run_id
