-- Which part of the depth do the lowest 25% of layers come from, in each family?
-- AVSS as published (block site, pooled recipe, 1e-5), runs that are done; early, middle and late are thirds of the depth.
WITH ranked AS (
    SELECT run_id, family, depth, rank, count(*) OVER (PARTITION BY run_id) AS layers
    FROM published
)
SELECT
    family,
    count(DISTINCT run_id) AS runs,
    round(avg(depth), 3) AS mean_depth,
    round(avg((depth < 1 / 3)::INT), 3) AS early,
    round(avg((depth BETWEEN 1 / 3 AND 2 / 3)::INT), 3) AS middle,
    round(avg((depth > 2 / 3)::INT), 3) AS late
FROM ranked
WHERE rank <= greatest(1, round_even(0.25 * layers, 0))
GROUP BY family
ORDER BY family
