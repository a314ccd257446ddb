//! Where keys and values stand in paged storage, and how a pass writes them there.
//!
//! A block holds `block_size` tokens of one layer, as one stretch of bytes that can be copied, shared or
//! swapped out. It is a row of stretches, one a key/value head, each:
//!
//! | part         | shape                    | element                                     |
//! |--------------|--------------------------|---------------------------------------------|
//! | keys         | `[head_dim, block_size]` | the [`KvType`]'s                            |
//! | key scales   | `[block_size]`           | f32; [`KvType::Q8`] only                    |
//! | values       | `[block_size, head_dim]` | the [`KvType`]'s                            |
//! | value scales | `[block_size]`           | f32; [`KvType::Q8`] only                    |
//!
//! The same element of neighbouring keys is contiguous, so one vector load serves 16 keys and a score
//! needs no sum across lanes. Any `block_size` is right; a multiple of 16 is fast. Numbers are in the
//! byte order of the machine.
//!
//! With [`Values::OfKeys`] nothing but the keys is stored, and these token by token, because they are read
//! as values too:
//!
//! | part         | shape                    | element                                     |
//! |--------------|--------------------------|---------------------------------------------|
//! | keys         | `[block_size, head_dim]` | the [`KvType`]'s                            |
//! | key scales   | `[block_size]`           | f32; [`KvType::Q8`] only                    |

use crate::math::{f16_to_f32, f32_to_f16};
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Element type of stored keys and values. Arithmetic on them is in f32, whatever the type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum KvType {
    /// As computed.
    #[default]
    F32,
    /// IEEE half precision, rounded to nearest, ties to even.
    F16,
    /// Whole numbers from -127 to 127 with one f32 scale a token and head, the largest magnitude / 127.
    /// A head that holds a NaN or an infinity is stored as NaN.
    Q8,
}

impl KvType {
    /// Every type, widest first.
    pub const ALL: [KvType; 3] = [KvType::F32, KvType::F16, KvType::Q8];

    /// The name in settings and messages.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::Q8 => "q8",
        }
    }

    /// Bytes of an element.
    pub(crate) fn element_bytes(self) -> usize {
        match self {
            KvType::F32 => 4,
            KvType::F16 => 2,
            KvType::Q8 => 1,
        }
    }

    /// Bytes of what belongs to a token's head beside its elements.
    fn scale_bytes(self) -> usize {
        if self == KvType::Q8 { size_of::<f32>() } else { 0 }
    }

    /// Bytes of one token's keys and values of one head.
    pub fn token_bytes(self, head_dim: usize, values: Values) -> usize {
        values.stretches() * (head_dim * self.element_bytes() + self.scale_bytes())
    }
}

/// What the values of a head are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Values {
    /// As wide as the keys, and stored beside them.
    #[default]
    Own,
    /// The first so many elements of the keys: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434),
    /// in which one latent a token is key and value of all heads.
    OfKeys(usize),
}

impl Values {
    /// Width of a value, where a key's is `head_dim`.
    pub fn width(self, head_dim: usize) -> usize {
        match self {
            Values::Own => head_dim,
            Values::OfKeys(width) => width,
        }
    }

    /// Stretches of elements and scales that a block and head has.
    fn stretches(self) -> usize {
        if self == Values::Own { 2 } else { 1 }
    }
}

impl std::str::FromStr for KvType {
    type Err = String;

    fn from_str(value: &str) -> Result<Self, String> {
        let found = KvType::ALL.into_iter().find(|kv_type| kv_type.name() == value);
        found.ok_or_else(|| format!("{value:?} is no type of keys and values; f32, f16 and q8 are"))
    }
}

/// Shape of one layer's paged storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Tokens of a block.
    pub block_size: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head's key.
    pub head_dim: usize,
    /// What its values are.
    pub values: Values,
    /// Element type.
    pub kv_type: KvType,
}

/// Byte offsets of the four parts of one block and head.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub(crate) keys: usize,
    pub(crate) key_scales: usize,
    pub(crate) values: usize,
    pub(crate) value_scales: usize,
}

impl KvLayout {
    /// Bytes of one block, keys and values.
    pub fn block_bytes(&self) -> usize {
        self.num_kv_heads * self.tile_bytes()
    }

