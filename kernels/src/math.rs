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

/// Below this magnitude [`tanh`] is a polynomial; above it, a quotient of exponentials is as exact.
pub(crate) const TANH_SMALL: f32 = 0.625;
/// `(tanh(x) - x) / x^3` in `x^2` on `|x| < TANH_SMALL`, highest power first (Cephes `tanhf`).
pub(crate) const TANH_POLY: [f32; 5] =
    [-5.704_988_7e-3, 2.063_909e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1];

/// The hyperbolic tangent, within 4 units in the last place: `x + x^3 * poly(x^2)` where small, else
/// `1 - 2 / (exp(2 |x|) + 1)` with the sign of `x`; NaN for NaN.
#[inline]
pub fn tanh(x: f32) -> f32 {
    let magnitude = x.max(-x);
    let square = x * x;
    let mut p = TANH_POLY[0];
    for &coefficient in &TANH_POLY[1..] {
        p = p.mul_add(square, coefficient);
    }
    let small = (p * square).mul_add(x, x);
    let large = 1.0 - 2.0 / (exp(magnitude + magnitude) + 1.0);
    if magnitude < TANH_SMALL {
        small
    } else if x < 0.0 {
        -large
    } else {
        large
    }
}

/// Functions of doubles that have one value on every machine. Those of the standard library are the system's: they
/// differ in the last place between systems, and between processors with and without fused multiply-adds, and what
/// depends on them would too. These are of a library in Rust, which is compiled into the program.
pub mod double {
    pub use libm::{cos, exp, log as ln, log1p as ln_1p, pow, sin};
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

/// The nearest IEEE half, ties to even; too large is infinite.
#[inline]
pub fn f32_to_f16(x: f32) -> u16 {
    /// Added to a number below 2^-14, it leaves the bits of the subnormal half at its own end.
    const SUBNORMAL: f32 = 0.5;
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    let half = if magnitude > 0x7f80_0000 {
        0x7e00 | (magnitude >> 13 & 0x3ff)
    } else if magnitude >= 143 << 23 {
        0x7c00
    } else if magnitude < 113 << 23 {
        (f32::from_bits(magnitude) + SUBNORMAL).to_bits() - SUBNORMAL.to_bits()
    } else {
        (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13
    };
    sign | half as u16
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
    fn tanh_is_within_four_ulp_of_the_true_value() {
        let mut x = -12.0f32;
        while x < 12.0 {
            let exact = f64::from(x).tanh();
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() & 0x7f80_0000)) * 2f64.powi(-23);
            let error = (f64::from(tanh(x)) - exact).abs() / ulp;
            assert!(error <= 4.0, "tanh({x}) is {error} ulp off");
            x += 0.000_31;
        }
        assert_eq!(tanh(1e-30), 1e-30);
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
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
        for bits in 0..=u16::MAX {
            let value = f16_to_f32(bits);
            if value.is_nan() {
                assert!(f16_to_f32(f32_to_f16(value)).is_nan(), "{bits:#x}");
                continue;
            }
            assert_eq!(f32_to_f16(value), bits, "{value:e}");
            // Halfway to the next one up: to the even of the two; a hair less or more: to the nearer.
            if bits & 0x7fff < 0x7bff {
                let next = f16_to_f32(bits + 1);
                let halfway = (value + next) / 2.0;
                assert_eq!(f32_to_f16(halfway), bits + (bits & 1), "{halfway:e}");
                let [toward, beyond] = [halfway.to_bits() - 1, halfway.to_bits() + 1].map(f32::from_bits);
                assert_eq!((f32_to_f16(toward), f32_to_f16(beyond)), (bits, bits + 1), "{halfway:e}");
            }
        }
        assert_eq!((f32_to_f16(65519.9), f32_to_f16(65520.0), f32_to_f16(-1e9)), (0x7bff, 0x7c00, 0xfc00));
        assert!(f16_to_f32(0x7e00).is_nan());
        assert_eq!(bf16_to_f32(0x3f80), 1.0);
    }
}
