//! Zeroed memory for the KV cache, and a thread that makes its pages ready before they are needed.
//!
//! The system hands out a page, and zeroes it, when it is first touched: tenths of a millisecond for a
//! large one, milliseconds on a virtual machine whose host has to find the memory too. A pass that comes
//! to the end of a page does so in every layer at once, and would stand still in each. So the warmer
//! touches pages some way ahead of what is in use, at the lowest priority. Even so it holds up whom the system puts
//! aside for it, until the page is done or the clock's next tick, some milliseconds. So it works while nobody
//! computes, and beside others only when little is left. What is never in use, nor so far ahead, is never touched.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapRaw};

use crate::pool::ThreadPool;
use crate::pool::activity::Activity;

/// A fixed number of bytes, zero at first, in large pages where the system has them.
#[derive(Debug)]
pub struct ZeroedPages {
    map: Arc<MmapRaw>,
}

impl ZeroedPages {
    /// `len` bytes. None of their pages is touched.
    ///
    /// # Errors
    /// If the system has no room for as many addresses.
    pub fn new(len: usize) -> io::Result<Self> {
        let map = MmapMut::map_anon(len)?;
        #[cfg(target_os = "linux")]
        // A system without large pages is only slower.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(ZeroedPages { map: Arc::new(map.into()) })
    }
}

impl std::ops::Deref for ZeroedPages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping's bytes are initialised and live as long as this value. Others hold the
        // mapping only to advise the system, which changes no contents.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr(), self.map.len()) }
    }
}

impl std::ops::DerefMut for ZeroedPages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; the borrow is exclusive, and nobody else makes slices of the mapping.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr(), self.map.len()) }
    }
}

const LARGE_PAGE: usize = 2 << 20;

/// Least bytes ahead in each memory, so that a large page is ready before the last one is full.
const LEAST_AHEAD: usize = 2 * LARGE_PAGE;

/// Nobody computes if no operation has been in flight for so long: a pause between two requests is shorter.
const IDLE: Duration = Duration::from_millis(100);

/// Behind a page made ready beside others, the warmer rests as long as that took, but no longer than this.
const LONGEST_REST: Duration = Duration::from_millis(1);

/// Makes pages ready ahead of use. Ends its thread when it is dropped.
#[derive(Debug)]
pub struct PageWarmer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    watched: Mutex<Vec<Watched>>,
    /// Bytes ahead of use, in all memories together.
    ahead: usize,
    /// The first so many blocks of every memory are in use.
    num_used_blocks: AtomicUsize,
    /// Of the pool that computes.
    activity: Activity,
    /// From so many on there is work again.
    wake_at: AtomicUsize,
    closing: AtomicBool,
}

#[derive(Debug)]
struct Watched {
    map: Weak<MmapRaw>,
    block_bytes: usize,
    /// From the start, in bytes.
    num_ready: usize,
}

impl PageWarmer {
    /// Keeps `ahead` bytes ready beyond what is in use, over all memories, and at least two large pages of each; a
    /// quarter of them, and at least the two, even while operations run on `pool`.
    pub fn new(ahead: usize, pool: &ThreadPool) -> Self {
        let shared = Shared {
            watched: Mutex::default(),
            ahead,
            num_used_blocks: AtomicUsize::new(0),
            activity: pool.activity().clone(),
            wake_at: AtomicUsize::new(0),
            closing: AtomicBool::new(false),
        };
        PageWarmer { shared: Arc::new(shared), thread: None }
    }

    /// Makes the pages of `pages` ready too, of which blocks of `block_bytes` come into use from the front.
    /// Without effect where the system cannot do it, or has no thread to give.
    pub fn watch(&mut self, pages: &ZeroedPages, block_bytes: usize) {
        if cfg!(not(target_os = "linux")) || pages.is_empty() {
            return;
        }
        let watched = Watched { map: Arc::downgrade(&pages.map), block_bytes, num_ready: 0 };
        self.shared.lock().push(watched);
        let thread = self.thread.take().or_else(|| {
            let shared = Arc::clone(&self.shared);
            thread::Builder::new().name("page-warmer".into()).spawn(move || shared.run()).ok()
        });
        self.thread = thread.inspect(|thread| thread.thread().unpark());
    }

