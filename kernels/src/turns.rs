//! How long a thread's turn on a CPU is while others wait for it.
//!
//! Linux (since 6.12) lets each ordinary thread choose, without privileges. A thread that wakes and has a short turn
//! interrupts one with a longer turn at once, instead of waiting for the end of it, some milliseconds;
//! and one that waits for it waits less. Its share of the CPU stays what it was. So it is for threads that
//! do a little work often, beside others that compute without end.
//!
//! It is here because it takes a system call that no safe interface has.
//!
//! Source: sched_setattr(2); the kernel's `Documentation/scheduler/sched-eevdf.rst`.

use std::time::Duration;

/// Sets the length of the calling thread's turns, which threads that it starts inherit; the system keeps it
/// between 0.1 and 100 ms. `None` is the system's own choice. False where the system does not know of
/// turns or refuses; kernels before 6.12 accept and ignore it.
pub fn set(turn: Option<Duration>) -> bool {
    system::set(turn.map_or(0, |turn| turn.as_nanos() as u64))
}

/// The length that [`set`] chose for the calling thread; `None` if the system chooses, or does not tell.
pub fn get() -> Option<Duration> {
    system::get().filter(|&nanos| nanos > 0).map(Duration::from_nanos)
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod system {
    use std::ffi::{c_long, c_uint};

    #[cfg(target_arch = "x86_64")]
    const SCHED_SETATTR: c_long = 314;
    #[cfg(target_arch = "x86_64")]
    const SCHED_GETATTR: c_long = 315;
    #[cfg(target_arch = "aarch64")]
    const SCHED_SETATTR: c_long = 274;
    #[cfg(target_arch = "aarch64")]
    const SCHED_GETATTR: c_long = 275;

    /// `struct sched_attr` as it was first; later kernels accept it by its size.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        /// For ordinary threads the length of a turn in nanoseconds, 0 if the system chooses.
        runtime: u64,
        deadline: u64,
        period: u64,
    }

    const SIZE: c_uint = size_of::<Attributes>() as c_uint;
    const THIS_THREAD: c_long = 0;
    const NO_FLAGS: c_uint = 0;

    unsafe extern "C" {
        /// The C library's, which the standard library links.
        fn syscall(number: c_long, ...) -> c_long;
    }

    fn attributes() -> Option<Attributes> {
        let mut attributes = Attributes::default();
        // SAFETY: the call writes at most `SIZE` bytes, the structure's size, to where it points; every bit
        // pattern is a value of it.
        let result = unsafe { syscall(SCHED_GETATTR, THIS_THREAD, &raw mut attributes, SIZE, NO_FLAGS) };
        (result == 0).then_some(attributes)
    }

    pub(super) fn get() -> Option<u64> {
        // Kernels that give no turns to ordinary threads leave it 0.
        attributes().map(|attributes| attributes.runtime)
    }

    pub(super) fn set(nanos: u64) -> bool {
        /// `SCHED_OTHER` and `SCHED_BATCH`; the others' `runtime` means something else.
        const ORDINARY: [u32; 2] = [0, 3];
        let Some(mut attributes) = attributes().filter(|a| ORDINARY.contains(&a.policy)) else {
            return false;
        };
        attributes.size = SIZE;
        attributes.runtime = nanos;
        // SAFETY: the call reads `size` bytes, the structure's size, and changes nothing in this process's memory.
        (unsafe { syscall(SCHED_SETATTR, THIS_THREAD, &raw const attributes, NO_FLAGS) }) == 0
    }
}

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod system {
    pub(super) fn get() -> Option<u64> {
        None
    }

    pub(super) fn set(_nanos: u64) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_kept_inherited_and_given_back() {
        let on_a_thread = || {
            let turn = Duration::from_micros(300);
            if !set(Some(turn)) || get().is_none() {
                return; // A system without turns.
            }
            assert_eq!(get(), Some(turn));
            std::thread::spawn(move || assert_eq!(get(), Some(turn))).join().expect("inherited");
            assert!(set(None));
            assert_ne!(get(), Some(turn));
        };
        std::thread::spawn(on_a_thread).join().expect("kept");
    }
}
