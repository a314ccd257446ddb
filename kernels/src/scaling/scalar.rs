//! Factors and soft caps in plain Rust: the specification.

use crate::math::tanh;

pub(crate) fn scale(x: &mut [f32], factor: f32) {
    for x in x {
        *x *= factor;
    }
}

pub(crate) fn soft_cap(x: &mut [f32], cap: f32) {
    for x in x {
        *x = tanh(*x / cap) * cap;
    }
}
