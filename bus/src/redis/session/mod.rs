//! One life of the connections to one master: a connection for the script, one for subscriptions, the canary that
//! proves both, and one to ask about replicas.
//!
//! Owns: what is in flight there, what waits to be sent, who is subscribed. Must not know: other masters, the hub's
//! chains.
//!
//! A session begins with fresh connections ([`begin`]), settles on one life of the server and its data ([`Life`], L10)
//! and ends at the first doubt: a cut, silence, another life, a subscription that the server ended, a redirection. It
//! is never mended; the next one is another. At its end everything that it was asked is answered or handed back.
//!
//! Invariants: operations of a channel reach the server in the order in which they were asked ([`batch`]); an answer is
//! believed only if it names the session's life.

mod acks;
mod batch;
mod begin;
mod ears;
mod replicas;

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::Value;
use tokio::sync::{mpsc, oneshot};

use crate::backend::{CANARY_MS, Call, Domain, Reply, Request, SILENCE_MS_MAX, Target};
use crate::envelope::{self, Meta};
use crate::redis::canary::{self, Mark};
use crate::redis::context::{Context, Kept, Publication};
use crate::redis::script::{Life, Operation};
use crate::redis::topology::Master;
use crate::redis::wire::{Connection, Dialer, WireError};
use crate::types::{Accepted, BusError, HistoryQuery, PublishError};

use batch::Group;
use ears::Ears;
use replicas::Replicas;

/// Answers, pushes and requests handled before the other sides have their turn.
const TURN_MAX: usize = 256;

/// Time between two looks at the clock.
const TICK: Duration = Duration::from_millis(10);

/// Age of a canary that has not come back, after which the server is silent: with the canary's own pause below
/// [`SILENCE_MS_MAX`].
const UNHEARD: Duration = Duration::from_millis(500);

/// Turns with an unheard canary before that counts. Each of them takes what has come: when this thread was late, the
/// canary may wait in the socket.
const SILENT_TURNS: u32 = 3;

/// Positions touched again in one tick, to keep them while their channels are open.
const TOUCHES_MAX: usize = 256;

const CANARY: Duration = Duration::from_millis(CANARY_MS);

const _: () = assert!(UNHEARD.as_millis() as u64 + CANARY_MS < SILENCE_MS_MAX);

/// What a session is asked.
pub(super) enum Job {
    Request(Request),
    /// A publication of an earlier session or try.
    Again(Publication),
}

/// What a session tells the router.
pub(super) enum Word {
    /// It is settled and everything of earlier lives is mended.
    Up(Domain),
    /// It is over. Everything it was asked is answered or handed back.
    Ended { domain: Domain, reason: Reason },
}

/// Why a session ends, for the log.
pub(super) type Reason = Cow<'static, str>;

impl From<WireError> for Ending {
    fn from(error: WireError) -> Ending {
        Ending(error.to_string().into())
    }
}

/// The end of a session.
pub(super) struct Ending(Reason);

impl Ending {
    pub(super) fn because(reason: &'static str) -> Ending {
        Ending(Reason::Borrowed(reason))
    }
}

/// What an operation is for.
enum Work {
    Publish(Publication),
    Read {
        call: Call,
        target: Target,
        query: HistoryQuery,
    },
    Clear {
        call: Call,
        target: Target,
    },
    /// Keeps a position while its channel is open.
    Touch(Target),
}

enum Flight {
    /// A call and its group.
    Call {
        group: u16,
        works: Vec<Work>,
    },
    Canary,
}

/// A session, settled.
struct Session {
    context: Rc<Context>,
    domain: Domain,
    link: Connection,
    ears: Ears,
    sha: String,
    life: Life,
    canary_key: String,
    replicas: Rc<Cell<usize>>,
    flights: VecDeque<Flight>,
    groups: HashMap<u16, Group>,
    /// Groups with something to send.
    restless: Vec<u16>,
    /// The hub's bell is muted since then.
    muted: Option<Instant>,
    confirmer: Replicas,
    /// Acks that are told once replicas have confirmed them.
    confirming: VecDeque<(Publication, Accepted)>,
    marks: HashMap<Arc<str>, Mark>,
    /// In the order of their being kept, numbered from `kept_from`.
    kept: VecDeque<Kept>,
    kept_from: u64,
    touches: BinaryHeap<(std::cmp::Reverse<Instant>, Arc<str>)>,
    canary_sequence: u64,
    canary_due: Instant,
    /// Canaries that have not come back, with their time.
    unheard: VecDeque<(u64, Instant)>,
    silent_turns: u32,
}

