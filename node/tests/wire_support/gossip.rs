//! An engine that talks to the other shards in numbered batches, and echoes to its connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ringmain::core::engine::{ShardIndex, Slot};
use ringmain_proto::time::Now;

use super::engine::{Desk, Protocol};

/// What a shard is told.
#[derive(Clone, Copy, Debug)]
pub enum Say {
    /// Send this many batches to every other shard.
    ToAll(u64),
    /// Send this many batches to one shard.
    To(ShardIndex, u64),
    /// Add one to the total, then do nothing for this long, with the thread blocked.
    Stall(Duration),
    /// Answer with what was sent and received so far.
    Report,
}

/// What a shard has sent and received.
#[derive(Clone, Debug)]
pub struct Report {
    pub shard: ShardIndex,
    pub sent: u64,
    pub received: u64,
}

/// Numbers its batches for each shard, and insists on the numbers of those that it gets.
#[derive(Debug)]
pub struct Gossip {
    index: ShardIndex,
    shards: u16,
    next_out: Vec<u64>,
    next_in: Vec<u64>,
    /// Batches received and stalls begun by all shards of the node.
    total: Arc<AtomicU64>,
}

impl Gossip {
    pub fn new(index: ShardIndex, shards: u16, total: Arc<AtomicU64>) -> Self {
        let none = vec![0; usize::from(shards)];
        Self { index, shards, next_out: none.clone(), next_in: none, total }
    }

    fn send(&mut self, desk: &mut Desk<u64, Report>, to: ShardIndex, count: u64) {
        let next = &mut self.next_out[usize::from(to)];
        for _ in 0..count {
            desk.post(to, *next);
            *next += 1;
        }
    }
}

impl Protocol for Gossip {
    type Mesh = u64;
    type Control = Say;
    type Answer = Report;

    fn input(&mut self, desk: &mut Desk<u64, Report>, slot: Slot, chunk: &mut [u8], _now: Now) {
        desk.outbox.push(slot, chunk);
    }
    fn inbox(&mut self, _desk: &mut Desk<u64, Report>, from: ShardIndex, batch: u64, _now: Now) {
        let expected = &mut self.next_in[usize::from(from)];
        assert_eq!(batch, *expected, "shard {} lost or mixed up what {from} sent", self.index);
        *expected += 1;
        self.total.fetch_add(1, Ordering::Relaxed);
    }
    fn control(&mut self, desk: &mut Desk<u64, Report>, command: Say, _now: Now) {
        match command {
            Say::ToAll(count) => {
                let own = self.index;
                for to in (0..self.shards).filter(|&to| to != own) {
                    self.send(desk, to, count);
                }
            }
            Say::To(to, count) => self.send(desk, to, count),
            Say::Stall(time) => {
                self.total.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(time);
            }
            Say::Report => desk.answers.push(Report {
                shard: self.index,
                sent: self.next_out.iter().sum(),
                received: self.next_in.iter().sum(),
            }),
        }
    }
}
