//! A weighted addition in plain Rust: the specification.

pub(crate) fn add_scaled(sum: &mut [f32], x: &[f32], factor: f32) {
    for (sum, &x) in sum.iter_mut().zip(x) {
        *sum = x.mul_add(factor, *sum);
    }
}
