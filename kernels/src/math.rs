//! The scalar functions that every path shares, written as a fixed sequence of IEEE operations so that
//! the vector versions, which follow the same sequence, give the same bits.

/// Below this [`exp`] is `+0.0`; keeps every intermediate a normal number.
pub const EXP_UNDERFLOW: f32 = -87.0;
/// Above this [`exp`] is infinite.
pub const EXP_OVERFLOW: f32 = 88.722_83;

pub(crate) const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the first has few enough bits that `n * LN2_HI` is exact for `|n| <= 128`.
pub(crate) const LN2_HI: f32 = 0.693_359_4;
pub(crate) const LN2_LO: f32 = -2.121_944_4e-4;
/// exp(r) on `|r| <= ln2 / 2`, highest power first (Cephes `expf`); then `* r^2 + r + 1`.
pub(crate) const EXP_POLY: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// e to the `x`: within 2 units in the last place; `+0.0` below [`EXP_UNDERFLOW`], infinite above
/// [`EXP_OVERFLOW`], NaN for NaN.
#[inline]
pub fn exp(x: f32) -> f32 {
    if x < EXP_UNDERFLOW {
        return 0.0;
    }
    if x > EXP_OVERFLOW {
        return f32::INFINITY;
    }
    let n = (x * LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    let mut p = EXP_POLY[0];
    for &coefficient in &EXP_POLY[1..] {
        p = p.mul_add(r, coefficient);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    // Two steps, because 2^128 alone is out of range.
    let n = n as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n - half)
}

#[inline]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// The bits of a bf16 as f32: exact.
#[inline]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bits of an IEEE half as f32: exact.
#[inline]
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let mantissa = u32::from(bits & 0x3ff);
    match exponent {
        // Subnormal: the mantissa counts units of 2^-24.
        0 => {
            let magnitude = mantissa as f32 * f32::from_bits((127 - 24) << 23);
            f32::from_bits(sign | magnitude.to_bits())
        }
        0x1f if mantissa == 0 => f32::from_bits(sign | 0x7f80_0000),
        // Hardware makes a signalling NaN quiet; so does this.
        0x1f => f32::from_bits(sign | 0x7fc0_0000 | (mantissa << 13)),
        _ => f32::from_bits(sign | ((exponent + 127 - 15) << 23) | (mantissa << 13)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_of_the_true_value() {
        let mut x = EXP_UNDERFLOW;
        while x < EXP_OVERFLOW {
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() & 0x7f80_0000)) * 2f64.powi(-23);
            let error = (f64::from(exp(x)) - exact).abs() / ulp;
            assert!(error <= 2.0, "exp({x}) is {error} ulp off");
            x += 0.000_73;
        }
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp(0.0).to_bits(), 1f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0f32.to_bits());
        assert_eq!(exp(EXP_UNDERFLOW - 0.01).to_bits(), 0f32.to_bits());
        assert!(exp(EXP_OVERFLOW).is_finite());
        assert_eq!(exp(88.73), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn halves_convert_exactly() {
        for (bits, value) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65504.0),
            (0x0001, 5.960_464_5e-8),
            (0x03ff, 6.097_555_e-5),
            (0x8000, -0.0),
            (0x7c00, f32::INFINITY),
        ] {
            assert_eq!(f16_to_f32(bits).to_bits(), f32::to_bits(value), "{bits:#x}");
        }
        assert!(f16_to_f32(0x7e00).is_nan());
        assert_eq!(bf16_to_f32(0x3f80), 1.0);
    }
}
