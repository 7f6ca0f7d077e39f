//! The only place of this crate with `unsafe`: memory shared between processes, signals, timers, the bare io_uring
//! server.
//!
//! Each file wraps one kernel interface so that its callers are safe code, and each block says why it is sound.

#![allow(unsafe_code)]

pub(crate) mod alarm;
pub(crate) mod bare_uring;
pub(crate) mod board;
pub(crate) mod buffers;
pub(crate) mod signals;
pub(crate) mod socket;
