//! Rotary embedding in plain Rust: the specification.

pub(crate) fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(head.len() / 2);
    for (((a, b), &cos), &sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        let (x, y) = (*a, *b);
        *a = x.mul_add(cos, -(y * sin));
        *b = y.mul_add(cos, x * sin);
    }
}
