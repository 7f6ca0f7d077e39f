//! The control inbox of a shard: commands from any thread.
//!
//! Owns a bounded queue with one reader, the shard. Full is the sender's to know: [`ControlSender`]
//! gives the command back, and the control plane answers its caller with 503.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_queue::ArrayQueue;

use super::doorbell::Doorbell;

/// What the shard and its senders share.
#[derive(Debug)]
pub(crate) struct ControlInbox<C> {
    queue: ArrayQueue<C>,
    closed: AtomicBool,
}

impl<C> ControlInbox<C> {
    /// An inbox of `capacity` commands.
    pub(crate) fn new(capacity: usize) -> Self {
        assert!(capacity > 0, "a control inbox holds at least one command");
        Self { queue: ArrayQueue::new(capacity), closed: AtomicBool::new(false) }
    }

    pub(crate) fn pop(&self) -> Option<C> {
        self.queue.pop()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The shard is gone: what is sent from now on comes back.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// Why a command was not taken; it carries the command.
#[derive(Debug, thiserror::Error)]
pub enum SendError<C> {
    /// The inbox is full; a retry later may succeed.
    #[error("the shard's control inbox is full")]
    Full(C),
    /// The shard has stopped; no retry will succeed.
    #[error("the shard has stopped")]
    Closed(C),
}

/// Sends commands to one shard. Usable from any thread.
#[derive(Debug)]
pub struct ControlSender<C> {
    pub(crate) inbox: Arc<ControlInbox<C>>,
    pub(crate) doorbell: Arc<Doorbell>,
}

impl<C> Clone for ControlSender<C> {
    fn clone(&self) -> Self {
        Self { inbox: self.inbox.clone(), doorbell: self.doorbell.clone() }
    }
}

impl<C> ControlSender<C> {
    /// Puts `command` into the shard's inbox and wakes the shard.
    ///
    /// Commands of one thread are handled in their order. A command accepted while the shard stops
    /// may never be answered.
    pub fn try_send(&self, command: C) -> Result<(), SendError<C>> {
        if self.inbox.closed.load(Ordering::Acquire) {
            return Err(SendError::Closed(command));
        }
        match self.inbox.queue.push(command) {
            Ok(()) => {
                self.doorbell.ring();
                Ok(())
            }
            Err(command) => {
                self.doorbell.ring();
                Err(SendError::Full(command))
            }
        }
    }
}
