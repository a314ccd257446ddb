//! Sums of whole numbers of the inputs that share a scale, for a few rows and panels at a time.
//!
//! A quad of codes is a line, four inputs of each of 16 outputs, and is multiplied with four inputs of one row after
//! the other. Where the instruction set multiplies tiles of two rows by eight inputs ([`Integers::TILES`]), rows go in
//! pairs and quads too, whose lines are interleaved first; of an odd number of rows the last one is its own partner,
//! which takes as many instructions as going alone. Sums of whole numbers are exact, so both ways give the same.

#![allow(
    clippy::needless_range_loop,
    reason = "indices name rows, quads and panels of several arrays at once"
)]

use crate::simd::Integers;

/// Codes of the inputs that share a scale.
pub(super) trait Quads<V: Integers, const P: usize> {
    /// True if quads are interleaved two by two already.
    const INTERLEAVED: bool;
    /// Quad `quad` of each panel.
    ///
    /// # Safety
    /// The processor has `V`'s instruction set; the quad is there.
    unsafe fn quad(&self, quad: usize) -> [V::Bytes; P];
}

/// Rows of activations.
pub(super) struct Activations {
    /// The first row's codes, and elements from row to row.
    pub(super) codes: *const i8,
    pub(super) codes_stride: usize,
    /// Minus the sum of the first row's codes, and elements from row to row.
    pub(super) neg_sums: *const i32,
    pub(super) sums_stride: usize,
}

/// `R` rows times `num_quads` quads of `P` panels.
///
/// # Safety
/// The processor has `V`'s instruction set; rows and quads are there, four quads or eight and eight rows at most.
#[inline(always)]
pub(super) unsafe fn dots<V: Integers, Q: Quads<V, P>, const R: usize, const P: usize>(
    x: &Activations,
    quads: &Q,
    num_quads: usize,
    offset_bits: u32,
) -> [[V::Ints; P]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        if V::TILES && (R > 1 || Q::INTERLEAVED) {
            return match R.div_ceil(2) {
                1 => tiles::<V, Q, 1, R, P>(x, quads, num_quads, offset_bits),
                2 => tiles::<V, Q, 2, R, P>(x, quads, num_quads, offset_bits),
                3 => tiles::<V, Q, 3, R, P>(x, quads, num_quads, offset_bits),
                _ => tiles::<V, Q, 4, R, P>(x, quads, num_quads, offset_bits),
            };
        }
        let mut dots = [[V::zero(); P]; R];
        if offset_bits > 0 {
            for r in 0..R {
                dots[r] = [V::start(x.neg_sums.add(r * x.sums_stride), offset_bits); P];
            }
        }
        if R > 2 && num_quads == 4 {
            // Not left to the compiler, which makes it a loop that shifts and branches by the number of the quad.
            add_quad(&mut dots, quads, x, 0, offset_bits);
            add_quad(&mut dots, quads, x, 1, offset_bits);
            add_quad(&mut dots, quads, x, 2, offset_bits);
            add_quad(&mut dots, quads, x, 3, offset_bits);
        } else {
            for quad in 0..num_quads {
                add_quad(&mut dots, quads, x, quad, offset_bits);
            }
        }
        dots
    }
}

/// Adds quad `quad` to the sums.
///
/// # Safety
/// As for [`dots`]; the quad is there.
#[inline(always)]
unsafe fn add_quad<V: Integers, Q: Quads<V, P>, const R: usize, const P: usize>(
    dots: &mut [[V::Ints; P]; R],
    quads: &Q,
    x: &Activations,
    quad: usize,
    offset_bits: u32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = quads.quad(quad);
        for r in 0..R {
            let x = V::splat_bytes(x.codes.add(r * x.codes_stride + quad * 4));
            for p in 0..P {
                dots[r][p] = V::dot(dots[r][p], codes[p], x, offset_bits);
            }
        }
    }
}

/// [`dots`] of `N` pairs of rows, by tiles.
///
/// # Safety
/// As for [`dots`]; the processor multiplies tiles, and `N` is half of `R`, rounded up.
#[inline(always)]
unsafe fn tiles<V: Integers, Q: Quads<V, P>, const N: usize, const R: usize, const P: usize>(
    x: &Activations,
    quads: &Q,
    num_quads: usize,
    offset_bits: u32,
) -> [[V::Ints; P]; R] {
    // SAFETY: the caller's promise; no row is beyond the last.
    unsafe {
        let mut codes = [[x.codes; 2]; N];
        let mut sums = [[[V::zero(); 2]; N]; P];
        for n in 0..N {
            let rows = [2 * n, (2 * n + 1).min(R - 1)];
            codes[n] = [x.codes.add(rows[0] * x.codes_stride), x.codes.add(rows[1] * x.codes_stride)];
            if offset_bits > 0 {
                let neg_sums = rows.map(|row| x.neg_sums.add(row * x.sums_stride));
                for p in 0..P {
                    sums[p][n] = V::start_tiles(neg_sums, offset_bits);
                }
            }
        }
        // Two pairs of quads or four; the compiler leaves a loop of so many matrix instructions as it is, and then
        // moves the sums from register to register.
        add_pair::<V, Q, N, P>(&mut sums, quads, &codes, 0);
        add_pair::<V, Q, N, P>(&mut sums, quads, &codes, 1);
        if num_quads == 8 {
            add_pair::<V, Q, N, P>(&mut sums, quads, &codes, 2);
            add_pair::<V, Q, N, P>(&mut sums, quads, &codes, 3);
        }
        let mut dots = [[V::zero(); P]; R];
        for p in 0..P {
            for n in 0..N {
                let rows = V::rows_of_tiles(sums[p][n]);
                dots[2 * n][p] = rows[0];
                if 2 * n + 1 < R {
                    dots[2 * n + 1][p] = rows[1];
                }
            }
        }
        dots
    }
}

/// Adds pair `pair` of quads to the sums of tiles.
///
/// # Safety
/// As for [`tiles`], `codes` being those of the pairs of rows; the quads are there.
#[inline(always)]
unsafe fn add_pair<V: Integers, Q: Quads<V, P>, const N: usize, const P: usize>(
    sums: &mut [[[V::Ints; 2]; N]; P],
    quads: &Q,
    codes: &[[*const i8; 2]; N],
    pair: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (first, second) = (quads.quad(2 * pair), quads.quad(2 * pair + 1));
        let mut x = *codes;
        for n in 0..N {
            x[n] = [codes[n][0].add(8 * pair), codes[n][1].add(8 * pair)];
        }
        for p in 0..P {
            let lines = [first[p], second[p]];
            V::tiles(&mut sums[p], if Q::INTERLEAVED { lines } else { V::interleave(lines) }, x);
        }
    }
}
