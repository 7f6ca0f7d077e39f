//! The limit: TCP servers that do as little as can be done for the same bytes on the wire.
//!
//! They are taught a [`script::Script`] of fixed-size requests and canned replies, so that a load process cannot tell
//! them from the server under test, and count bytes instead of reading them. Owns the script and the epoll server; the
//! io_uring one is `io::bare_uring`. Must not know what the bytes mean, but for the first byte of a close frame.

pub(crate) mod epoll;
pub(crate) mod script;
