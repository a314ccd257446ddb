//! An output slice that tasks of one operation write in disjoint parts.

use std::marker::PhantomData;

/// A `&mut [f32]` whose parts are handed to several threads.
pub(crate) struct SharedOut<'a> {
    start: *mut f32,
    len: usize,
    _borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for an exclusive borrow of plain floats; the only access is `part`, whose caller
// promises that concurrent parts do not overlap.
unsafe impl Send for SharedOut<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedOut<'_> {}

impl<'a> SharedOut<'a> {
    pub(crate) fn new(out: &'a mut [f32]) -> Self {
        SharedOut { start: out.as_mut_ptr(), len: out.len(), _borrow: PhantomData }
    }

    /// The first element. Writing through it has the rules of [`part`](Self::part).
    pub(crate) fn start(&self) -> *mut f32 {
        self.start
    }

    /// Elements `offset..offset + len`.
    ///
    /// # Safety
    /// No two live parts may overlap.
    ///
    /// # Panics
    /// If the part leaves the slice.
    #[inline]
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn part(&self, offset: usize, len: usize) -> &mut [f32] {
        assert!(offset <= self.len && len <= self.len - offset, "part {offset}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise and the borrow that
        // this value holds.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}
