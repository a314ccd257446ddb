//! A chunk's values, weighted and added up.

#![allow(clippy::needless_range_loop, reason = "indices name rows and vectors of several arrays at once")]

use std::ops::Range;

use super::super::element::{Element, load_part};
use super::{Group, Row, Seen, fetch};
use crate::LANES;
use crate::kv::KvLayout;
use crate::pack::memory::LINE_BYTES;
use crate::simd::Simd;

impl Group<'_> {
    /// Adds the weighted values to `C` vectors of the outputs from `column`. `count` is 16, or what is
    /// left of the head when `C` is 1.
    ///
    /// # Safety
    /// As for [`group`]; the columns are below `value_dim`.
    #[inline(always)]
    pub(super) unsafe fn gather<V: Simd, E: Element, const R: usize, const C: usize>(
        &self,
        seen: &Seen<'_, R>,
        rows: &[Row; R],
        column: usize,
        count: usize,
    ) {
        // What all rows see; both ends of what a row sees ascend.
        let shared = seen.begin[R - 1]..seen.end[0].max(seen.begin[R - 1]);
        // SAFETY: the caller's promise; keys below the last row's position are in the checked blocks.
        unsafe {
            let mut parts = [[V::splat(0.0); C]; R];
            let (before, after) = (seen.begin[0]..shared.start, shared.end..seen.end[R - 1]);
            self.add_values::<V, E, R, C, false>(seen, &mut parts, before, column, count);
            self.add_values::<V, E, R, C, true>(seen, &mut parts, shared, column, count);
            self.add_values::<V, E, R, C, false>(seen, &mut parts, after, column, count);
            for r in 0..R {
                let Some((a, b)) = seen.merges[r] else { continue };
                let first = self.is_first(&rows[r]);
                for c in 0..C {
                    let at = rows[r].out.add(column + c * LANES);
                    let merged = if first {
                        parts[r][c]
                    } else {
                        V::load_part(at, count).fma(V::splat(a), parts[r][c].mul(V::splat(b)))
                    };
                    merged.store_part(at, count);
                }
            }
        }
    }

    /// The chain of [`gather`](Self::gather) over some keys of the chunk: for all rows if `ALL`, else for
    /// those that see the key.
    ///
    /// # Safety
    /// As for [`gather`](Self::gather); the keys are below the last row's position.
    #[inline(always)]
    unsafe fn add_values<V: Simd, E: Element, const R: usize, const C: usize, const ALL: bool>(
        &self,
        seen: &Seen<'_, R>,
        parts: &mut [[V; C]; R],
        keys: Range<usize>,
        column: usize,
        count: usize,
    ) {
        let (head_dim, bytes) = (self.task.args.layout.head_dim, E::TYPE.element_bytes());
        let mut key = keys.start;
        while key < keys.end {
            // SAFETY: the caller's promise; values of one block follow one another.
            unsafe {
                let (values, mut ahead, left) = self.values::<E>(key);
                let end = keys.end.min(key + left);
                let mut at = values.add(column * bytes);
                // In the order of addresses, which memory answers sooner: of each sixteen the first part is
                // fetched with the first columns.
                ahead = ahead.wrapping_add((column + key % LANES * C) * LANES * bytes);
                while key < end {
                    // No closure: it would be compiled without the instruction set.
                    let mut values = [V::splat(0.0); C];
                    for c in 0..C {
                        values[c] = load_part::<V, E>(at.add(c * LANES * bytes), count);
                    }
                    for line in 0..(C * LANES * bytes).div_ceil(LINE_BYTES) {
                        fetch(ahead.wrapping_add(line * LINE_BYTES));
                    }
                    for r in 0..R {
                        if ALL || (seen.begin[r] <= key && key < seen.end[r]) {
                            let weight = V::splat(*seen.weights[r].as_ptr().add(key));
                            for c in 0..C {
                                parts[r][c] = weight.fma(values[c], parts[r][c]);
                            }
                        }
                    }
                    at = at.wrapping_add(head_dim * bytes);
                    ahead = ahead.wrapping_add(C * LANES * bytes);
                    key += 1;
                }
            }
        }
    }

    /// The values of a key of the chunk; what to fetch beside those of its sixteen; and how many values follow
    /// one another from here.
    ///
    /// # Safety
    /// The key is below the last row's position.
    #[inline(always)]
    unsafe fn values<E: Element>(&self, key: usize) -> (*const u8, *const u8, usize) {
        let KvLayout { block_size, head_dim, .. } = self.task.args.layout;
        let bytes = E::TYPE.element_bytes();
        // SAFETY: the key's value lies where it is said to.
        unsafe {
            if let (Some(places), Some(ahead)) = (self.places, self.ahead) {
                let place = places.get_unchecked(key / LANES);
                let ahead = ahead.get_unchecked(key / LANES).share_of_keys;
                return (place.values.add(key % LANES * head_dim * bytes), ahead, LANES - key % LANES);
            }
            let (tile, offset) = self.task.locate(self.start + key);
            let at = self.task.args.storage.as_ptr().add(tile.values + offset * head_dim * bytes);
            (at, at, block_size - offset)
        }
    }
}
