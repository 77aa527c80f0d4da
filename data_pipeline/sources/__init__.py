"""Where structures come from: one module a source, each yielding raw tables (data_pipeline.sources.raw)."""