    /// Width of one token's keys, and of its values where they are its own.
    pub fn token_len(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Width of a head's value.
    pub fn value_dim(&self) -> usize {
        self.values.width(self.head_dim)
    }

    /// Bytes of one block and head.
    fn tile_bytes(&self) -> usize {
        self.block_size * self.kv_type.token_bytes(self.head_dim, self.values)
    }

    /// Where one block and head stands.
    #[inline]
    pub(crate) fn tile(&self, block: usize, kv_head: usize) -> Tile {
        let tile = self.tile_bytes();
        let elements = self.block_size * self.head_dim * self.kv_type.element_bytes();
        let keys = (block * self.num_kv_heads + kv_head) * tile;
        let values = match self.values {
            Values::Own => keys + tile / 2,
            Values::OfKeys(_) => keys,
        };
        Tile { keys, key_scales: keys + elements, values, value_scales: values + elements }
    }
}

/// Element `index` of the array that begins at byte `start`.
#[inline]
pub(crate) fn element(kv_type: KvType, storage: &[u8], start: usize, index: usize) -> f32 {
    match kv_type {
        KvType::F32 => f32::from_ne_bytes(array(storage, start + 4 * index)),
        KvType::F16 => f16_to_f32(u16::from_ne_bytes(array(storage, start + 2 * index))),
        KvType::Q8 => f32::from(storage[start + index] as i8),
    }
}

#[inline]
fn array<const N: usize>(storage: &[u8], at: usize) -> [u8; N] {
    storage[at..at + N].try_into().expect("N bytes")
}

/// The keys and values of one pass, as its projections left them.
#[derive(Clone, Copy, Debug)]
pub struct KvRows<'a> {
    /// Token `t`'s keys are `k[t * row_stride..][..token_len]`, `[num_kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// Token `t`'s values, likewise; of no use with [`Values::OfKeys`].
    pub v: &'a [f32],
    /// Elements from one token to the next, so that both may be parts of a stacked projection.
    pub row_stride: usize,
    /// `[num_tokens]`: `block_id * block_size + offset`.
    pub slot_mapping: &'a [u32],
}

/// Writes one key and one value row per token into its slot. A slot named twice keeps the later row.
///
/// # Panics
/// If a row leaves `k` or `v`, or a slot leaves the storage.
pub fn write_kv(pool: &ThreadPool, layout: &KvLayout, rows: &KvRows<'_>, storage: &mut [u8]) {
    let KvRows { k, v, row_stride, slot_mapping } = *rows;
    let width = layout.token_len();
    let num_tokens = slot_mapping.len();
    let needed = num_tokens.checked_sub(1).map_or(0, |last| last * row_stride + width);
    assert!(
        k.len() >= needed && (v.len() >= needed || layout.values != Values::Own),
        "write_kv: {num_tokens} rows of {width} with stride {row_stride} need {needed} elements; k has {}, v {}",
        k.len(),
        v.len()
    );
    let num_blocks = storage.len().checked_div(layout.block_bytes()).unwrap_or(0);
    let num_slots = num_blocks * layout.block_size;
    if let Some(slot) = slot_mapping.iter().find(|&&slot| slot as usize >= num_slots) {
        panic!("write_kv: slot {slot} of {num_slots}");
    }
    let storage = SharedOut::new(storage);
    // A task is a head: its tiles are its own, and its tokens come in order.
    let tasks = pool.num_tasks(layout.num_kv_heads, num_tokens * layout.head_dim * 2);
    pool.run(tasks, &|task| {
        let heads = task * layout.num_kv_heads / tasks..(task + 1) * layout.num_kv_heads / tasks;
        let mut token = 0;
        while token < num_tokens {
            let run = run_in_block(&slot_mapping[token..], layout.block_size);
            let slot = slot_mapping[token] as usize;
            for head in heads.clone() {
                let tile = layout.tile(slot / layout.block_size, head);
                let from = token * row_stride + head * layout.head_dim;
                // SAFETY: the tile is in the storage, because the slot is; heads belong to one task.
                let tile = unsafe { storage.part(tile.keys, layout.tile_bytes()) };
                let rows = Run { len: run, offset: slot % layout.block_size, stride: row_stride };
                if layout.values != Values::Own {
                    rows.write(layout, &k[from..], tile, layout.head_dim, 1);
                    continue;
                }
                let (keys, values) = tile.split_at_mut(layout.tile_bytes() / 2);
                rows.write(layout, &k[from..], keys, 1, layout.block_size);
                rows.write(layout, &v[from..], values, layout.head_dim, 1);
            }
            token += run;
        }
    });
}

