//! The Kafka backend: one topic, a fixed number of partitions, no consumer group.
//!
//! | module | owns |
//! |---|---|
//! | [`options`] | how a node uses Kafka, and the URL that says so |
//! | `wire` | what is written into a partition |
//! | `log` | one partition as read: streams, histories, ids, the generation |
//! | `partition` | one partition at this node: reading, marks, silence, generations, who waits |
//! | `session` | the producer and the consumer |
//! | `topic` | the topic: made, checked, refused |
//!
//! This module owns the loop that connects them. Must not know: what messages mean.
//!
//! A channel lives in the partition that its name gives: users' channels by their slot, what all nodes hear in the
//! first, which every node reads and by which it knows that the brokers are there. A node reads the other partitions in
//! which it has subscribers or has published lately. All readers apply
//! the same messages in the same order, so positions, predecessors and repeats are the same at all of them. Offsets
//! are the partition's, so a channel's are sparse; a publish is answered when it was read back: then all replicas in
//! sync have it. A domain is a partition.
//!
//! What is given up, said once: a node keeps what it has read in memory, up to
//! [`KafkaOptions::cache_bytes_max`], and reads [`KafkaOptions::scan_bytes_max`] back when it begins; a position
//! further back is not recovered, and a channel that was quiet for longer stands at another offset on a node that
//! began later, so that a client which moves there is told that it may have missed something. Positions live as long
//! as the topic's retention.

mod log;
pub mod options;
mod partition;
mod session;
mod topic;
mod wire;

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::sync::mpsc::{self, Sender, UnboundedReceiver, UnboundedSender};

use crate::backend::{BackendEnds, Reply, Request, Warning};
use crate::backoff::Backoff;
pub use options::KafkaOptions;
use partition::{Act, Partition, Phase, SendError, Shared, refuse};
use session::{Delivered, Fetched, Session};
pub use topic::TopicError;

/// The partition that every node reads.
const HOME: usize = 0;

/// Grain of deadlines, in milliseconds.
const TICK_MS: u64 = 25;

/// Lateness of a turn that is none: grain of timers, and turns before it.
const LATE_MS_MIN: u64 = 5;

/// Threads of this process that a canary passes on its way there and back.
const THREADS_PASSED: u64 = 3;

/// Messages, reports or requests taken before others have their turn.
const TAKEN_PER_TURN_MAX: usize = 256;

/// With nothing live for so long the clients are made anew, in milliseconds.
const REBUILD_MS: u64 = 3_000;

/// With some partition not live for so long, too, in milliseconds: beyond an election of a new leader.
const REBUILD_PARTIAL_MS: u64 = 15_000;

/// First and longest pause before the brokers are asked again.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The pause where the operator has to do something.
const REFUSED: Duration = Duration::from_secs(5);

/// Makes the topic if it is missing. Gives what its configuration gives up; fails where [`run`] would refuse it.
pub async fn ensure(options: &KafkaOptions) -> Result<Vec<String>, TopicError> {
    topic::ensure(options).await
}

/// What the topic's configuration gives up, for `ringmain check`. Asks, never makes or changes anything.
pub async fn check(options: &KafkaOptions) -> Vec<Warning> {
    topic::check(options).await
}

/// Runs the backend until the hub is gone. On the control thread, in its [`tokio::runtime::LocalRuntime`].
pub async fn run(options: KafkaOptions, ends: BackendEnds) {
    let BackendEnds { mut requests, replies, .. } = ends;
    let (mut backend, mut delivered) = Backend::new(options);
    let mut asked = Vec::with_capacity(TAKEN_PER_TURN_MAX);
    let mut opening: Option<Opening> = None;
    loop {
        let tick = Duration::from_millis(backend.tick_ms.saturating_sub(backend.now_ms()));
        tokio::select! {
            count = requests.recv_many(&mut asked, TAKEN_PER_TURN_MAX) => {
                if count == 0 {
                    return backend.end();
                }
                asked.drain(..).for_each(|request| backend.request(request));
            }
            Some(report) = delivered.recv() => backend.take_reports(report, &mut delivered),
            fetched = fetched(backend.session.as_ref()) => backend.take_fetched(fetched),
            opened = opened(&mut opening) => {
                opening = None;
                backend.opened(opened);
            }
            () = tokio::time::sleep(tick) => backend.tick(),
        }
        if opening.is_none() && backend.wants_session() {
            opening = Some(Box::pin(open(backend.shared.options.clone())));
        }
        backend.act();
        if !backend.flush(&replies).await {
            return backend.end();
        }
        tokio::task::consume_budget().await;
    }
}

type Opening = Pin<Box<dyn Future<Output = Result<(), TopicError>>>>;

