-- What SQL has beside DuckDB's own functions: scores at any threshold, from the counts of layer_stats.
CREATE TEMP MACRO bin_edge(bin) AS
    CASE WHEN bin < 8 THEN bin * pow(2.0, -129) ELSE pow(2.0, bin // 8 - 127) * (1 + (bin % 8) / 8) END;

CREATE TEMP MACRO cut_width(value) AS
    pow(2.0, floor(log2(greatest(value, pow(2.0, -126)))) - 7);

CREATE TEMP MACRO sparsity_at(value, kind := 'absolute') AS TABLE
WITH placed AS (
    SELECT *, CASE kind WHEN 'absolute' THEN value::DOUBLE WHEN 'rms' THEN value * sqrt(m2 / count + mean ** 2)
        ELSE error('kind is absolute or rms, not ' || kind) END AS absolute_threshold
    FROM layer_stats
),
binned AS (
    SELECT *, abs_value::DOUBLE[] AS edges, abs_value_count AS counts,
        len(list_filter(edges, lambda e: e < absolute_threshold)) AS begun,
        edges[begun] AS edge,
        CASE WHEN abs_value_cut THEN cut_width(edge) ELSE 0 END AS width
    FROM placed
),
bounded AS (
    SELECT *, near_zero[list_position(thresholds, absolute_threshold)] AS counted,
        coalesce(counted, list_sum(counts[:begun - (absolute_threshold < edge + width)::INT]), 0)::DOUBLE AS low,
        coalesce(counted, list_sum(counts[:begun]), 0)::DOUBLE AS high
    FROM binned
)
SELECT
    run_id, model, revision, family, layer, layer_name, depth, site,
    value::DOUBLE AS threshold,
    kind AS threshold_kind,
    absolute_threshold,
    count,
    CASE WHEN low < high THEN low + (absolute_threshold - edge) / width * (high - low) ELSE low END AS near_zero_count,
    near_zero_count / nullif(count, 0) AS sparsity,
    CASE WHEN low < high THEN 'interpolated' ELSE 'exact' END AS exactness,
    low AS near_zero_low,
    high AS near_zero_high
FROM bounded;

CREATE TEMP MACRO scores_at(value, kind := 'absolute') AS TABLE
WITH measured AS (
    SELECT a.*, l.m2, l.nonfinite_count, l.pooled_variance_sum, l.sequence_count, l.unit_sum, l.unit_count,
        min(len(l.unit_sum)) OVER (PARTITION BY l.run_id, l.site) AS units
    FROM sparsity_at(value, kind := kind) AS a
    JOIN layer_stats AS l ON (l.run_id, l.layer, l.site) = (a.run_id, a.layer, a.site)
),
recipes AS (
    SELECT * EXCLUDE (sparsity), 'pooled' AS recipe, pooled_variance_sum / nullif(sequence_count, 0) AS variance
    FROM measured
    UNION ALL BY NAME
    SELECT * EXCLUDE (sparsity), 'element' AS recipe, m2 / nullif(count, 0) AS variance
    FROM measured
    UNION ALL BY NAME
    SELECT * EXCLUDE (sparsity) REPLACE (
            CASE WHEN unit_count > 0 THEN len(unit_sum) ELSE 0 END AS count,
            len(list_filter(unit_sum, lambda s: abs(s / unit_count) < absolute_threshold))::DOUBLE AS near_zero_count,
            'exact' AS exactness,
            len(list_filter(unit_sum, lambda s: abs(s / unit_count) < absolute_threshold))::DOUBLE AS near_zero_low,
            len(list_filter(unit_sum, lambda s: abs(s / unit_count) < absolute_threshold))::DOUBLE AS near_zero_high
        ),
        'unit' AS recipe, list_var_pop(list_transform(unit_sum, lambda s: s / nullif(unit_count, 0))) AS variance
    FROM measured
    WHERE units > 0
),
smoothed AS (
    SELECT *, near_zero_count / nullif(count, 0) AS sparsity,
        CASE WHEN count > 0 THEN (near_zero_count + 0.5) / (count + 1) END AS smoothed_sparsity,
        variance / nullif(sum(variance) OVER layers, 0) AS nav,
        sparsity / nullif(sum(sparsity) OVER layers, 0) AS nas,
        nav / (smoothed_sparsity / sum(smoothed_sparsity) OVER layers) AS avss_smoothed,
        CASE WHEN coalesce(nonfinite_count, 0) = 0 THEN avss_smoothed END AS ranked_score
    FROM recipes
    WINDOW layers AS (PARTITION BY run_id, site, recipe)
)
SELECT
    run_id, model, revision, family, layer, layer_name, depth, site, recipe, threshold, threshold_kind, count,
    near_zero_count, exactness, near_zero_low, near_zero_high, variance, sparsity, nav, nas,
    CASE WHEN near_zero_count > 0 THEN nav / nas END AS avss,
    avss_smoothed,
    CASE WHEN ranked_score IS NOT NULL THEN
        row_number() OVER (PARTITION BY run_id, site, recipe ORDER BY ranked_score NULLS LAST, layer) END AS rank,
    CASE WHEN near_zero_count = 0 THEN 'zero_sparsity' WHEN near_zero_count < 100 THEN 'noisy_sparsity' ELSE 'ok' END
        AS quality
FROM smoothed
ORDER BY run_id, site, recipe, layer;

CREATE TEMP MACRO removals(layers, parts) AS
    list_concat(layers::VARCHAR[], parts);
