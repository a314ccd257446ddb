//! Scores of a chunk's keys: the products of queries and keys, scaled and capped.

#![allow(clippy::needless_range_loop, reason = "indices name rows and tiles of several arrays at once")]

use super::super::MAX_HEAD_DIM;
use super::super::element::{Element, F32, load_part};
use super::{Group, Seen, fetch};
use crate::LANES;
use crate::kv::{KvLayout, KvType, Tile, element};
use crate::simd::{Simd, tanh};

impl Group<'_> {
    /// Scaled and capped scores of all keys of the chunk that any row sees.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    pub(super) unsafe fn score<V: Simd, E: Element, const R: usize, const W: usize>(
        &self,
        seen: &mut Seen<R>,
    ) {
        let args = self.task.args;
        let KvLayout { block_size, head_dim, .. } = args.layout;
        let end = self.start + seen.end[R - 1];
        let mut position = self.start + seen.begin[0] / LANES * LANES;
        // SAFETY: keys below `end` are in the checked blocks; with a block size that is a multiple of
        // 16, so is the rest of the last tile.
        unsafe {
            if block_size.is_multiple_of(LANES) {
                while position + (W - 1) * LANES < end {
                    let keys = std::array::from_fn(|t| self.key::<E>(position + t * LANES));
                    self.score_tiles::<V, E, R, W>(seen, position, keys, block_size);
                    position += W * LANES;
                }
                while position < end {
                    self.score_tiles::<V, E, R, 1>(seen, position, [self.key::<E>(position)], block_size);
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
                self.score_tiles::<V, F32, R, 1>(seen, position, [tile.as_ptr().cast()], LANES);
                position += LANES;
            }
        }
    }

    /// Scores of `T` tiles of 16 keys from `position`; elements of a key are `stride` apart. `E` is the
    /// tiles' type, which is not the storage's if they are a copy.
    ///
    /// # Safety
    /// As for [`group`]; the tiles are readable.
    #[inline(always)]
    unsafe fn score_tiles<V: Simd, E: Element, const R: usize, const T: usize>(
        &self,
        seen: &mut Seen<R>,
        position: usize,
        mut keys: [*const u8; T],
        stride: usize,
    ) {
        let args = self.task.args;
        let (head_dim, step) = (args.layout.head_dim, stride * E::TYPE.element_bytes());
        // A tile's values are as many bytes as its keys, and as far off in every tile.
        let to_values = args.layout.tile(0, 0).values;
        // SAFETY: the caller's promise; a group has `head_dim` times `R` queries.
        unsafe {
            let mut scores = [[V::splat(0.0); T]; R];
            let mut queries = self.queries;
            for _ in 0..head_dim {
                let mut tiles = [V::splat(0.0); T];
                for t in 0..T {
                    tiles[t] = E::load(keys[t]);
                    fetch(keys[t].wrapping_add(to_values));
                    keys[t] = keys[t].wrapping_add(step);
                }
                for r in 0..R {
                    let q = V::splat(*queries.add(r));
                    for t in 0..T {
                        scores[r][t] = q.fma(tiles[t], scores[r][t]);
                    }
                }
                queries = queries.wrapping_add(R);
            }
            for t in 0..T {
                let at = position - self.start + t * LANES;
                let key_scales = self.scales::<V>(position + t * LANES, |tile| tile.key_scales);
                for r in 0..R {
                    let score = self.scaled(scores[r][t], key_scales);
                    score.store(seen.weights[r].as_mut_ptr().add(at));
                }
            }
        }
    }

    /// 16 products of a row and as many keys as scores: scaled, and capped.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    unsafe fn scaled<V: Simd>(&self, mut score: V, key_scales: Option<V>) -> V {
        let args = self.task.args;
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(key_scales) = key_scales {
                score = score.mul(key_scales);
            }
            score = score.mul(V::splat(args.scale));
            if let Some(cap) = args.soft_cap {
                let cap = V::splat(cap);
                score = cap.mul(tanh(score.div(cap)));
            }
            score
        }
    }

    /// [`score`](Self::score) where keys lie token by token: lanes run over the head.
    ///
    /// # Safety
    /// As for [`group`].
    #[inline(always)]
    pub(super) unsafe fn score_rows<V: Simd, E: Element, const R: usize, const W: usize>(
        &self,
        seen: &mut Seen<R>,
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
                let key_scales = self.scales::<V>(self.start + tile, |tile| tile.key_scales);
                for weights in &mut seen.weights {
                    let at = weights.as_mut_ptr().add(tile);
                    self.scaled(V::load(at), key_scales).store(at);
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
        seen: &mut Seen<R>,
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

    /// The scales of 16 tokens from `position`, a multiple of 16, if their type has any; those of tokens
    /// beyond the context may be anything.
    ///
    /// # Safety
    /// As for [`group`]; the first is in the context.
    #[inline(always)]
    pub(super) unsafe fn scales<V: Simd>(&self, position: usize, part: impl Fn(&Tile) -> usize) -> Option<V> {
        let args = self.task.args;
        if args.layout.kv_type != KvType::Q8 {
            return None;
        }
        if args.layout.block_size.is_multiple_of(LANES) {
            let (tile, offset) = self.task.locate(position);
            // SAFETY: a tile has a scale for each of its tokens, and 16 of them from here.
            return Some(unsafe {
                V::load(args.storage.as_ptr().add(part(&tile)).cast::<f32>().add(offset))
            });
        }
        let context_len = args.context_lens[self.task.sequence] as usize;
        let scales: [f32; LANES] = std::array::from_fn(|lane| {
            let (tile, offset) = self.task.locate((position + lane).min(context_len - 1));
            element(KvType::F32, args.storage, part(&tile), offset)
        });
        // SAFETY: 16 elements.
        Some(unsafe { V::load(scales.as_ptr()) })
    }

    /// The first element of the key at `position`.
    ///
    /// # Safety
    /// The position is below the context length.
    #[inline(always)]
    unsafe fn key<E: Element>(&self, position: usize) -> *const u8 {
        let (tile, offset) = self.task.locate(position);
        // SAFETY: the checked blocks cover the context.
        unsafe { self.task.args.storage.as_ptr().add(tile.keys + offset * E::TYPE.element_bytes()) }
    }
}
