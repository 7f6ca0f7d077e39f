//! The streams' parts of a life: from the barrier to the canary that comes back, and their loss.
//!
//! Owns: how far each stream is. Must not know: what the barrier decides by.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;

use super::api::{ApiError, Info};
use super::barrier::{Barrier, Believed, Stage};
use super::life::{In, Life};
use super::tops::Tops;
use super::wire::Record;
use crate::backend::{Domain, Reply};
use crate::types::BusError;

/// Time before a barrier that failed is tried again, in milliseconds.
const BARRIER_AGAIN_MS: u64 = 100;

/// How far a stream's part of this life is.
pub(super) enum Step {
    /// Not asked yet, or to be asked again then.
    Again(Instant),
    /// In the barrier.
    Passing(JoinHandle<()>),
    /// Believed; its canary has not come back yet.
    Proving,
    Up,
}

/// A stream in this life.
pub(super) struct StreamLife {
    pub(super) step: Step,
    pub(super) record: Record,
    pub(super) info: Info,
    /// When its canary came back last.
    pub(super) heard: Instant,
    /// The canary that came back last.
    pub(super) returned: u64,
    /// Canaries on their way: number, bytes, when by this machine's clock.
    pub(super) canaries: VecDeque<(u64, Vec<u8>, u64)>,
    pub(super) clock_ahead_ms: Option<i64>,
    /// Channels published on since the last canary, and how far.
    pub(super) published: HashMap<Arc<str>, u64>,
    /// Channels that moved here since the last canary came back.
    pub(super) moved: HashSet<Arc<str>>,
    /// Channels that others say have moved, and how far.
    pub(super) marks: HashMap<Arc<str>, u64>,
    pub(super) tops: Tops,
}

impl StreamLife {
    pub(super) fn new(now: Instant) -> StreamLife {
        StreamLife {
            step: Step::Again(now),
            record: Record { generation: 0, nonce: 0 },
            info: Info::default(),
            heard: now,
            returned: 0,
            canaries: VecDeque::new(),
            clock_ahead_ms: None,
            published: HashMap::new(),
            moved: HashSet::new(),
            marks: HashMap::new(),
            tops: Tops::default(),
        }
    }
}

impl Life<'_> {
    /// Begins the barrier of a stream.
    pub(super) fn pass(&mut self, stream: u16) {
        let n = usize::from(stream);
        let barrier = Barrier {
            client: self.client.clone(),
            options: self.node.options.clone(),
            subjects: self.node.subjects.clone(),
            stream,
            incarnation: self.node.incarnation,
            ours: self.node.memories[n].witness,
            expected: self.expected.clone(),
            canary: self.node.memories[n].canary.clone(),
            nonce: self.node.nonces.draw(),
        };
        let incoming = self.incoming.clone();
        self.streams[n].step = Step::Passing(tokio::task::spawn_local(async move {
            let result = barrier.pass().await;
            let _ = incoming.send(In::Passed { stream, result }).await;
        }));
    }

    pub(super) async fn passed(&mut self, stream: u16, result: Result<Believed, ApiError>) {
        let n = usize::from(stream);
        if !matches!(self.streams[n].step, Step::Passing(_)) {
            return;
        }
        match result {
            Ok(believed) => {
                tracing::debug!(stream, generation = believed.record.generation, "stream believed");
                self.believe(stream, believed.record, Some(believed.info.last_sequence));
                self.streams[n].info = believed.info;
                self.streams[n].step = Step::Proving;
                self.streams[n].heard = Instant::now();
                self.streams[n].canaries.clear();
                self.send_canary(stream).await;
            }
            Err(error) => {
                if let ApiError::OtherStreams(streams) = error
                    && self.node.warned.is_due()
                {
                    let ours = self.node.options.streams;
                    tracing::warn!(
                        "this node is set to {ours} streams, the bus was made with {streams}: use streams={streams}"
                    );
                }
                tracing::debug!(stream, %error, "stream not believed yet");
                let again = Instant::now() + Duration::from_millis(BARRIER_AGAIN_MS);
                self.streams[n].step = Step::Again(again);
            }
        }
    }

    /// Takes a record over, and counts what was seen from there.
    pub(super) fn believe(&mut self, stream: u16, record: Record, last_sequence: Option<u64>) {
        let n = usize::from(stream);
        let witness = &mut self.node.memories[n].witness;
        if (witness.generation, witness.nonce) != (record.generation, record.nonce) {
            witness.high = last_sequence.unwrap_or(witness.high);
            self.node.memories[n].canary = None;
        }
        let witness = &mut self.node.memories[n].witness;
        (witness.generation, witness.nonce) = (record.generation, record.nonce);
        witness.stage = Stage::Watching;
        self.streams[n].record = record;
    }

    /// A stream is in doubt, the connection is not.
    pub(super) async fn stream_lost(&mut self, stream: u16) {
        let n = usize::from(stream);
        if let Step::Passing(task) = &self.streams[n].step {
            task.abort();
        }
        tracing::debug!(stream, "stream lost");
        self.expected = self.node.living(Instant::now());
        self.streams[n].step = Step::Again(Instant::now());
        self.forget_stream(stream).await;
        self.node.lost(Domain(u32::from(stream) + 1)).await;
    }

    /// Drops all that stood on the stream's part of this life.
    pub(super) async fn forget_stream(&mut self, stream: u16) {
        let life = &mut self.streams[usize::from(stream)];
        life.published.clear();
        life.moved.clear();
        life.marks.clear();
        life.tops.clear();
        self.channels.forget_stream(stream);
        let domain = Domain(u32::from(stream) + 1);
        for call in self.confirm.fail(domain) {
            self.node.tell(Reply::Subscribed { call, result: Err(BusError::Unavailable) }).await;
        }
        for reply in self.publishes.fail(stream) {
            self.node.tell(reply).await;
        }
    }
}