/// How many of the first slots follow one another in one block; at least 1.
fn run_in_block(slots: &[u32], block_size: usize) -> usize {
    let room = block_size - slots[0] as usize % block_size;
    let follows = |&(i, &slot): &(usize, &u32)| slot == slots[0] + i as u32;
    slots.iter().take(room).enumerate().take_while(follows).count()
}

/// Tokens whose slots follow one another in one block.
struct Run {
    len: usize,
    /// Of the first in the block.
    offset: usize,
    /// Elements from one token's row to the next's.
    stride: usize,
}

impl Run {
    /// Writes one head of every token into a stretch of a tile. Element `d` of the token at offset `t` is element
    /// `t * token_step + d * step` of it.
    fn write(&self, layout: &KvLayout, rows: &[f32], half: &mut [u8], token_step: usize, step: usize) {
        let head_dim = layout.head_dim;
        let (elements, scales) =
            half.split_at_mut(layout.block_size * head_dim * layout.kv_type.element_bytes());
        match layout.kv_type {
            KvType::F32 => self.scatter(head_dim, rows, elements, token_step, step, f32::to_ne_bytes),
            KvType::F16 => {
                self.scatter(head_dim, rows, elements, token_step, step, |x| f32_to_f16(x).to_ne_bytes());
            }
            KvType::Q8 => {
                for token in 0..self.len {
                    let row = &rows[token * self.stride..][..head_dim];
                    let (scale, inverse) = q8_scale(row);
                    let at = (self.offset + token) * size_of::<f32>();
                    scales[at..at + size_of::<f32>()].copy_from_slice(&scale.to_ne_bytes());
                    let one = Run { len: 1, offset: self.offset + token, stride: self.stride };
                    one.scatter(head_dim, row, elements, token_step, step, |x| [q8(x, inverse) as u8]);
                }
            }
        }
    }

    /// Element by element, the tokens innermost where they are neighbours in the tile.
    #[inline(always)]
    fn scatter<const N: usize>(
        &self,
        head_dim: usize,
        rows: &[f32],
        elements: &mut [u8],
        token_step: usize,
        step: usize,
        narrow: impl Fn(f32) -> [u8; N],
    ) {
        let (elements, _) = elements.as_chunks_mut::<N>();
        if step == 1 {
            for token in 0..self.len {
                let to = &mut elements[(self.offset + token) * token_step..][..head_dim];
                for (to, &x) in to.iter_mut().zip(&rows[token * self.stride..]) {
                    *to = narrow(x);
                }
            }
            return;
        }
        for d in 0..head_dim {
            let to = &mut elements[d * step + self.offset..][..self.len];
            for (token, to) in to.iter_mut().enumerate() {
                *to = narrow(rows[token * self.stride + d]);
            }
        }
    }
}

/// The scale of a head, and what its elements are multiplied with.
fn q8_scale(row: &[f32]) -> (f32, f32) {
    let max = row.iter().fold(0.0f32, |max, x| max.max(x.abs()));
    // Of a sum of zeros, only a NaN or an infinity makes a NaN.
    let finite = !row.iter().fold(0.0f32, |sum, x| sum + x * 0.0).is_nan();
    match finite {
        true if max > 0.0 => (max / 127.0, 127.0 / max),
        true => (0.0, 0.0),
        false => (f32::NAN, 0.0),
    }
}