    /// Notes that the first `num_blocks` blocks of every memory are in use. A load and a store, and now and then a
    /// wake-up.
    pub fn note_use(&self, num_blocks: usize) {
        let before = self.shared.num_used_blocks.fetch_max(num_blocks, Ordering::Relaxed);
        if num_blocks > before
            && num_blocks >= self.shared.wake_at.load(Ordering::Relaxed)
            && let Some(thread) = &self.thread
        {
            thread.thread().unpark();
        }
    }
}

impl Drop for PageWarmer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It does not panic; if it did, nothing depends on it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        #[cfg(target_os = "linux")]
        // Without it the warmer only gets in the way a little more.
        let _ = rustix::process::setpriority_process(None, 19);
        // What the pool had done when it was last seen to compute.
        let mut seen = (self.activity.count(), Instant::now());
        while !self.closing.load(Ordering::Relaxed) {
            let count = self.activity.count();
            if count != seen.0 || count % 2 == 1 {
                seen = (count, Instant::now());
            }
            let quiet = seen.1.elapsed();
            match self.next(quiet >= IDLE) {
                Next::Page(map, begin) => {
                    let start = Instant::now();
                    if !make_ready(&map, begin) {
                        return;
                    }
                    if quiet < IDLE {
                        thread::sleep(start.elapsed().min(LONGEST_REST));
                    }
                }
                Next::WhenIdle => thread::park_timeout(IDLE - quiet),
                Next::Nothing => thread::park(),
            }
        }
    }

    /// What there is to do, if nobody computes (`is_idle`) or somebody does.
    fn next(&self, is_idle: bool) -> Next {
        let mut watched = self.lock();
        watched.retain(|memory| memory.map.strong_count() > 0);
        let ahead = (self.ahead / watched.len().max(1)).max(LEAST_AHEAD);
        let num_used = self.num_used_blocks.load(Ordering::Relaxed);
        let mut least_blocks_ahead = usize::MAX;
        let mut next: Option<(Arc<MmapRaw>, &mut Watched)> = None;
        for memory in watched.iter_mut() {
            let Some(map) = memory.map.upgrade() else { continue };
            let blocks_ahead = memory.num_blocks(ahead);
            least_blocks_ahead = least_blocks_ahead.min(blocks_ahead);
            let is_next = next.as_ref().is_none_or(|(_, next)| memory.num_ready < next.num_ready);
            if memory.num_ready < memory.end_of(num_used, ahead).min(map.len()) && is_next {
                next = Some((map, memory));
            }
        }
        let Some((map, memory)) = next else {
            self.wake_at.store(num_used.saturating_add(least_blocks_ahead.div_ceil(4)), Ordering::Relaxed);
            return Next::Nothing;
        };
        let least_ahead = (ahead / 4).max(LEAST_AHEAD);
        if !is_idle && memory.num_ready >= memory.end_of(num_used, least_ahead) {
            let num_ready_blocks = memory.num_ready / memory.block_bytes.max(1);
            let urgent_at = num_ready_blocks.saturating_sub(memory.num_blocks(least_ahead)) + 1;
            self.wake_at.store(urgent_at, Ordering::Relaxed);
            return Next::WhenIdle;
        }
        let begin = memory.num_ready;
        memory.num_ready += LARGE_PAGE;
        Next::Page(map, begin)
    }
}

/// What the warmer has to do.
enum Next {
    /// To make ready the large page of a memory that begins at so many bytes.
    Page(Arc<MmapRaw>, usize),
    /// Something that can wait until nobody computes.
    WhenIdle,
    Nothing,
}

impl Watched {
    /// Blocks in so many bytes, at least one.
    fn num_blocks(&self, len: usize) -> usize {
        (len / self.block_bytes.max(1)).max(1)
    }

    /// Where `ahead` bytes behind the blocks in use end, from the start.
    fn end_of(&self, num_used_blocks: usize, ahead: usize) -> usize {
        num_used_blocks.saturating_add(self.num_blocks(ahead)).saturating_mul(self.block_bytes)
    }
}

