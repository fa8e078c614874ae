-- A league of runs: whose lowest 25% of layers stay the same when the shards are resampled?
-- AVSS as published (block site, pooled recipe, 1e-5). certain: mean probability of the chosen layers; 1 is certain.
WITH ranked AS (
    SELECT run_id, model, layer, rank, lowest_set_probability AS p, (avss_high - avss_low) / avss_smoothed AS width,
        count(*) OVER (PARTITION BY run_id) AS layers
    FROM published
)
SELECT
    run_id,
    model,
    round(avg(p) FILTER (rank <= greatest(1, round_even(0.25 * layers, 0))), 3) AS certain,
    count(*) FILTER (p > 0.05 AND p < 0.95) AS unsure_layers,
    round(median(width), 4) AS median_relative_interval
FROM ranked
GROUP BY run_id, model
ORDER BY certain DESC NULLS LAST, unsure_layers, run_id
