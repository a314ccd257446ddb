//! Scores of a chunk's keys: the products of queries and keys, scaled and capped.

#![allow(clippy::needless_range_loop, reason = "indices name rows and tiles of several arrays at once")]

use super::super::MAX_HEAD_DIM;
use super::super::element::{Element, F32, load_part};
use super::{Group, Place, Seen, fetch};
use crate::LANES;
use crate::kv::{KvLayout, KvType, Tile, element};
use crate::pack::memory::LINE_BYTES;
use crate::simd::{Simd, tanh};

impl Group<'_> {
    /// Scaled and capped scores of all keys of the chunk that any row sees.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    pub(super) unsafe fn score<V: Simd, E: Element, const R: usize, const W: usize>(
        &self,
        seen: &mut Seen<'_, R>,
    ) {
        let args = self.task.args;
        let KvLayout { block_size, head_dim, .. } = args.layout;
        let end = self.start + seen.end[R - 1];
        let mut position = self.start + seen.begin[0] / LANES * LANES;
        // SAFETY: keys below `end` are in the checked blocks; with a block size that is a multiple of
        // 16, so is the rest of the last tile.
        unsafe {
            if let Some(places) = self.places {
                while position + (W - 1) * LANES < end {
                    let first = (position - self.start) / LANES;
                    let places = std::array::from_fn(|t| *places.get_unchecked(first + t));
                    self.score_tiles::<V, E, R, W>(seen, position, places, block_size);
                    position += W * LANES;
                }
                while position < end {
                    let place = *places.get_unchecked((position - self.start) / LANES);
                    self.score_tiles::<V, E, R, 1>(seen, position, [place], block_size);
                    position += LANES;
                }
                return;
            }
            let mut tile = [0.0f32; MAX_HEAD_DIM * LANES];
            while position < end {
                for lane in 0..LANES.min(end - position) {
                    let (from, offset) = self.task.locate(position + lane);
                    for d in 0..head_dim {
                        let key = element(E::TYPE, args.storage, from.keys, d * block_size + offset);
                        tile[d * LANES + lane] = key;
                    }
                }
                let keys = tile.as_ptr().cast();
                let place = Place { keys, values: keys, share_of_keys: keys };
                self.score_tiles::<V, F32, R, 1>(seen, position, [place], LANES);
                position += LANES;
            }
        }
    }

    /// Scores of `T` tiles of 16 keys from `position`; elements of a key are `stride` apart. `E` is the
    /// tiles' type, which is not the storage's if they are a copy. Meanwhile their values are fetched, each
    /// tile's from its first byte to its last: where lines are asked for out of order, memory is slower.
    ///
    /// # Safety
    /// As for [`group`]; the tiles are readable.
    #[inline(always)]
    unsafe fn score_tiles<V: Simd, E: Element, const R: usize, const T: usize>(
        &self,
        seen: &mut Seen<'_, R>,
        position: usize,
        places: [Place; T],
        stride: usize,
    ) {
        let (head_dim, bytes) = (self.task.args.layout.head_dim, E::TYPE.element_bytes());
        // SAFETY: the caller's promise; a group has `head_dim` times `R` queries.
        unsafe {
            let mut scores = [[V::splat(0.0); T]; R];
            let mut queries = self.queries;
            let mut keys = [std::ptr::null(); T];
            for t in 0..T {
                keys[t] = places[t].keys;
            }
            for part in 0..T {
                let mut ahead = places[part].values;
                for _ in part * head_dim / T..(part + 1) * head_dim / T {
                    let mut tiles = [V::splat(0.0); T];
                    for t in 0..T {
                        tiles[t] = E::load(keys[t]);
                        keys[t] = keys[t].wrapping_add(stride * bytes);
                    }
                    for line in 0..(T * LANES * bytes).div_ceil(LINE_BYTES) {
                        fetch(ahead.wrapping_add(line * LINE_BYTES));
                    }
                    ahead = ahead.wrapping_add(T * LANES * bytes);
                    for r in 0..R {
                        let q = V::splat(*queries.add(r));
                        for t in 0..T {
                            scores[r][t] = q.fma(tiles[t], scores[r][t]);
                        }
                    }
                    queries = queries.wrapping_add(R);
                }
            }
            // Small loops, so that the scores stay in registers above.
            if self.task.args.layout.kv_type == KvType::Q8 {
                let mut key_scales = [V::splat(0.0); T];
                for t in 0..T {
                    key_scales[t] = self.scales(position + t * LANES, |tile| tile.key_scales);
                }
                for r in 0..R {
                    for t in 0..T {
                        scores[r][t] = scores[r][t].mul(key_scales[t]);
                    }
                }
            }
            let (at, scale) = (position - self.start, V::splat(self.task.args.scale));
            for r in 0..R {
                for t in 0..T {
                    let to = seen.weights[r].as_mut_ptr().add(at + t * LANES);
                    scores[r][t].mul(scale).store(to);
                }
            }
        }
    }

    /// Bounds the scores' magnitude.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    pub(super) unsafe fn cap<V: Simd, const R: usize>(&self, seen: &mut Seen<'_, R>, cap: f32) {
        for tile in (seen.begin[0] / LANES * LANES..seen.end[R - 1]).step_by(LANES) {
            for weights in seen.weights.iter_mut() {
                // SAFETY: the caller's promise; a chunk is a multiple of 16.
                unsafe {
                    let (at, cap) = (weights.as_mut_ptr().add(tile), V::splat(cap));
                    cap.mul(tanh(V::load(at).div(cap))).store(at);
                }
            }
        }
    }

    /// [`score`](Self::score) where keys lie token by token: lanes run over the head.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    pub(super) unsafe fn score_rows<V: Simd, E: Element, const R: usize, const W: usize>(
        &self,
        seen: &mut Seen<'_, R>,
    ) {
        let (begin, end) = (seen.begin[0], seen.end[R - 1]);
        let mut key = begin;
        // SAFETY: the caller's promise; keys below `end` are in the checked blocks.
        unsafe {
            while key + W <= end {
                self.score_keys::<V, E, R, W>(seen, key);
                key += W;
            }
            while key < end {
                self.score_keys::<V, E, R, 1>(seen, key);
                key += 1;
            }
            for tile in (begin / LANES * LANES..end).step_by(LANES) {
                let quantized = self.task.args.layout.kv_type == KvType::Q8;
                let key_scales =
                    quantized.then(|| self.scales::<V>(self.start + tile, |tile| tile.key_scales));
                for weights in seen.weights.iter_mut() {
                    let at = weights.as_mut_ptr().add(tile);
                    let mut score = V::load(at);
                    if let Some(key_scales) = key_scales {
                        score = score.mul(key_scales);
                    }
                    score.mul(V::splat(self.task.args.scale)).store(at);
                }
            }
        }
    }

    /// Products of all rows with the keys `first..first + T` of the chunk.
    ///
    /// # Safety
    /// As for [`group`]; the keys are in the checked blocks.
    #[inline(always)]
    unsafe fn score_keys<V: Simd, E: Element, const R: usize, const T: usize>(
        &self,
        seen: &mut Seen<'_, R>,
        first: usize,
    ) {
        let (head_dim, bytes) = (self.task.args.layout.head_dim, E::TYPE.element_bytes());
        // SAFETY: the caller's promise; a group has `R` times `head_dim` queries.
        unsafe {
            let keys: [*const u8; T] = std::array::from_fn(|t| {
                let (tile, offset) = self.task.locate(self.start + first + t);
                self.task.args.storage.as_ptr().add(tile.keys + offset * head_dim * bytes)
            });
            let mut sums = [[V::splat(0.0); T]; R];
            let mut d = 0;
            while d < head_dim {
                let count = LANES.min(head_dim - d);
                let mut elements = [V::splat(0.0); T];
                for t in 0..T {
                    elements[t] = load_part::<V, E>(keys[t].add(d * bytes), count);
                }
                for r in 0..R {
                    let at = self.queries.add(r * head_dim + d);
                    let q = if count == LANES { V::load(at) } else { V::load_part(at, count) };
                    for t in 0..T {
                        sums[r][t] = q.fma(elements[t], sums[r][t]);
                    }
                }
                d += LANES;
            }
            for r in 0..R {
                for t in 0..T {
                    *seen.weights[r].as_mut_ptr().add(first + t) = sums[r][t].sum();
                }
            }
        }
    }

    /// The scales of 16 tokens from `position`, a multiple of 16; those of tokens beyond the context may be
    /// anything.
    ///
    /// # Safety
    /// As for [`group`]; the type has scales, and the first token is in the context.
    #[inline(always)]
    pub(super) unsafe fn scales<V: Simd>(&self, position: usize, part: impl Fn(&Tile) -> usize) -> V {
        let args = self.task.args;
        if args.layout.block_size.is_multiple_of(LANES) {
            let (tile, offset) = self.task.locate(position);
            // SAFETY: a tile has a scale for each of its tokens, and 16 of them from here.
            return unsafe { V::load(args.storage.as_ptr().add(part(&tile)).cast::<f32>().add(offset)) };
        }
        let context_len = args.context_lens[self.task.sequence] as usize;
        let scales: [f32; LANES] = std::array::from_fn(|lane| {
            let (tile, offset) = self.task.locate((position + lane).min(context_len - 1));
            element(KvType::F32, args.storage, part(&tile), offset)
        });
        // SAFETY: 16 elements.
        unsafe { V::load(scales.as_ptr()) }
    }
}
