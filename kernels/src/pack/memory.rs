//! The memory that panels lie in: whole cache lines, in pages of 2 MiB where the system has them.
//!
//! A pass reads every weight once, so it meets a new page of 4 KiB every hundred nanoseconds; with large
//! pages the same read is a fifth to a third faster. What is left of a matrix after its last whole
//! large page stays in small ones: nothing is wasted.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
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

/// The bytes of plain numbers.
pub(crate) fn bytes_of<T: Number>(elements: &[T]) -> &[u8] {
    // SAFETY: a number is its bytes, without padding.
    unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
}

/// What [`bytes_of`] takes.
pub(crate) trait Number {}

impl Number for f32 {}
impl Number for u16 {}

/// A large page, and the least that is worth one.
const LARGE_PAGE: usize = 2 << 20;

/// A multiple of the system's ordinary page, whatever it is.
const SMALL_PAGE: usize = 64 << 10;

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
    /// `len` lines of zeros. Pages of a large number of them are the system's to hand out when they are
    /// first written, to whoever does.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Lines { start: NonNull::dangling(), len };
        }
        let layout = layout(len);
        let start = if is_mapped(layout) { map(layout) } else { allocate(layout) };
        let Some(start) = start else { handle_alloc_error(layout) };
        Lines { start: start.cast(), len }
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
            let layout = layout(self.len);
            if is_mapped(layout) {
                unmap(self.start.cast(), mapped_size(layout));
            } else {
                // SAFETY: allocated in `zeroed` with this layout.
                unsafe { dealloc(self.start.as_ptr().cast(), layout) };
            }
        }
    }
}

fn layout(len: usize) -> Layout {
    let size = len.checked_mul(LINE_BYTES).expect("a matrix that fits the address space");
    let align = if size >= LARGE_PAGE { LARGE_PAGE } else { LINE_BYTES };
    Layout::from_size_align(size, align).expect("a matrix that fits the address space")
}

fn allocate(layout: Layout) -> Option<NonNull<u8>> {
    // SAFETY: the layout has a size.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

/// True if lines of this layout are a mapping of their own, with large pages where the system has them.
fn is_mapped(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.align() == LARGE_PAGE
}

fn mapped_size(layout: Layout) -> usize {
    layout.size().next_multiple_of(SMALL_PAGE)
}

/// A mapping that begins with a large page. The allocator would give none that the system has not
/// cleared already, and clear it again.
#[cfg(target_os = "linux")]
fn map(layout: Layout) -> Option<NonNull<u8>> {
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
    let size = mapped_size(layout);
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, wherever the system likes.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size + LARGE_PAGE, access, MapFlags::PRIVATE) };
    let start = NonNull::new(start.ok()?.cast::<u8>())?;
    let before = start.align_offset(LARGE_PAGE);
    // SAFETY: within the mapping; what lies before and after is given back.
    let lines = unsafe { start.add(before) };
    if before > 0 {
        unmap(start, before);
    }
    // SAFETY: within the mapping, or its end.
    unmap(unsafe { lines.add(size) }, LARGE_PAGE - before);
    // A system that has no large pages, or refuses, goes on with small ones.
    // SAFETY: the range is this process's own fresh mapping; the advice changes no contents.
    let _ = unsafe { madvise(lines.as_ptr().cast(), size / LARGE_PAGE * LARGE_PAGE, Advice::LinuxHugepage) };
    Some(lines)
}

/// Gives back whole pages of a mapping that nobody uses any more.
#[cfg(target_os = "linux")]
fn unmap(start: NonNull<u8>, size: usize) {
    // SAFETY: the callers' own mapping. It fails only for what is no mapping.
    let _ = unsafe { rustix::mm::munmap(start.as_ptr().cast(), size) };
}

#[cfg(not(target_os = "linux"))]
fn map(_layout: Layout) -> Option<NonNull<u8>> {
    None
}

#[cfg(not(target_os = "linux"))]
fn unmap(_start: NonNull<u8>, _size: usize) {}

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
