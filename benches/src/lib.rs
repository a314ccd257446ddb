//! Micro benchmarks of kernels and engine.
