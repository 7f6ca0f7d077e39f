//! The board: a page of counters that the parent and its load processes share.
//!
//! The parent writes the phase, each load process writes its own counters, the publisher writes when it sent what.
//! All words are atomics with relaxed order: each has one writer, and no reader concludes anything from one word about
//! another except `sent_ns`, which is stored before the publication leaves and read after it came back through the
//! kernel. Its size is constant, about half a MiB.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The most load processes of one run.
pub(crate) const WORKERS_MAX: usize = 128;
/// The most publications in flight: send times are kept for as many. A power of two.
pub(crate) const IN_FLIGHT_MAX: usize = 1 << 16;

const PHASE: usize = 0;
const PUBLISHED: usize = 8;
const WORKERS: usize = 64;
/// Two cache lines for each process, so that writers do not disturb each other.
const WORDS_PER_WORKER: usize = 16;
const SENT: usize = WORKERS + WORKERS_MAX * WORDS_PER_WORKER;
const WORDS: usize = SENT + IN_FLIGHT_MAX;
const BYTES: usize = WORDS * 8;
const _: () = assert!(IN_FLIGHT_MAX.is_power_of_two() && (Counter::Completed as usize) < WORDS_PER_WORKER);

/// What the load processes are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Phase {
    /// Open the connections and keep them.
    Setup = 0,
    /// Produce load that does not count yet.
    Warmup = 1,
    /// Produce load that counts.
    Measure = 2,
    /// Close everything in good order, report and exit.
    Finish = 3,
}

/// What a load process counts. All but `Open` only grow.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Counter {
    /// Connections open now.
    Open,
    /// Connections that could not be opened or were lost.
    Failed,
    /// Units of work done: echoes, deliveries, connections opened and closed, publications received.
    Units,
    /// Bytes received and sent on sockets.
    BytesIn,
    BytesOut,
    /// Publications that all subscribers of this process have.
    Completed,
}

/// The shared page, mapped into this process.
#[derive(Debug)]
pub(crate) struct Board {
    words: NonNull<AtomicU64>,
    file: OwnedFd,
}

impl Board {
    /// A new board, all zero, phase [`Phase::Setup`].
    pub(crate) fn create() -> Result<Board, Errno> {
        let file = memfd_create("ringmain-bench", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, BYTES as u64)?;
        Board::map(file)
    }

    /// The board that another process made; `path` is its [`Board::path`].
    pub(crate) fn open(path: &str) -> std::io::Result<Board> {
        let file = File::options().read(true).write(true).open(path)?;
        if file.metadata()?.len() != BYTES as u64 {
            return Err(std::io::Error::other("the counters have another size: two different builds?"));
        }
        Ok(Board::map(file.into())?)
    }

    fn map(file: OwnedFd) -> Result<Board, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice, of a file that is BYTES long; nothing else in
        // this process refers to that memory, and other processes reach it through atomics only.
        let address =
            unsafe { mmap(std::ptr::null_mut(), BYTES, access, MapFlags::SHARED, file.as_fd(), 0)? };
        let words = NonNull::new(address.cast()).ok_or(Errno::NOMEM)?;
        Ok(Board { words, file })
    }

    /// Where a child of this process finds the board, as long as this process lives.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < WORDS);
        // SAFETY: the mapping holds WORDS aligned words (page-aligned start) and lives as long as self; zeroed memory
        // is a valid AtomicU64.
        unsafe { self.words.add(index).as_ref() }
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.word(PHASE).load(Ordering::Relaxed) {
            0 => Phase::Setup,
            1 => Phase::Warmup,
            2 => Phase::Measure,
            _ => Phase::Finish,
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.word(PHASE).store(phase as u64, Ordering::Relaxed);
    }

    fn counter(&self, worker: usize, counter: Counter) -> &AtomicU64 {
        assert!(worker < WORKERS_MAX);
        self.word(WORKERS + worker * WORDS_PER_WORKER + counter as usize)
    }

    pub(crate) fn set(&self, worker: usize, counter: Counter, value: u64) {
        self.counter(worker, counter).store(value, Ordering::Relaxed);
    }

    /// One counter over `workers` processes.
    pub(crate) fn sum(&self, workers: usize, counter: Counter) -> u64 {
        (0..workers).map(|worker| self.counter(worker, counter).load(Ordering::Relaxed)).sum()
    }

    /// How many publications all subscribers of all `workers` processes have.
    pub(crate) fn completed(&self, workers: usize) -> u64 {
        let completed = |worker| self.counter(worker, Counter::Completed).load(Ordering::Relaxed);
        (0..workers).map(completed).min().unwrap_or(0)
    }

    /// How many publications have been sent.
    pub(crate) fn published(&self) -> u64 {
        self.word(PUBLISHED).load(Ordering::Relaxed)
    }

    /// Notes that publication number `sequence` (from 0, one after another) is meant for `at_ns`.
    pub(crate) fn note_published(&self, sequence: u64, at_ns: u64) {
        self.word(SENT + sequence as usize % IN_FLIGHT_MAX).store(at_ns, Ordering::Relaxed);
        self.word(PUBLISHED).store(sequence + 1, Ordering::Relaxed);
    }

    /// When publication number `sequence` was meant to leave; only for one of the last [`IN_FLIGHT_MAX`].
    pub(crate) fn sent_ns(&self, sequence: u64) -> u64 {
        self.word(SENT + sequence as usize % IN_FLIGHT_MAX).load(Ordering::Relaxed)
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `map` with this size, and no reference into it outlives self.
        let unmapped = unsafe { munmap(self.words.as_ptr().cast(), BYTES) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_see_each_other() {
        let ours = Board::create().expect("a memfd");
        let theirs = Board::open(&ours.path()).expect("the same file");
        ours.set_phase(Phase::Measure);
        assert_eq!(theirs.phase(), Phase::Measure);
        for worker in [0, WORKERS_MAX - 1] {
            theirs.set(worker, Counter::Completed, 5 + worker as u64);
            theirs.set(worker, Counter::Open, 7);
        }
        assert_eq!(ours.sum(WORKERS_MAX, Counter::Open), 14);
        assert_eq!(ours.completed(1), 5);
        assert_eq!(ours.completed(2), 0);
        let last = IN_FLIGHT_MAX as u64 - 1;
        theirs.note_published(last, 42);
        assert_eq!((ours.published(), ours.sent_ns(last), ours.sent_ns(0)), (last + 1, 42, 0));
        theirs.note_published(last + 1, 43);
        assert_eq!(ours.sent_ns(0), 43);
    }
}
