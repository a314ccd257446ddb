//! CPU kernels of Tandem: slices in, slices out.
