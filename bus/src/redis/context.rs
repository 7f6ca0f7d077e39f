//! What the tasks of one backend share: options, the way to the hub, publications that wait for another try.
//!
//! Owns: nonces, acks kept beyond a session. Must not know: connections.
//! Invariant: every publication that left a session unanswered is in [`Context::orphans`] or was answered.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};

use crate::backend::{BackendEnds, Call, OwnedId, Reply, Target};
use crate::epoch::Epoch;
use crate::lineage::KeptAck;
use crate::link::Bell;
use crate::nonce::Nonces;
use crate::redis::options::RedisOptions;
use crate::redis::script::Script;
use crate::runtime::tell;
use crate::seldom::Seldom;
use crate::types::PublishError;

/// How long a publication is tried again under its id before its answer is `Unknown`. Below what the hub waits for.
pub(super) const RETRY_MAX: Duration = Duration::from_millis(2_500);

/// Acks kept until replicas have confirmed them. Full: further publishes are answered `Unknown`.
pub(super) const KEPT_MAX: usize = 262_144;

/// Bytes of the publications of kept acks. Full: as [`KEPT_MAX`].
pub(super) const KEPT_BYTES_MAX: usize = 64 << 20;

/// A publication on its way.
#[derive(Clone, Debug)]
pub(super) struct Publication {
    /// `None`: a kept ack's, published again; nobody waits.
    pub(super) call: Option<Call>,
    pub(super) target: Target,
    pub(super) id: OwnedId,
    pub(super) envelope: Bytes,
    pub(super) asked: Instant,
    pub(super) attempts: u32,
}

/// An ack that was passed on, and what it takes to publish again.
#[derive(Clone, Debug)]
pub(super) struct Kept {
    pub(super) ack: KeptAck,
    pub(super) target: Target,
    pub(super) id: OwnedId,
    pub(super) envelope: Bytes,
}

/// Shared by the tasks of a backend, all on one thread.
pub(super) struct Context {
    pub(super) options: Rc<RedisOptions>,
    pub(super) script: Script,
    pub(super) replies: mpsc::Sender<Reply>,
    pub(super) bell: Arc<Bell>,
    /// Asks for a look at the topology.
    pub(super) refresh: Notify,
    /// Something is lost: the topology is looked at more often.
    pub(super) urgent: Cell<bool>,
    /// Names this backend's canaries.
    pub(super) incarnation: u64,
    pub(super) orphans: RefCell<Vec<Publication>>,
    /// Of sessions that ended: to be judged by the next.
    pub(super) kept: RefCell<HashMap<Arc<str>, Vec<Kept>>>,
    kept_count: Cell<usize>,
    kept_bytes: Cell<usize>,
    nonces: RefCell<Nonces>,
    /// Operations that failed: a server that refuses refuses all of them.
    pub(super) failures: Seldom,
}

impl Context {
    pub(super) fn new(options: RedisOptions, ends: &BackendEnds, seed: u64) -> Context {
        let mut nonces = Nonces::new(seed);
        Context {
            script: Script::new(&options),
            options: Rc::new(options),
            replies: ends.replies.clone(),
            bell: ends.bell.clone(),
            refresh: Notify::new(),
            urgent: Cell::new(true),
            incarnation: nonces.draw(),
            orphans: RefCell::default(),
            kept: RefCell::default(),
            kept_count: Cell::new(0),
            kept_bytes: Cell::new(0),
            nonces: RefCell::new(nonces),
            failures: Seldom::default(),
        }
    }

    pub(super) fn nonce(&self) -> u64 {
        self.nonces.borrow_mut().draw()
    }

    /// An epoch for one attempt (L4).
    pub(super) fn epoch(&self) -> Epoch {
        Epoch::new(self.nonce())
    }

    /// Tells the hub, and waits for room.
    pub(super) async fn tell(&self, reply: Reply) {
        tell(&self.replies, reply).await;
    }

    /// A publication failed after it was sent or tried: it is tried again if its id allows, else it is unknown.
    pub(super) async fn orphan(&self, publication: Publication) {
        let may_repeat = publication.target.options.is_positioned();
        if may_repeat && publication.asked.elapsed() < RETRY_MAX {
            self.orphans.borrow_mut().push(publication);
        } else {
            self.answer(&publication, Err(PublishError::Unknown)).await;
        }
    }

    pub(super) async fn answer(
        &self,
        publication: &Publication,
        result: Result<crate::types::Accepted, PublishError>,
    ) {
        if let Some(call) = publication.call {
            self.tell(Reply::Published { call, result }).await;
        }
    }

    /// Counts an ack as kept; `false`: there is no room.
    pub(super) fn keep(&self, kept: &Kept) -> bool {
        let (count, bytes) = (self.kept_count.get() + 1, self.kept_bytes.get() + kept.envelope.len());
        if count > KEPT_MAX || bytes > KEPT_BYTES_MAX {
            return false;
        }
        self.kept_count.set(count);
        self.kept_bytes.set(bytes);
        true
    }

    /// An ack is kept no longer.
    pub(super) fn let_go(&self, kept: &Kept) {
        self.kept_count.set(self.kept_count.get() - 1);
        self.kept_bytes.set(self.kept_bytes.get() - kept.envelope.len());
    }
}
