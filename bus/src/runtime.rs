//! What joins hub and backend on the control thread: the queues between them, and the hub's loop.
//!
//! Owns: when the hub is given what. Must not know: brokers, chains. Apart from the backends it is all of this crate
//! that knows a runtime.

use std::sync::Arc;
use std::time::Duration;

use ringmain_proto::time::Now;
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};
use tokio::sync::{Notify, mpsc};

use crate::backend::{Reply, Request};
use crate::hub::Hub;
use crate::link::{Bell, End};

/// Commands of one port, and replies of the backend, taken before others have their turn.
const TAKEN_PER_TURN_MAX: usize = 512;

/// The hub's ends of the way to a backend.
///
/// Requests are bounded by the hub: its commands in flight and its channels. Replies are bounded: a backend that
/// waits for room stops reading from the broker, which then cuts it, and that is a loss.
#[derive(Debug)]
pub struct HubEnds {
    /// To the backend.
    pub requests: mpsc::UnboundedSender<Request>,
    /// From the backend.
    pub replies: mpsc::Receiver<Reply>,
}

/// The backend's ends.
#[derive(Debug)]
pub struct BackendEnds {
    /// From the hub. Closed: the node ends.
    pub requests: mpsc::UnboundedReceiver<Request>,
    /// To the hub.
    pub replies: mpsc::Sender<Reply>,
    /// That ports ring for the hub.
    pub bell: Arc<Bell>,
}

/// Replies on their way to the hub.
pub const REPLIES_MAX: usize = 4_096;

/// Both ends, of a hub whose ports ring this bell.
pub fn ends(bell: Arc<Bell>) -> (HubEnds, BackendEnds) {
    let (requests, requested) = mpsc::unbounded_channel();
    let (replies, replied) = mpsc::channel(REPLIES_MAX);
    (HubEnds { requests, replies: replied }, BackendEnds { requests: requested, replies, bell })
}

/// Tells the hub, and waits for room. A hub that is gone needs no answer: the backend ends with its requests.
pub(crate) async fn tell(replies: &mpsc::Sender<Reply>, reply: Reply) {
    // Almost always there is room, and a reply is large: the way of waiting copies it several times.
    if let Err(TrySendError::Full(reply)) = replies.try_send(reply) {
        let _ = Box::pin(replies.send(reply)).await;
    }
}

/// Runs a hub until the backend ends. `commands` is notified by the ports; `told` sees the hub after every turn (its
/// health and figures).
pub async fn run(
    mut hub: Hub,
    mut ends: Vec<End>,
    mut backend: HubEnds,
    commands: Arc<Notify>,
    clock: impl Fn() -> Now,
    mut told: impl FnMut(&Hub),
) {
    loop {
        let mut more = false;
        let now = clock();
        for port in 0..ends.len() {
            for taken in 1..=TAKEN_PER_TURN_MAX {
                let Some(command) = ends[port].command() else { break };
                hub.command(now, port, command, &mut ends);
                more |= taken == TAKEN_PER_TURN_MAX;
            }
        }
        for taken in 1..=TAKEN_PER_TURN_MAX {
            match backend.replies.try_recv() {
                Ok(reply) => hub.reply(now, reply, &mut ends),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
            more |= taken == TAKEN_PER_TURN_MAX;
        }
        hub.poll(now, &mut ends);
        for request in hub.take_requests() {
            if backend.requests.send(request).is_err() {
                return;
            }
        }
        ends.iter_mut().for_each(End::flush);
        told(&hub);
        if more {
            tokio::task::yield_now().await;
            continue;
        }
        let due =
            hub.next_deadline().map(|at_ms| Duration::from_millis(at_ms.saturating_sub(clock().mono_ms)));
        tokio::select! {
            () = commands.notified() => (),
            reply = backend.replies.recv() => match reply {
                Some(reply) => hub.reply(clock(), reply, &mut ends),
                None => return,
            },
            () = tokio::time::sleep(due.unwrap_or(Duration::MAX)), if due.is_some() => (),
        }
    }
}
