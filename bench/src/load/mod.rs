//! The load processes: one thread, one epoll, many connections.
//!
//! [`engine`] turns socket readiness into messages of open connections and keeps connections in order from connect to
//! FIN; a [`scenario::Scenario`] decides what is said. Must not know the server's process, reports or rounds. The same
//! engine and scenarios run against the server under test and against bare ones. [`bus`] has no part in that: it is the
//! same traffic as [`cross`] by a broker's own client library.

pub(crate) mod bus;
pub(crate) mod churn;
pub(crate) mod cross;
pub(crate) mod echo;
pub(crate) mod engine;
pub(crate) mod fanout;
pub(crate) mod idle;
pub(crate) mod net;
pub(crate) mod openings;
pub(crate) mod scenario;
pub(crate) mod worker;
