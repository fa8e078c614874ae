-- What did each model cost? Its runs that are done, their tokens and time, and the memory of the largest worker.
SELECT
    model,
    family,
    max(num_parameters) AS num_parameters,
    count(*) AS runs,
    sum(num_tokens)::BIGINT AS num_tokens,
    round(sum(wall_seconds), 1) AS wall_seconds,
    round(median(tokens_per_second), 1) AS tokens_per_second,
    round(max(peak_memory_bytes) / 1e9, 2) AS peak_memory_gb,
    string_agg(DISTINCT partition, ', ' ORDER BY partition) AS partitions,
    string_agg(DISTINCT device, ', ' ORDER BY device) AS devices
FROM runs
WHERE status = 'done'
GROUP BY model, family
ORDER BY wall_seconds DESC, model
