//! Loops the compiler can vectorise: run-time choice of AVX2, an exponential without a call, and
//! reductions over a fixed number of lanes.
//!
//! Nothing here fuses a multiply with an add or re-orders a sum by instruction set, so results are
//! the same bits on every machine.

const LANES: usize = 16;

/// Runs `kernel` compiled for AVX2 where the processor has it.
#[inline(always)]
pub(crate) fn vectorized<R>(kernel: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = pulp::x86::V3::try_new() {
        return avx2.vectorize(kernel);
    }
    kernel()
}

/// `e^x` to about 2 ulp for `x` in -87..88, saturating outside; NaN stays NaN. Cephes' `expf`:
/// range reduction by ln 2 in two parts, a degree-5 polynomial, the exponent added as bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, whose low bits are then the mantissa's.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let p = p * r * r + r + 1.0;
    f32::from_bits((shifted.to_bits() << 23).wrapping_add(p.to_bits()))
}

#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    let mut lanes = lanes;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (x, y) in a_chunks.iter().zip(b_chunks) {
        for i in 0..LANES {
            lanes[i] += x[i] * y[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(x, y)| x * y).sum();
    fold(lanes) + rest
}

#[inline(always)]
pub(crate) fn max(xs: &[f32]) -> f32 {
    let (chunks, rest) = xs.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in chunks {
        for i in 0..LANES {
            lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |best, &x| if x > best { x } else { best })
}

/// Replaces every `x` by `e^(scale * x - shift)` and returns the sum.
#[inline(always)]
pub(crate) fn exp_in_place(xs: &mut [f32], scale: f32, shift: f32) -> f32 {
    let (chunks, rest) = xs.as_chunks_mut::<LANES>();
    let mut lanes = [0.0; LANES];
    for x in chunks {
        for i in 0..LANES {
            x[i] = exp(x[i] * scale - shift);
            lanes[i] += x[i];
        }
    }
    let mut rest_sum = 0.0;
    for x in rest {
        *x = exp(*x * scale - shift);
        rest_sum += *x;
    }
    fold(lanes) + rest_sum
}

/// Softmax of `scale * x` in place; returns the log of the normaliser (of `scale * x`).
#[inline(always)]
pub(crate) fn softmax(xs: &mut [f32], scale: f32) -> f32 {
    let shift = max(xs) * scale;
    let total = exp_in_place(xs, scale, shift);
    let factor = 1.0 / total;
    for x in xs.iter_mut() {
        *x *= factor;
    }
    shift + total.ln()
}

/// `into += from`.
#[inline(always)]
pub(crate) fn add(into: &mut [f32], from: &[f32]) {
    for (a, b) in into.iter_mut().zip(from) {
        *a += b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_saturates() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (ours, exact) = (exp(x), f64::from(x).exp());
            assert!((f64::from(ours) / exact - 1.0).abs() < 4e-7, "exp({x}) = {ours}, wanted {exact}");
            x += 0.137;
        }
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(-1e30) < 1e-37 && exp(1e30).is_finite());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn reductions_at_lane_edges() {
        for len in [0, 1, LANES - 1, LANES, LANES + 1, 4 * LANES + 1] {
            let xs: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let exact: f64 = xs.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&xs, &xs)) - exact).abs() < 1e-5);
            let best = xs.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&xs), best);
            if len > 0 {
                let mut p = xs.clone();
                softmax(&mut p, 0.5);
                assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5);
                let mut other = xs.clone();
                vectorized(|| softmax(&mut other, 0.5));
                assert_eq!(p, other, "same bits whatever the instruction set");
            }
        }
    }
}
