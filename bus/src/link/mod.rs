//! The way between a shard and the hub of its node: a [`Port`] on the shard's thread, an [`End`] on the control
//! thread, two queues between them.
//!
//! Owns: the two queues, their bounds, who wakes whom. Must not know: brokers, chains, runtimes.
//! Invariants: what one side pushed the other takes in that order; an answer always finds room (there is one for
//! each command, and these are bounded), an arrival may be refused: then the hub reads it again later, or tells.

mod bell;
mod end;
mod port;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use crossbeam_queue::SegQueue;

use crate::backend::{OwnedId, Target};
use crate::epoch::{Epoch, Position};
use crate::types::{Accepted, BusError, ChannelId, Health, HistoryQuery, Page, PublishError, Token};

pub use bell::Bell;
pub use end::{End, Full};
pub use port::Port;

/// Bounds of one port.
#[derive(Clone, Copy, Debug)]
pub struct LinkOptions {
    /// Commands without an answer; above it they are refused as overloaded.
    pub commands_max: usize,
    /// Arrivals that wait for the shard; above it they are refused, and read again when it has taken some.
    pub arrivals_max: usize,
    /// Bytes of them.
    pub arrival_bytes_max: usize,
    /// Largest record of one publication, in bytes.
    pub record_bytes_max: usize,
}

impl Default for LinkOptions {
    /// 4,096 commands, 16,384 arrivals, 16 MiB of them, records of 1 MiB.
    fn default() -> Self {
        Self {
            commands_max: 4_096,
            arrivals_max: 16_384,
            arrival_bytes_max: 16 << 20,
            record_bytes_max: 1 << 20,
        }
    }
}

/// Rings the other side, once a turn.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// From a port to the hub.
#[derive(Clone, Debug)]
pub enum Command {
    /// See [`crate::Bus::open`].
    Open {
        /// Names the answer.
        token: Token,
        /// The shard's id.
        channel: ChannelId,
        /// Name and options.
        target: Target,
    },
    /// See [`crate::Bus::close`].
    Close {
        /// The shard's id.
        channel: ChannelId,
        /// The channel's name.
        name: Arc<str>,
    },
    /// See [`crate::Bus::publish`].
    Publish {
        /// Names the answer.
        token: Token,
        /// Name and options.
        target: Target,
        /// For repeats.
        id: OwnedId,
        /// The record, with offset 0.
        record: Bytes,
    },
    /// See [`crate::Bus::read`].
    Read {
        /// Names the answer.
        token: Token,
        /// Name and options.
        target: Target,
        /// What.
        query: HistoryQuery,
    },
    /// See [`crate::Bus::clear`].
    Clear {
        /// Names the answer.
        token: Token,
        /// Name and options.
        target: Target,
    },
}

/// From the hub to a port: [`crate::Event`], owned.
#[derive(Clone, Debug)]
pub enum Told {
    /// An open's answer.
    Opened {
        /// Of the command.
        token: Token,
        /// Of the command.
        channel: ChannelId,
        /// The channel's top.
        result: Result<Position, BusError>,
    },
    /// A publish's answer.
    Published {
        /// Of the command.
        token: Token,
        /// Where it stands.
        result: Result<Accepted, PublishError>,
    },
    /// A read's answer.
    Read {
        /// Of the command.
        token: Token,
        /// Position and cut.
        result: Result<Page, BusError>,
        /// Records with their offsets, one behind the other.
        records: Bytes,
    },
    /// A clear's answer.
    Cleared {
        /// Of the command.
        token: Token,
        /// The position.
        result: Result<Position, BusError>,
    },
    /// A publication on an open channel.
    Arrival {
        /// The shard's id.
        channel: ChannelId,
        /// Its epoch.
        epoch: Epoch,
        /// Offset of the arrival before it.
        previous: u64,
        /// Its offset, whatever stands in the record.
        offset: u64,
        /// The record.
        record: Bytes,
    },
    /// Something may be missing.
    Gap {
        /// The shard's id.
        channel: ChannelId,
        /// Arrivals go on from here.
        resumed: Position,
    },
    /// Another life of the channel.
    EpochChanged {
        /// The shard's id.
        channel: ChannelId,
        /// Arrivals go on from here.
        position: Position,
    },
    /// The broker was lost or is whole again.
    Health {
        /// What the port says.
        health: Health,
        /// Whether commands make sense at all; where a part of the broker is lost they do.
        reachable: bool,
    },
}

/// The two queues.
#[derive(Debug)]
struct Shared {
    commands: SegQueue<Command>,
    told: SegQueue<Told>,
    /// Arrivals in `told`, and their bytes.
    arrivals: AtomicUsize,
    arrival_bytes: AtomicUsize,
    /// An arrival was refused; the port rings the hub when it has taken some.
    refused: AtomicBool,
    options: LinkOptions,
}

impl Shared {
    fn has_room(&self) -> bool {
        self.arrivals.load(Ordering::Acquire) < self.options.arrivals_max
            && self.arrival_bytes.load(Ordering::Acquire) < self.options.arrival_bytes_max
    }
}

/// A port and its end. `bell` is rung when commands wait, `wake_shard` when events do.
pub fn link(options: LinkOptions, bell: Arc<Bell>, wake_shard: Wake) -> (Port, End) {
    let shared = Arc::new(Shared {
        commands: SegQueue::new(),
        told: SegQueue::new(),
        arrivals: AtomicUsize::new(0),
        arrival_bytes: AtomicUsize::new(0),
        refused: AtomicBool::new(false),
        options,
    });
    (Port::new(shared.clone(), bell), End::new(shared, wake_shard))
}
