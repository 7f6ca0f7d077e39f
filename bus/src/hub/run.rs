//! The hub's loop on the control thread.
//!
//! Owns: when the hub is given what. Must not know: brokers.

use std::sync::Arc;
use std::time::Duration;

use ringmain_proto::time::Now;
use tokio::sync::Notify;
use tokio::sync::mpsc::error::TryRecvError;

use super::Hub;
use crate::backend::HubEnds;
use crate::link::End;

/// Commands of one port, and replies of the backend, taken before others have their turn.
const TAKEN_PER_TURN_MAX: usize = 512;

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
