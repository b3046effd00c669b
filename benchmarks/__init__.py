"""Programs that measure: time and memory as scripts, quality as ``python -m benchmarks.quality``."""
