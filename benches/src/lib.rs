//! Micro benchmarks of kernels and engine.

pub mod roofline;
