//! Where keys and values stand in paged storage, and how a pass writes them there.
//!
//! A block holds `block_size` tokens of one layer. Per block and key/value head there is one tile:
//!
//! - keys `[num_blocks, num_kv_heads, head_dim, block_size]`: the same element of neighbouring keys is
//!   contiguous, so one vector load serves 16 keys and a score needs no sum across lanes;
//! - values `[num_blocks, num_kv_heads, block_size, head_dim]`.
//!
//! Both have [`KvLayout::block_len`] elements a block, so a block can be copied, shared or swapped out
//! as one stretch. Any `block_size` is right; a multiple of 16 is fast. Elements are f32; a narrower
//! type changes the element of the two slices and the loads of `attention`, not the layout.

/// Shape of one layer's paged storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Tokens of a block.
    pub block_size: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// Elements that one block takes in the key storage, and as many in the value storage.
    pub fn block_len(&self) -> usize {
        self.block_size * self.token_len()
    }

    /// Elements of one token's keys, and as many of its values.
    pub fn token_len(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// First element of the tile of a block and head, in either storage.
    pub(crate) fn tile(&self, block: usize, kv_head: usize) -> usize {
        (block * self.num_kv_heads + kv_head) * self.head_dim * self.block_size
    }
}

/// The keys and values of one pass, as its projections left them.
#[derive(Clone, Copy, Debug)]
pub struct KvRows<'a> {
    /// Token `t`'s keys are `k[t * row_stride..][..token_len]`, `[num_kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// Token `t`'s values, likewise.
    pub v: &'a [f32],
    /// Elements from one token to the next, so that both may be parts of a stacked projection.
    pub row_stride: usize,
    /// `[num_tokens]`: `block_id * block_size + offset`.
    pub slot_mapping: &'a [u32],
}

/// Writes one key and one value row per token into its slot. A slot named twice keeps the later row.
///
/// # Panics
/// If a row leaves `k` or `v`, a slot leaves the storage, or the storages differ in length.
pub fn write_kv(layout: &KvLayout, rows: &KvRows<'_>, k_cache: &mut [f32], v_cache: &mut [f32]) {
    let KvLayout { block_size, num_kv_heads, head_dim } = *layout;
    let KvRows { k, v, row_stride, slot_mapping } = *rows;
    let width = layout.token_len();
    let num_tokens = slot_mapping.len();
    let needed = num_tokens.checked_sub(1).map_or(0, |last| last * row_stride + width);
    assert!(
        k.len() >= needed && v.len() >= needed,
        "write_kv: {num_tokens} rows of {width} with stride {row_stride} need {needed} elements; k has {}, v {}",
        k.len(),
        v.len()
    );
    assert!(
        k_cache.len() == v_cache.len(),
        "write_kv: key storage of {} elements, value storage of {}",
        k_cache.len(),
        v_cache.len()
    );
    let num_slots = k_cache.len().checked_div(width).unwrap_or(0);
    for (token, &slot) in slot_mapping.iter().enumerate() {
        let slot = slot as usize;
        assert!(slot < num_slots, "write_kv: slot {slot} of {num_slots}");
        let (block, offset) = (slot / block_size, slot % block_size);
        for head in 0..num_kv_heads {
            let from = token * row_stride + head * head_dim;
            let tile = layout.tile(block, head);
            let keys = k_cache[tile + offset..].iter_mut().step_by(block_size);
            for (key, &value) in keys.zip(&k[from..from + head_dim]) {
                *key = value;
            }
            let to = tile + offset * head_dim;
            v_cache[to..to + head_dim].copy_from_slice(&v[from..from + head_dim]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lands_in_its_slot_and_touches_no_other() {
        let layout = KvLayout { block_size: 4, num_kv_heads: 2, head_dim: 3 };
        let mut k_cache = vec![-1.0; 3 * layout.block_len()];
        let mut v_cache = k_cache.clone();
        // Rows of 6 in a stride of 8.
        let k: Vec<f32> = (0..14).map(|i| i as f32).collect();
        let v: Vec<f32> = (100..114).map(|i| i as f32).collect();
        let rows = KvRows { k: &k, v: &v, row_stride: 8, slot_mapping: &[9, 2] };
        write_kv(&layout, &rows, &mut k_cache, &mut v_cache);
        for (token, slot) in [(0, 9), (1, 2)] {
            for head in 0..2 {
                for d in 0..3 {
                    let (block, offset) = (slot / 4, slot % 4);
                    let tile = (block * 2 + head) * 12;
                    let expected = (token * 8 + head * 3 + d) as f32;
                    assert_eq!(k_cache[tile + d * 4 + offset], expected);
                    assert_eq!(v_cache[tile + offset * 3 + d], expected + 100.0);
                }
            }
        }
        assert_eq!(k_cache.iter().filter(|&&x| x != -1.0).count(), 12);
        assert_eq!(v_cache.iter().filter(|&&x| x != -1.0).count(), 12);
    }

    #[test]
    #[should_panic(expected = "slot 12 of 12")]
    fn a_slot_outside_the_storage_is_refused() {
        let layout = KvLayout { block_size: 4, num_kv_heads: 1, head_dim: 2 };
        let (mut k_cache, mut v_cache) = (vec![0.0; 24], vec![0.0; 24]);
        let rows = KvRows { k: &[0.0; 2], v: &[0.0; 2], row_stride: 2, slot_mapping: &[12] };
        write_kv(&layout, &rows, &mut k_cache, &mut v_cache);
    }
}
