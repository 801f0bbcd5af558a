"""Benchmarks and scripts for results. A package, so that `benchmarks` is never imported from elsewhere."""
