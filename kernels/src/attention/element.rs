//! How keys and values of one [`KvType`] become lanes of f32.

use crate::LANES;
use crate::kv::KvType;
use crate::simd::Simd;

/// An element type of stored keys and values.
pub(crate) trait Element {
    const TYPE: KvType;
    /// 16 elements.
    ///
    /// # Safety
    /// The processor has `V`'s instruction set; they are readable.
    unsafe fn load<V: Simd>(from: *const u8) -> V;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Q8;

impl Element for F32 {
    const TYPE: KvType = KvType::F32;
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: the caller's promise; loads need no alignment.
        unsafe { V::load(from.cast()) }
    }
}

impl Element for F16 {
    const TYPE: KvType = KvType::F16;
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_f16(from) }
    }
}

impl Element for Q8 {
    const TYPE: KvType = KvType::Q8;
    #[inline(always)]
    unsafe fn load<V: Simd>(from: *const u8) -> V {
        // SAFETY: the caller's promise.
        unsafe { V::load_i8_as_f32(from) }
    }
}

/// The first `count <= 16` elements, and zeros.
///
/// # Safety
/// The processor has `V`'s instruction set; the elements are readable.
#[inline(always)]
pub(super) unsafe fn load_part<V: Simd, E: Element>(from: *const u8, count: usize) -> V {
    // SAFETY: the caller's promise; the copy has room for 16 elements of every type.
    unsafe {
        if count == LANES {
            return E::load(from);
        }
        let mut copy = [0u8; LANES * size_of::<f32>()];
        std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), count * E::TYPE.element_bytes());
        E::load(copy.as_ptr())
    }
}
