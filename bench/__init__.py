"""flockwire's benchmarks: a load generator in C, the peers beside which we are measured, and the tables."""