async fn open(options: Arc<KafkaOptions>) -> Result<(), TopicError> {
    topic::ensure(&options).await.map(drop)
}

/// Never ends where nothing is being opened.
async fn opened(opening: &mut Option<Opening>) -> Result<(), TopicError> {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

/// Never ends without a session.
async fn fetched(session: Option<&Session>) -> Fetched {
    match session {
        Some(session) => session.fetched().await,
        None => std::future::pending().await,
    }
}

struct Backend {
    shared: Shared,
    partitions: Vec<Partition>,
    session: Option<Session>,
    sessions: u64,
    delivered: UnboundedSender<Delivered>,
    begin: Instant,
    tick_ms: u64,
    /// When the brokers may be asked again.
    connect_ms: u64,
    backoff: Backoff,
    opened_ms: u64,
    reachable: Option<bool>,
}

impl Backend {
    fn new(options: KafkaOptions) -> (Backend, UnboundedReceiver<Delivered>) {
        // Bounded by what the producer queues.
        let (delivered, reports) = mpsc::unbounded_channel();
        let options = Arc::new(options);
        let seed = getrandom::u64().unwrap_or_else(|_| clock_seed());
        let shared = Shared::new(options.clone(), seed);
        let partitions =
            (0..options.partitions.max(1)).map(|index| Partition::new(index, &options)).collect();
        let backend = Backend {
            shared,
            partitions,
            session: None,
            sessions: 0,
            delivered,
            begin: Instant::now(),
            tick_ms: 0,
            connect_ms: 0,
            backoff: Backoff::new(PAUSE_MIN, PAUSE_MAX),
            opened_ms: 0,
            reachable: None,
        };
        (backend, reports)
    }

    fn now_ms(&self) -> u64 {
        self.begin.elapsed().as_millis() as u64
    }

    fn request(&mut self, request: Request) {
        let now_ms = self.now_ms();
        let index = wire::partition_of(&request.target().name, self.partitions.len() as u32) as usize;
        match &self.session {
            Some(_) => self.partitions[index].request(&mut self.shared, now_ms, request),
            None => refuse(&mut self.shared, &request),
        }
    }

    fn take_reports(&mut self, first: Delivered, more: &mut UnboundedReceiver<Delivered>) {
        let now_ms = self.now_ms();
        let session = self.session.as_ref().map(|session| session.number);
        let mut is_fatal = false;
        let mut take = |report: Delivered| {
            // Of the session of now; those of earlier ones were given up with it.
            let is_ours = session == Some(report.session);
            if let Some(partition) = self.partitions.get_mut(report.partition as usize).filter(|_| is_ours) {
                partition.delivered(&mut self.shared, now_ms, report.sequence, report.result);
                is_fatal |= report.is_fatal;
            }
        };
        take(first);
        for _ in 1..TAKEN_PER_TURN_MAX {
            match more.try_recv() {
                Ok(report) => take(report),
                Err(_) => break,
            }
        }
        if is_fatal {
            self.end_session();
        }
    }

    fn take_fetched(&mut self, first: Fetched) {
        let now_ms = self.now_ms();
        let mut next = Some(first);
        for taken in 1..=TAKEN_PER_TURN_MAX {
            match next {
                Some(Fetched::Message { partition, offset, time_ms, payload }) => {
                    if let Some(partition) = self.partitions.get_mut(partition as usize) {
                        partition.message(&mut self.shared, now_ms, offset, time_ms, &payload);
                    }
                }
                Some(Fetched::NoSuchOffset) => {
                    for partition in &mut self.partitions {
                        partition.cannot_start(&mut self.shared, now_ms);
                    }
                }
                Some(Fetched::Fatal) => return self.end_session(),
                Some(Fetched::Trouble) => (),
                None => return,
            }
            // What starts a partition anew takes effect before anything more is taken.
            self.act();
            next = match &self.session {
                Some(session) if taken < TAKEN_PER_TURN_MAX => session.fetched().now_or_never(),
                _ => None,
            };
        }
    }

    /// Does what the partitions ask for.
    fn act(&mut self) {
        let now_ms = self.now_ms();
        while let Some(act) = self.shared.acts.pop_front() {
            let done = match (&act, &self.session) {
                (Act::Send { partition, sequence, payload }, Some(session)) => {
                    session.send(*partition, *sequence, payload).err()
                }
                (Act::Send { .. }, None) => Some(SendError::Refused),
                (Act::Assign { partition, start }, Some(session)) => {
                    if let Err(error) = session.assign(*partition, *start) {
                        tracing::debug!(%error, partition, "Kafka partition not assigned");
                    }
                    None
                }
                (Act::Unassign { partition }, Some(session)) => {
                    // Fails where it was not assigned.
                    let _ = session.unassign(*partition);
                    None
                }
                (_, None) => None,
            };
            if let (Act::Send { partition, sequence, .. }, Some(error)) = (act, done) {
                let partition = &mut self.partitions[partition as usize];
                partition.delivered(&mut self.shared, now_ms, sequence, Err(error));
            }
        }
    }

    /// Tells the hub. `false`: it is gone.
    async fn flush(&mut self, replies: &Sender<Reply>) -> bool {
        self.tell_reachable();
        while let Some(reply) = self.shared.replies.pop_front() {
            if replies.send(reply).await.is_err() {
                return false;
            }
        }
        true
    }

    /// With one leader of several lost, the partitions of the others go on; with all lost, nothing is asked for.
    fn tell_reachable(&mut self) {
        let now_ms = self.now_ms();
        let reachable = self.session.is_some()
            && match self.partitions.iter().any(Partition::is_lost) {
                true => self.partitions.iter().any(|partition| partition.is_answering(now_ms)),
                false => self.partitions[HOME].phase() == Phase::Live,
            };
        if self.reachable.replace(reachable) != Some(reachable) {
            self.shared.replies.push_back(Reply::Reachable(reachable));
        }
    }

    fn tick(&mut self) {
        let now_ms = self.now_ms();
        let late_ms = self.late_ms(now_ms);
        self.tick_ms = now_ms + TICK_MS;
        let has_client = self.session.is_some();
        if has_client {
            self.partitions[HOME].hold_open(&mut self.shared, now_ms);
        }
        let mut is_silent = false;
        for partition in &mut self.partitions {
            is_silent |= partition.tick(&mut self.shared, now_ms, late_ms, has_client);
        }
        // What made one silent has made the others of its broker so, whose silence is a moment younger.
        for partition in self.partitions.iter_mut().filter(|_| is_silent) {
            partition.doubt(&mut self.shared, now_ms);
        }
        if has_client && self.is_worn(now_ms) {
            self.end_session();
        }
    }

    /// By how much a canary may be late for want of a core here, told from how late this very turn is: what goes there
    /// and back passes the client's sending and receiving threads and this one, and each waits as long as this did.
    fn late_ms(&self, now_ms: u64) -> u64 {
        let late_ms = now_ms.saturating_sub(self.tick_ms);
        if late_ms <= LATE_MS_MIN { 0 } else { late_ms * THREADS_PASSED }
    }

    /// Whether the clients do not find back by themselves.
    fn is_worn(&self, now_ms: u64) -> bool {
        let used = self.partitions.iter().filter(|partition| partition.phase() != Phase::Detached);
        let down: Vec<u64> = used.map(|partition| partition.down_for_ms(now_ms).unwrap_or(0)).collect();
        let age_ms = now_ms - self.opened_ms;
        let all_ms = down.iter().min().copied().unwrap_or(0);
        let one_ms = down.iter().max().copied().unwrap_or(0);
        all_ms.min(age_ms) >= REBUILD_MS || one_ms.min(age_ms) >= REBUILD_PARTIAL_MS
    }

    fn wants_session(&self) -> bool {
        self.session.is_none() && self.now_ms() >= self.connect_ms
    }

    fn end_session(&mut self) {
        let now_ms = self.now_ms();
        if let Some(session) = self.session.take() {
            session.end();
        }
        self.shared.acts.clear();
        for partition in &mut self.partitions {
            partition.client_lost(&mut self.shared, now_ms);
        }
        self.connect_ms = now_ms;
    }

    /// The brokers were asked for the topic.
    fn opened(&mut self, result: Result<(), TopicError>) {
        let now_ms = self.now_ms();
        let options = self.shared.options.clone();
        let session = result.and_then(|()| {
            let session = Session::new(&options, self.sessions + 1, &self.delivered);
            session.map_err(|error| TopicError::Unreachable(error.to_string()))
        });
        match session {
            Ok(session) => {
                self.sessions += 1;
                self.session = Some(session);
                self.backoff.reset();
                self.opened_ms = now_ms;
            }
            Err(error) => {
                let pause = match error.is_temporary() {
                    true => self.backoff.next(self.shared.nonces.draw()),
                    false => REFUSED,
                };
                self.connect_ms = now_ms + pause.as_millis() as u64;
                match error.is_temporary() {
                    true => tracing::debug!(%error, "Kafka"),
                    false => tracing::error!(%error, "Kafka topic refused"),
                }
            }
        }
    }

    fn end(&mut self) {
        if let Some(session) = self.session.take() {
            session.end();
        }
    }
}

/// A seed where the system gives no random bytes: two nodes rarely start in the same nanosecond.
fn clock_seed() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(1, |since| since.as_nanos() as u64) ^ u64::from(std::process::id()) << 48
}