/// Where a session is made for.
pub(super) struct Post {
    pub(super) context: Rc<Context>,
    pub(super) dialer: Dialer,
    pub(super) domain: Domain,
    pub(super) master: Master,
    pub(super) replicas: Rc<Cell<usize>>,
}

/// Lives one session, from dialing to its end, and tells of both.
pub(super) async fn run(
    post: Post,
    pause: Duration,
    mut jobs: mpsc::UnboundedReceiver<Job>,
    mut stop: oneshot::Receiver<()>,
    words: mpsc::UnboundedSender<Word>,
) {
    let (context, domain) = (post.context.clone(), post.domain);
    let begun = async {
        tokio::time::sleep(pause).await;
        begin::begin(post).await
    };
    let begun = tokio::select! {
        begun = begun => begun,
        _ = &mut stop => Err(Ending::because("stopped")),
    };
    let reason = match begun {
        Err(Ending(reason)) => reason,
        Ok(mut session) => {
            let _ = words.send(Word::Up(domain));
            let Ending(reason) = tokio::select! {
                ending = session.live(&mut jobs) => ending,
                _ = &mut stop => Ending::because("stopped"),
            };
            session.end().await;
            reason
        }
    };
    jobs.close();
    while let Ok(job) = jobs.try_recv() {
        refuse(&context, job).await;
    }
    context.refresh.notify_one();
    let _ = words.send(Word::Ended { domain, reason });
}

/// Answers what was never sent.
pub(super) async fn refuse(context: &Context, job: Job) {
    match job {
        Job::Again(publication) => context.orphan(publication).await,
        Job::Request(request) => {
            if let Some(reply) = request.refusal() {
                context.tell(reply).await;
            }
        }
    }
}

impl Session {
    async fn live(&mut self, jobs: &mut mpsc::UnboundedReceiver<Job>) -> Ending {
        loop {
            if let Err(ending) = self.turn(jobs).await {
                return ending;
            }
        }
    }

    async fn turn(&mut self, jobs: &mut mpsc::UnboundedReceiver<Job>) -> Result<(), Ending> {
        tokio::select! {
            answer = self.link.next() => {
                self.answered(answer?).await?;
                for _ in 1..TURN_MAX {
                    let Some(next) = self.link.next_now() else { break };
                    self.answered(next?).await?;
                }
            }
            push = self.ears.next() => {
                self.heard(push?).await?;
                for _ in 1..TURN_MAX {
                    let Some(next) = self.ears.next_now() else { break };
                    self.heard(next?).await?;
                }
            }
            value = self.confirmer.next() => self.replicas_answered(value?).await?,
            job = jobs.recv() => {
                self.take(job.ok_or(Ending::because("over"))?).await?;
                for _ in 1..TURN_MAX {
                    let Ok(next) = jobs.try_recv() else { break };
                    self.take(next).await?;
                }
            }
            () = tokio::time::sleep(TICK) => (),
        }
        let now = Instant::now();
        self.watch_over(now).await?;
        self.watch_replicas(now).await?;
        self.ask_replicas(now)?;
        self.send_restless()?;
        self.hush(now);
        Ok(())
    }

    /// Sounds the canary, and listens for its silence.
    async fn watch_over(&mut self, now: Instant) -> Result<(), Ending> {
        let is_unheard = self.unheard.front().is_some_and(|(_, sent)| now.duration_since(*sent) >= UNHEARD);
        self.silent_turns = if is_unheard { self.silent_turns + 1 } else { 0 };
        if self.silent_turns > SILENT_TURNS {
            return Err(Ending::because("silent"));
        }
        for _ in 0..if is_unheard { TURN_MAX } else { 0 } {
            let Some(push) = self.ears.next_now() else { break };
            self.heard(push?).await?;
        }
        if now >= self.canary_due {
            self.canary_due = now + CANARY;
            self.sound_canary(now)?;
        }
        for _ in 0..TOUCHES_MAX {
            let Some((due, _)) = self.touches.peek() else { break };
            if due.0 > now {
                break;
            }
            let Some((due, name)) = self.touches.pop() else { break };
            self.touch(&name, due.0, now);
        }
        Ok(())
    }

    fn sound_canary(&mut self, now: Instant) -> Result<(), Ending> {
        self.canary_sequence += 1;
        self.unheard.push_back((self.canary_sequence, now));
        let payload = canary::encode(self.context.incarnation, self.canary_sequence, self.marks.iter());
        let sent: Vec<Arc<str>> = self.marks.keys().take(canary::MARKS_MAX).cloned().collect();
        for name in sent {
            self.marks.remove(&name);
        }
        let operation = self.context.script.canary(&self.canary_key, self.context.nonce(), payload);
        self.send(&[operation])?;
        self.flights.push_back(Flight::Canary);
        Ok(())
    }

