//! What a kind of load decides; the engine does the rest.

use super::net::Net;
use crate::io::board::Phase;
use crate::plan::WorkerReport;

/// A message on an open connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Incoming {
    /// A reply to a command; `error` is the server's code.
    Reply {
        error: Option<u32>,
    },
    Publication {
        offset: u64,
    },
    /// A WebSocket pong.
    Pong,
}

/// One kind of load. Connections are numbered from 0 within the load process. Calls come from one thread; none may
/// block, and what is sent goes through [`Net::send`].
pub(crate) trait Scenario {
    /// Appends what connection `index` sends first after the upgrade; returns how many replies open it (0: none, it
    /// is open at once).
    fn opening(&mut self, index: usize, out: &mut Vec<u8>) -> u32;

    /// Connection `index` is open.
    fn opened(&mut self, _net: &mut Net, _index: usize) {}

    /// A message came on open connection `index`.
    fn message(&mut self, net: &mut Net, index: usize, incoming: Incoming);

    /// All messages that one read brought have been given: the time to send, in one piece.
    fn drained(&mut self, _net: &mut Net, _index: usize) {}

    /// Connection `index` has ended; `clean` after close frames both ways and FIN.
    fn closed(&mut self, _net: &mut Net, _index: usize, _clean: bool) {}

    /// The parent has begun another phase.
    fn phase(&mut self, _net: &mut Net, _phase: Phase) {}

    /// Once for every turn of the engine; returns when it wants the next one at the latest (monotonic nanoseconds).
    fn turn(&mut self, _net: &mut Net) -> Option<u64> {
        None
    }

    /// Units of work done so far.
    fn units(&self) -> u64;

    /// Publications that every subscriber of this process has.
    fn completed(&self) -> u64 {
        0
    }

    /// The result: latencies, own problems, sizes.
    fn report(&mut self, report: &mut WorkerReport);
}
