//! An output slice that tasks of one operation write in disjoint parts.

use std::marker::PhantomData;

/// A `&mut [T]` whose parts are handed to several threads.
pub(crate) struct SharedOut<'a, T = f32> {
    start: *mut T,
    len: usize,
    _borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for an exclusive borrow of values that may be sent; the only access is `part`, whose caller
// promises that concurrent parts do not overlap.
unsafe impl<T: Send> Send for SharedOut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedOut<'_, T> {}

impl<'a, T> SharedOut<'a, T> {
    pub(crate) fn new(out: &'a mut [T]) -> Self {
        SharedOut { start: out.as_mut_ptr(), len: out.len(), _borrow: PhantomData }
    }

    /// The first element. Writing through it has the rules of [`part`](Self::part).
    pub(crate) fn start(&self) -> *mut T {
        self.start
    }

    /// What lies from `offset` on, under the same promise: parts of either must not overlap.
    ///
    /// # Panics
    /// If `offset` is beyond the end.
    pub(crate) fn after(&self, offset: usize) -> SharedOut<'_, T> {
        assert!(offset <= self.len, "from {offset} on of {}", self.len);
        // SAFETY: in bounds, or one past the end.
        let start = unsafe { self.start.add(offset) };
        SharedOut { start, len: self.len - offset, _borrow: PhantomData }
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
    pub(crate) unsafe fn part(&self, offset: usize, len: usize) -> &mut [T] {
        assert!(offset <= self.len && len <= self.len - offset, "part {offset}+{len} of {}", self.len);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise and the borrow that
        // this value holds.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) }
    }
}