/// False if the system cannot do it.
#[cfg(target_os = "linux")]
fn make_ready(map: &MmapRaw, begin: usize) -> bool {
    let len = LARGE_PAGE.min(map.len() - begin);
    map.advise_range(memmap2::Advice::PopulateWrite, begin, len).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn make_ready(_map: &MmapRaw, _begin: usize) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_pages_are_zero_and_hold_what_is_written() {
        let mut pages = ZeroedPages::new(3 * LARGE_PAGE + 5).unwrap();
        assert!(pages.iter().all(|&byte| byte == 0));
        pages[LARGE_PAGE] = 7;
        assert_eq!((pages.len(), pages[LARGE_PAGE]), (3 * LARGE_PAGE + 5, 7));
    }

    #[test]
    fn what_is_written_while_pages_are_made_ready_stays() {
        const LEN: usize = 16 * LARGE_PAGE;
        let mut warmer = PageWarmer::new(LEN, &ThreadPool::new(1));
        let mut pages = ZeroedPages::new(LEN).unwrap();
        warmer.watch(&pages, 4096);
        for (i, byte) in pages.iter_mut().enumerate().step_by(1021) {
            *byte = i as u8;
        }
        warmer.note_use(LEN / 4096);
        drop(warmer);
        assert!(pages.iter().enumerate().step_by(1021).all(|(i, &byte)| byte == i as u8));
    }

    /// Bytes of the mapping that have pages.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn num_resident(pages: &ZeroedPages) -> usize {
        use std::os::unix::fs::FileExt as _;
        const PAGE: usize = 4096;
        let mut entries = vec![0; pages.len() / PAGE * 8];
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        pagemap.read_exact_at(&mut entries, (pages.as_ptr() as usize / PAGE * 8) as u64).unwrap();
        // The highest bit of an entry, the last byte's.
        entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count() * PAGE
    }

    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    #[test]
    fn pages_are_ready_some_way_ahead_of_use_and_no_further() {
        let mut warmer = PageWarmer::new(0, &ThreadPool::new(1));
        let pages = ZeroedPages::new(32 * LARGE_PAGE).unwrap();
        if pages.map.advise_range(memmap2::Advice::PopulateWrite, 0, 1).is_err() {
            return; // A kernel before 5.14.
        }
        warmer.watch(&pages, LARGE_PAGE / 2);
        for (num_blocks, num_large_pages) in [(0, 2), (16, 10), (3, 10)] {
            warmer.note_use(num_blocks);
            let patience = Instant::now() + Duration::from_secs(20);
            while num_resident(&pages) < num_large_pages * LARGE_PAGE && Instant::now() < patience {
                thread::sleep(Duration::from_millis(2));
            }
            // The system's large pages need not begin where the memory does.
            let resident = num_resident(&pages) / LARGE_PAGE;
            assert!((num_large_pages..=num_large_pages + 1).contains(&resident), "{resident}");
        }
    }

    #[test]
    fn beside_a_computing_pool_only_what_is_soon_needed_is_made_ready() {
        const AHEAD: usize = 16 * LARGE_PAGE;
        let warmer = PageWarmer::new(AHEAD, &ThreadPool::new(1));
        let pages = ZeroedPages::new(64 * LARGE_PAGE).unwrap();
        // Watched by nobody's thread: the test asks itself.
        let memory = Watched { map: Arc::downgrade(&pages.map), block_bytes: LARGE_PAGE, num_ready: 0 };
        warmer.shared.lock().push(memory);
        let pages_until_rest = |is_idle| {
            let is_page = |next: &Next| matches!(next, Next::Page(..));
            std::iter::repeat_with(|| warmer.shared.next(is_idle)).take_while(is_page).count()
        };
        assert_eq!(pages_until_rest(false), 4);
        assert!(matches!(warmer.shared.next(false), Next::WhenIdle));
        assert_eq!(pages_until_rest(true), 12);
        assert!(matches!(warmer.shared.next(true), Next::Nothing));
        warmer.note_use(13);
        assert_eq!(pages_until_rest(false), 1);
        assert_eq!(pages_until_rest(true), 12);
    }

    #[test]
    fn memory_that_is_gone_is_passed_over() {
        let mut warmer = PageWarmer::new(1 << 20, &ThreadPool::new(1));
        warmer.watch(&ZeroedPages::new(LARGE_PAGE).unwrap(), 64);
        let pages = ZeroedPages::new(LARGE_PAGE).unwrap();
        warmer.watch(&pages, 64);
        warmer.note_use(1000);
        assert_eq!(pages[0], 0);
    }
}
