"""The Parquet warehouse: schema, store, reader (SQL), cache."""
