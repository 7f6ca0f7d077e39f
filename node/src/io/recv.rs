//! Receive buffers: lent to the kernel, given back after each chunk.
//!
//! Owns the memory of a ring of provided buffers (`IORING_REGISTER_PBUF_RING`). An idle connection holds
//! no buffer: the kernel takes one when bytes arrive and names it in the completion. When none is left
//! the receive ends with ENOBUFS and is armed again after buffers came back.
//!
//! Invariant: a buffer is either with the kernel or in exactly one unhandled completion; it is given
//! back once per completion that names it.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::BufRingEntry;

use super::kernel::StartError;
use super::ring::Ring;

/// The only group of buffers.
pub(super) const BUFFER_GROUP: u16 = 0;

/// The kernel's maximum of buffers in a group.
const BUFFERS_MAX: u16 = 1 << 15;

/// The kernel wants the ring of buffers on a page of its own.
const PAGE_BYTES: usize = 4096;

/// A shard's receive buffers.
pub(super) struct RecvBuffers {
    entries: *mut BufRingEntry,
    data: *mut u8,
    count: u16,
    buffer_bytes: u32,
    tail: u16,
}

impl RecvBuffers {
    /// Allocates `count` buffers (a power of two) of `buffer_bytes` and lends them to the kernel.
    ///
    /// The result must be dropped after `ring`.
    pub(super) fn open(ring: &Ring, count: u16, buffer_bytes: u32) -> Result<Self, StartError> {
        assert!(count.is_power_of_two() && count <= BUFFERS_MAX, "a power of two up to {BUFFERS_MAX}");
        assert!(buffer_bytes > 0, "buffers hold something");
        let mut buffers = Self {
            entries: allocate(entries_layout(count)).cast(),
            data: allocate(data_layout(count, buffer_bytes)),
            count,
            buffer_bytes,
            tail: 0,
        };
        // SAFETY: the entries are zeroed memory of the right size and alignment that lives as long as
        // `buffers`, which the caller keeps until the ring is gone.
        unsafe { ring.register_buffers(buffers.entries as u64, count, BUFFER_GROUP)? };
        for id in 0..count {
            buffers.give_back(id);
        }
        Ok(buffers)
    }

    /// The bytes of buffer `id`, of which the kernel filled `len`.
    pub(super) fn chunk(&mut self, id: u16, len: usize) -> &mut [u8] {
        assert!(id < self.count && len <= self.buffer_bytes as usize, "a buffer that was lent");
        // SAFETY: the buffer lies inside `data`; the kernel has given it up with its completion and gets
        // it back only by `give_back`, which needs `&mut self` and so ends this borrow.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(self.offset(id)), len) }
    }

    /// Lends buffer `id` to the kernel again.
    pub(super) fn give_back(&mut self, id: u16) {
        let index = usize::from(self.tail & (self.count - 1));
        // SAFETY: `index` is below `count`, so the entry lies inside `entries`; the kernel does not read
        // an entry at or after the tail, which is published below.
        let entry = unsafe { &mut *self.entries.add(index) };
        // SAFETY: `id` is below `count` for every buffer that the kernel names.
        entry.set_addr(unsafe { self.data.add(self.offset(id)) } as u64);
        entry.set_len(self.buffer_bytes);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail lies inside the first entry, is aligned, and is shared with the kernel as an
        // atomic.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(self.entries).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    fn offset(&self, id: u16) -> usize {
        usize::from(id) * self.buffer_bytes as usize
    }
}

impl Drop for RecvBuffers {
    fn drop(&mut self) {
        // SAFETY: both were allocated with these layouts and are freed once. The ring is gone, so nothing
        // receives into the buffers any more; the kernel pins the entries' pages for itself.
        unsafe {
            dealloc(self.entries.cast(), entries_layout(self.count));
            dealloc(self.data, data_layout(self.count, self.buffer_bytes));
        }
    }
}

fn entries_layout(count: u16) -> Layout {
    let bytes = usize::from(count) * size_of::<BufRingEntry>();
    Layout::from_size_align(bytes.next_multiple_of(PAGE_BYTES), PAGE_BYTES).expect("half a MiB at the most")
}

fn data_layout(count: u16, buffer_bytes: u32) -> Layout {
    let bytes = usize::from(count) * buffer_bytes as usize;
    Layout::from_size_align(bytes, PAGE_BYTES).expect("32,768 buffers of 4 GiB fit an address space")
}

fn allocate(layout: Layout) -> *mut u8 {
    // SAFETY: neither layout has size 0: there is at least one buffer and it has at least one byte.
    let memory = unsafe { alloc_zeroed(layout) };
    if memory.is_null() {
        handle_alloc_error(layout);
    }
    // Touched now, so that a crowd finds it there and it counts as what a shard costs, not a connection.
    for page in (0..layout.size()).step_by(PAGE_BYTES) {
        // SAFETY: `page` lies inside the allocation.
        unsafe { memory.add(page).write_volatile(0) };
    }
    memory
}
