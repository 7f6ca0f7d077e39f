//! Ringmain: an io_uring edge node for realtime messaging. See `ARCHITECTURE.md`.

pub mod control;
pub mod core;
pub mod io;