/// The whole number nearest to `x * inverse`, ties to even; at most 127 in magnitude.
#[inline]
fn q8(x: f32, inverse: f32) -> i8 {
    /// So large that its last bit counts ones: adding it rounds.
    const ROUND: f32 = 12_582_912.0;
    ((x * inverse).clamp(-127.0, 127.0) + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(kv_type: KvType) -> KvLayout {
        KvLayout { block_size: 4, num_kv_heads: 2, head_dim: 3, values: Values::Own, kv_type }
    }

    #[test]
    fn a_token_lands_in_its_slot_and_touches_no_other() {
        for kv_type in KvType::ALL {
            let layout = layout(kv_type);
            let mut storage = vec![0xaa; 3 * layout.block_bytes()];
            // Rows of 6 in a stride of 8.
            let k: Vec<f32> = (0..30).map(|i| i as f32).collect();
            let v: Vec<f32> = (100..130).map(|i| i as f32).collect();
            // Two that follow one another, one of another block, and one that does not follow.
            let slots = [9, 10, 2, 0];
            let rows = KvRows { k: &k, v: &v, row_stride: 8, slot_mapping: &slots };
            write_kv(&ThreadPool::new(2), &layout, &rows, &mut storage);
            let scale = |at: usize| match kv_type {
                KvType::Q8 => f32::from_ne_bytes(array(&storage, at)),
                _ => 1.0,
            };
            for (token, slot) in slots.iter().map(|&slot| slot as usize).enumerate() {
                for head in 0..2 {
                    let tile = layout.tile(slot / 4, head);
                    let offset = slot % 4;
                    for d in 0..3 {
                        let expected = (token * 8 + head * 3 + d) as f32;
                        let key = element(kv_type, &storage, tile.keys, d * 4 + offset)
                            * scale(tile.key_scales + 4 * offset);
                        let value = element(kv_type, &storage, tile.values, offset * 3 + d)
                            * scale(tile.value_scales + 4 * offset);
                        // Half of a 127th of the largest of the head.
                        let tolerance = if kv_type == KvType::Q8 { 0.5 } else { 0.0 };
                        assert!((key - expected).abs() <= tolerance, "{kv_type:?}: {key} {expected}");
                        assert!((value - expected - 100.0).abs() <= tolerance, "{kv_type:?}: {value}");
                    }
                }
            }
            let written = slots.len() * 2 * kv_type.token_bytes(3, Values::Own);
            let untouched = storage.iter().filter(|&&byte| byte == 0xaa).count();
            assert_eq!(untouched, storage.len() - written, "{kv_type:?}");
        }
    }

    #[test]
    fn keys_that_are_values_too_are_stored_once_and_token_by_token() {
        for kv_type in KvType::ALL {
            let layout = KvLayout { values: Values::OfKeys(2), ..layout(kv_type) };
            assert_eq!(2 * layout.block_bytes(), self::layout(kv_type).block_bytes());
            let mut storage = vec![0xaa; 3 * layout.block_bytes()];
            let k: Vec<f32> = (0..12).map(|i| i as f32).collect();
            let rows = KvRows { k: &k, v: &[], row_stride: 6, slot_mapping: &[9, 2] };
            write_kv(&ThreadPool::new(2), &layout, &rows, &mut storage);
            for (token, slot) in [9, 2].into_iter().enumerate() {
                for head in 0..2 {
                    let (tile, offset) = (layout.tile(slot / 4, head), slot % 4);
                    assert_eq!((tile.values, tile.value_scales), (tile.keys, tile.key_scales));
                    let scale = match kv_type {
                        KvType::Q8 => element(KvType::F32, &storage, tile.key_scales, offset),
                        _ => 1.0,
                    };
                    for d in 0..3 {
                        let key = element(kv_type, &storage, tile.keys, offset * 3 + d) * scale;
                        let expected = (token * 6 + head * 3 + d) as f32;
                        let tolerance = if kv_type == KvType::Q8 { 0.05 } else { 0.0 };
                        assert!((key - expected).abs() <= tolerance, "{kv_type:?}: {key} {expected}");
                    }
                }
            }
            let untouched = storage.iter().filter(|&&byte| byte == 0xaa).count();
            assert_eq!(untouched, storage.len() - 2 * 2 * kv_type.token_bytes(3, layout.values));
        }
    }

    #[test]
    fn q8_keeps_the_largest_rounds_to_even_and_spreads_what_is_not_finite() {
        let row = [-254.0, 1.0, 3.0, 0.0];
        let (scale, inverse) = q8_scale(&row);
        assert_eq!(scale, 2.0);
        assert_eq!(row.map(|x| q8(x, inverse)), [-127, 0, 2, 0]);
        assert_eq!(q8_scale(&[0.0; 4]), (0.0, 0.0));
        assert!(q8_scale(&[1.0, f32::NAN]).0.is_nan());
        assert!(q8_scale(&[1.0, f32::NEG_INFINITY]).0.is_nan());
    }

    #[test]
    fn names_are_read_back() {
        for kv_type in KvType::ALL {
            assert_eq!(kv_type.name().parse(), Ok(kv_type));
        }
        assert!("q4".parse::<KvType>().unwrap_err().contains("q8"));
    }

    #[test]
    #[should_panic(expected = "slot 12 of 12")]
    fn a_slot_outside_the_storage_is_refused() {
        let layout = KvLayout { num_kv_heads: 1, ..layout(KvType::F32) };
        let mut storage = vec![0; 3 * layout.block_bytes()];
        let rows = KvRows { k: &[0.0; 3], v: &[0.0; 3], row_stride: 3, slot_mapping: &[12] };
        write_kv(&ThreadPool::new(1), &layout, &rows, &mut storage);
    }
}
