//! What is measured and how numbers are treated: CPU time, memory, the machine, statistics, the open-loop schedule.
//!
//! Owns reading /proc, what [`sockets`] and a [`broker`] have counted, and arithmetic on samples. Must not know the
//! protocol of clients. Parsers are pure functions of
//! text, so that they are tested without the machine.

pub(crate) mod broker;
pub(crate) mod cpu;
pub(crate) mod latency;
pub(crate) mod machine;
pub(crate) mod memory;
pub(crate) mod schedule;
pub(crate) mod series;
pub(crate) mod sockets;