    /// Reads a position so that it lives on, if its channel is still open.
    fn touch(&mut self, name: &str, due: Instant, now: Instant) {
        let Some(target) = self.ears.target_due(name, due) else { return };
        self.plan_touch(&target, now);
        let operation = self.context.script.read(&target, &HistoryQuery::TOP, self.context.epoch());
        self.queue(Work::Touch(target), operation);
    }

    fn plan_touch(&mut self, target: &Target, now: Instant) {
        let keep_ms = target.options.meta_ttl_ms.max(target.options.history_ttl_ms);
        let pause = Duration::from_millis((keep_ms / 3).clamp(100, 3_600_000));
        self.ears.plan_touch(&target.name, now + pause);
        self.touches.push((std::cmp::Reverse(now + pause), target.name.clone()));
    }

    fn send(&self, operations: &[Operation]) -> Result<(), Ending> {
        let command = self.context.script.call(&self.sha, operations);
        self.link.send(&command).then_some(()).ok_or(Ending::because("outgoing"))
    }

    async fn take(&mut self, job: Job) -> Result<(), Ending> {
        let script = &self.context.script;
        let (work, operation) = match job {
            Job::Request(Request::Subscribe { call, target }) => return self.subscribe(call, target).await,
            Job::Request(Request::Unsubscribe { target }) => return self.ears.unsubscribe(&target.name),
            Job::Request(Request::Publish { call, target, id, record }) => {
                let envelope = envelope::encode("", &record, Meta { id: Some(&id), extra: &[] });
                let (call, asked) = (Some(call), Instant::now());
                let publication = Publication { call, target, id, envelope, asked, attempts: 0 };
                self.publishing(publication)
            }
            Job::Again(publication) => self.publishing(publication),
            Job::Request(Request::Read { call, target, query }) => {
                let operation = script.read(&target, &query, self.context.epoch());
                (Work::Read { call, target, query }, operation)
            }
            Job::Request(Request::Clear { call, target }) => {
                let operation = script.clear(&target, self.context.epoch());
                (Work::Clear { call, target }, operation)
            }
        };
        self.queue(work, operation);
        Ok(())
    }

    fn publishing(&self, mut publication: Publication) -> (Work, Operation) {
        publication.attempts += 1;
        let Publication { target, id, envelope, .. } = &publication;
        let nonce = self.context.epoch();
        let operation = self.context.script.publish(target, id, envelope.clone(), nonce);
        (Work::Publish(publication), operation)
    }

    /// Answers or hands back everything. The connections are closed with it.
    async fn end(mut self) {
        let context = self.context.clone();
        context.bell.unmute();
        // In the order in which they were asked, in which they are tried again.
        for (publication, _) in self.confirming.drain(..) {
            context.orphan(publication).await;
        }
        for flight in std::mem::take(&mut self.flights) {
            if let Flight::Call { works, .. } = flight {
                for work in works {
                    give_back(&context, work, true).await;
                }
            }
        }
        for (_, group) in self.groups.drain() {
            for (work, _) in group.waiting {
                give_back(&context, work, false).await;
            }
        }
        for call in self.ears.waiting() {
            context.tell(Reply::Subscribed { call, result: Err(BusError::Unavailable) }).await;
        }
        let mut kept = context.kept.borrow_mut();
        for entry in self.kept.drain(..) {
            kept.entry(entry.target.name.clone()).or_default().push(entry);
        }
    }

    /// One answer of the script's connection.
    async fn answered(&mut self, value: Value) -> Result<(), Ending> {
        if let Value::Push { .. } = value {
            return Ok(());
        }
        match self.flights.pop_front().ok_or(Ending::because("protocol"))? {
            Flight::Call { group, works } => {
                self.landed(group, works.len());
                self.call_answered(works, value).await
            }
            Flight::Canary => self.canary_answered(value),
        }
    }
}

/// What becomes of work that has no answer.
async fn give_back(context: &Context, work: Work, sent: bool) {
    match work {
        Work::Publish(publication) if sent || publication.attempts > 1 => context.orphan(publication).await,
        Work::Publish(publication) => context.answer(&publication, Err(PublishError::Unavailable)).await,
        Work::Read { call, .. } => {
            context.tell(Reply::Read { call, result: Err(BusError::Unavailable) }).await;
        }
        Work::Clear { call, .. } => {
            context.tell(Reply::Cleared { call, result: Err(BusError::Unavailable) }).await;
        }
        Work::Touch(_) => (),
    }
}
