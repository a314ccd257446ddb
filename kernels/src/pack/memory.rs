//! The memory that panels lie in: whole cache lines, in pages of 2 MiB where the system has them.
//!
//! A pass reads every weight once, so it meets a new page of 4 KiB every hundred nanoseconds; with large
//! pages the same read is a fifth to a third faster. What is left of a matrix after its last whole
//! large page stays in small ones: nothing is wasted.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;

pub(crate) const LINE_BYTES: usize = 64;

/// A cache line of packed weights.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; LINE_BYTES]);

const _: () = assert!(size_of::<Line>() == LINE_BYTES && align_of::<Line>() == LINE_BYTES);

/// The bytes of lines that lie one after the other.
pub(crate) fn bytes_mut(lines: &mut [Line]) -> &mut [u8] {
    // SAFETY: a line is its bytes, without padding.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), size_of_val(lines)) }
}

/// A large page, and the least that is worth one.
const LARGE_PAGE: usize = 2 << 20;

/// A fixed number of lines, zero at first.
pub(crate) struct Lines {
    start: NonNull<Line>,
    len: usize,
}

// SAFETY: it owns plain bytes; shared access only reads.
unsafe impl Send for Lines {}
// SAFETY: as above.
unsafe impl Sync for Lines {}

impl Lines {
    /// `len` lines of zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Lines { start: NonNull::dangling(), len };
        }
        let layout = layout(len);
        // SAFETY: the layout has a size.
        let start = unsafe { alloc(layout) }.cast::<Line>();
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        if layout.align() == LARGE_PAGE {
            advise_large_pages(start.cast(), layout.size());
        }
        // After the advice: the first write to a page decides its size.
        // SAFETY: `len` lines were allocated at `start`; zero bytes are a line.
        unsafe { start.write_bytes(0, len) };
        Lines { start, len }
    }
}

impl std::ops::Deref for Lines {
    type Target = [Line];

    fn deref(&self) -> &[Line] {
        // SAFETY: `len` initialised lines lie at `start` for as long as this value lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [Line] {
        // SAFETY: as for `deref`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout(self.len)) };
        }
    }
}

fn layout(len: usize) -> Layout {
    let size = len.checked_mul(LINE_BYTES).expect("a matrix that fits the address space");
    let align = if size >= LARGE_PAGE { LARGE_PAGE } else { LINE_BYTES };
    Layout::from_size_align(size, align).expect("a matrix that fits the address space")
}

/// Asks for large pages; a system that has none, or refuses, goes on with small ones.
#[cfg(target_os = "linux")]
fn advise_large_pages(start: NonNull<u8>, size: usize) {
    // SAFETY: the range is this process's own fresh allocation, whole pages of it; the advice changes no
    // contents.
    let _ = unsafe {
        rustix::mm::madvise(
            start.as_ptr().cast(),
            size / LARGE_PAGE * LARGE_PAGE,
            rustix::mm::Advice::LinuxHugepage,
        )
    };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_start: NonNull<u8>, _size: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_zero_aligned_and_writable_at_every_size() {
        for len in [0, 1, 3, LARGE_PAGE / LINE_BYTES - 1, LARGE_PAGE / LINE_BYTES, 100_000] {
            let mut lines = Lines::zeroed(len);
            assert_eq!(lines.len(), len);
            assert!(lines.iter().all(|line| line.0 == [0; LINE_BYTES]));
            if len * LINE_BYTES >= LARGE_PAGE {
                assert_eq!(lines.as_ptr() as usize % LARGE_PAGE, 0);
            }
            if let Some(last) = lines.last_mut() {
                last.0[63] = 7;
                assert_eq!(lines[len - 1].0[63], 7);
            }
        }
    }
}
