//! A ring of buffers provided to the kernel: a multishot recv takes one when bytes arrive, not before.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::{IoUring, types::BufRingEntry};

/// How many buffers there are; a power of two (io_uring_register_buf_ring(3)).
pub(crate) const BUFFER_COUNT: u16 = 1024;
/// The size of each.
pub(crate) const BUFFER_BYTES: usize = 4096;

const PAGE_BYTES: usize = 4096;
const RING_BYTES: usize = BUFFER_COUNT as usize * size_of::<BufRingEntry>();
const ALL_BYTES: usize = RING_BYTES + BUFFER_COUNT as usize * BUFFER_BYTES;
const _: () = assert!(BUFFER_COUNT.is_power_of_two() && RING_BYTES.is_multiple_of(PAGE_BYTES));

/// The ring of entries, page-aligned, and the buffers right behind it.
pub(crate) struct Buffers {
    memory: *mut u8,
    tail: u16,
}

impl Buffers {
    /// Makes the buffers and registers them as `group`. The ring must not outlive the result.
    pub(crate) fn register(ring: &IoUring, group: u16) -> io::Result<Buffers> {
        let layout = Buffers::layout();
        // SAFETY: the layout has a size above 0.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        let mut buffers = Buffers { memory, tail: 0 };
        // SAFETY: the memory holds BUFFER_COUNT entries, is page-aligned, and is freed only when self is dropped,
        // which the caller does after the ring's end.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(memory as u64, BUFFER_COUNT, group, 0)?;
        }
        (0..BUFFER_COUNT).for_each(|id| buffers.give_back(id));
        Ok(buffers)
    }

    fn layout() -> Layout {
        Layout::from_size_align(ALL_BYTES, PAGE_BYTES).expect("constant, aligned to a power of two")
    }

    fn start(&self, id: u16) -> *mut u8 {
        assert!(id < BUFFER_COUNT);
        // SAFETY: within the allocation, for id is below BUFFER_COUNT.
        unsafe { self.memory.add(RING_BYTES + id as usize * BUFFER_BYTES) }
    }

    /// What the kernel wrote into buffer `id`, which it handed over with a completion of `length` bytes.
    pub(crate) fn filled(&self, id: u16, length: usize) -> &[u8] {
        assert!(length <= BUFFER_BYTES);
        // SAFETY: within the allocation and initialised (zeroed at first); the kernel writes to it again only after
        // `give_back`, which takes self mutably.
        unsafe { std::slice::from_raw_parts(self.start(id), length) }
    }

    /// Lets the kernel use buffer `id` again.
    pub(crate) fn give_back(&mut self, id: u16) {
        let index = usize::from(self.tail & (BUFFER_COUNT - 1));
        let start = self.start(id) as u64;
        // SAFETY: `index` is below BUFFER_COUNT, and the kernel does not look at an entry before the tail passes it.
        unsafe {
            let entry = &mut *self.memory.cast::<BufRingEntry>().add(index);
            entry.set_addr(start);
            entry.set_len(BUFFER_BYTES as u32);
            entry.set_bid(id);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies in the first entry of the ring, is aligned for u16, and is written by us alone; the
        // release order makes the entry visible to the kernel before the tail.
        unsafe {
            let tail = BufRingEntry::tail(self.memory.cast::<BufRingEntry>()).cast_mut();
            AtomicU16::from_ptr(tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in `register` with the same layout.
        unsafe { dealloc(self.memory, Buffers::layout()) };
    }
}
