-- Where do the recipes disagree? Spearman correlations of their ranks over layers, for each run and site; lowest first.
-- Near zero means abs(x) < 1e-5. A recipe that a site does not have gives null.
WITH ranked AS (
    SELECT
        run_id,
        site,
        layer,
        max(rank) FILTER (recipe = 'pooled') AS pooled,
        max(rank) FILTER (recipe = 'element') AS element,
        max(rank) FILTER (recipe = 'unit') AS unit
    FROM scores
    WHERE threshold = 1e-5 AND threshold_kind = 'absolute'
    GROUP BY run_id, site, layer
),
correlated AS (
    SELECT
        run_id,
        site,
        round(corr(pooled, element), 3) AS pooled_element,
        round(corr(pooled, unit), 3) AS pooled_unit,
        round(corr(element, unit), 3) AS element_unit
    FROM ranked
    GROUP BY run_id, site
)
SELECT run_id, model, site, pooled_element, pooled_unit, element_unit
FROM correlated
JOIN runs USING (run_id)
ORDER BY least(pooled_element, pooled_unit, element_unit) NULLS LAST, run_id, site
