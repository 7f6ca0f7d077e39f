//! Calls of the control plane to shards, and their answers.
//!
//! Owns the table of calls under way: tokens, how many answers are still missing, and the deadline. A
//! call about a channel goes to its home shard, a call about users to every shard. It also tells shards what
//! needs no answer, and hands what they report to the cluster's services. It knows no HTTP and no JSON.
//!
//! Bounds: at most [`CALLS_MAX`] calls at a time, each for at most [`DEADLINE`]; answers wait in a
//! queue of [`ANSWERS_MAX`]. A full table, or a shard's full inbox, is [`CallError::Busy`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use ringmain_proto::close::ErrorCode;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};

use super::cluster::driver::{Handle, Reports};
use crate::core::api::{Answer, Call, ControlAnswer, ControlCommand, REPORT_TOKEN, home_of};
use crate::core::cluster::Report;
use crate::core::engine::ShardIndex;

/// Calls under way at the most.
pub const CALLS_MAX: usize = 16_384;

/// Answers that wait for the control thread at the most. Answers beyond it are dropped and their calls
/// run into the deadline: it takes a control thread that did not run while all calls were answered.
pub const ANSWERS_MAX: usize = 16_384;

/// How long a call may take. The SDKs give a command as long.
pub const DEADLINE: Duration = Duration::from_secs(5);

/// Hands a command to one shard. `false`: the inbox is full, or the shard has stopped.
pub type SendToShard = Box<dyn Fn(ControlCommand) -> bool + Send + Sync>;

/// Why a call failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum CallError {
    /// Too much is under way. Nothing was done, or on some shards only; a retry is safe.
    #[error("too many calls are under way")]
    Busy,
    /// No answer in time. What was asked for may still happen.
    #[error("a shard did not answer in time")]
    Deadline,
    /// The shard said no.
    #[error("{}", .0.message())]
    Refused(ErrorCode),
}

/// Where shards leave their answers; usable from any thread, never blocks.
#[derive(Clone, Debug)]
pub struct Answers(mpsc::Sender<ControlAnswer>);

impl Answers {
    /// Hands an answer to the control thread. Dropped where the queue is full.
    pub fn put(&self, answer: ControlAnswer) {
        // Dropped: the call's deadline tells the caller.
        let _ = self.0.try_send(answer);
    }
}

/// A queue for answers, made before the shards and given to [`Router::new`] afterwards.
pub fn answers() -> (Answers, mpsc::Receiver<ControlAnswer>) {
    let (sender, receiver) = mpsc::channel(ANSWERS_MAX);
    (Answers(sender), receiver)
}

/// The calls under way. Shared by all requests.
pub struct Router {
    shards: Vec<SendToShard>,
    next_token: AtomicU64,
    pending: Mutex<HashMap<u64, Pending>>,
    deadline: Duration,
    /// Set once, where the node is part of a cluster.
    cluster: OnceLock<(Handle, Reports)>,
}

struct Pending {
    missing: usize,
    answers: Vec<Result<Answer, ErrorCode>>,
    done: oneshot::Sender<Vec<Result<Answer, ErrorCode>>>,
}

impl Router {
    /// A router for these shards, in the order of their numbers. Run [`Router::deliver`] beside it.
    pub fn new(shards: Vec<SendToShard>) -> Arc<Self> {
        Self::with_deadline(shards, DEADLINE)
    }

    fn with_deadline(shards: Vec<SendToShard>, deadline: Duration) -> Arc<Self> {
        assert!(!shards.is_empty(), "a node has a shard");
        let pending = Mutex::new(HashMap::new());
        let cluster = OnceLock::new();
        // Token 0 belongs to what nobody waits for.
        let next_token = AtomicU64::new(REPORT_TOKEN + 1);
        Arc::new(Self { shards, next_token, pending, deadline, cluster })
    }

    /// How many shards there are.
    pub fn shards(&self) -> u16 {
        self.shards.len() as u16
    }

    /// Calls under way.
    pub fn calls(&self) -> usize {
        self.pending().len()
    }

    /// Makes the node part of a cluster. Once; a second time changes nothing.
    pub fn join_cluster(&self, handle: Handle, reports: Reports) {
        let _ = self.cluster.set((handle, reports));
    }

    /// The way to the other nodes, where there are any.
    pub fn cluster(&self) -> Option<&Handle> {
        self.cluster.get().map(|(handle, _)| handle)
    }

    /// Tells a shard something whose answer nobody waits for. `false`: its inbox is full.
    pub fn tell(&self, shard: ShardIndex, call: Call) -> bool {
        self.send(shard, ControlCommand { token: REPORT_TOKEN, call }).is_ok()
    }

    /// Hands arriving answers to their calls, until all [`Answers`] are gone.
    pub async fn deliver(self: Arc<Self>, mut answers: mpsc::Receiver<ControlAnswer>) {
        while let Some(answer) = answers.recv().await {
            self.settle(answer);
        }
    }

    /// Hands a shard's report over.
    pub(super) fn settle_report(&self, shard: ShardIndex, report: Arc<Report>) {
        if let Some((_, reports)) = self.cluster.get() {
            reports.put(shard, report);
        }
    }

    fn settle(&self, answer: ControlAnswer) {
        if answer.token == REPORT_TOKEN {
            if let Ok(Answer::Report(report)) = answer.result {
                self.settle_report(answer.shard, report);
            }
            return;
        }
        let mut pending = self.pending();
        // A late answer finds no call: its deadline has passed.
        let Some(call) = pending.get_mut(&answer.token) else { return };
        call.answers.push(answer.result);
        call.missing -= 1;
        if call.missing > 0 {
            return;
        }
        if let Some(call) = pending.remove(&answer.token) {
            // Nobody waits any more where the request was given up.
            let _ = call.done.send(call.answers);
        }
    }

    /// Asks the home shard of a channel.
    pub async fn home(&self, channel: &str, call: Call) -> Result<Answer, CallError> {
        let home = home_of(channel, self.shards());
        let mut answers = self.ask(&[home], &call).await?;
        answers.pop().unwrap_or(Err(ErrorCode::Internal)).map_err(CallError::Refused)
    }

    /// Asks every shard. The first refusal is the whole call's.
    pub async fn each(&self, call: Call) -> Result<Vec<Answer>, CallError> {
        let all: Vec<ShardIndex> = (0..self.shards()).collect();
        let answers = self.ask(&all, &call).await?;
        answers.into_iter().collect::<Result<_, _>>().map_err(CallError::Refused)
    }

    async fn ask(&self, to: &[ShardIndex], call: &Call) -> Result<Vec<Result<Answer, ErrorCode>>, CallError> {
        let (done, answered) = oneshot::channel();
        let entry = self.enter(to.len(), done)?;
        for &shard in to {
            self.send(shard, ControlCommand { token: entry.token, call: call.clone() })?;
        }
        match tokio::time::timeout(self.deadline, answered).await {
            Ok(Ok(answers)) => Ok(answers),
            Ok(Err(_)) | Err(_) => Err(CallError::Deadline),
        }
    }

    fn send(&self, shard: ShardIndex, command: ControlCommand) -> Result<(), CallError> {
        if self.shards[usize::from(shard)](command) { Ok(()) } else { Err(CallError::Busy) }
    }

    fn enter(
        &self,
        missing: usize,
        done: oneshot::Sender<Vec<Result<Answer, ErrorCode>>>,
    ) -> Result<Entry<'_>, CallError> {
        let mut pending = self.pending();
        if pending.len() >= CALLS_MAX {
            return Err(CallError::Busy);
        }
        let token = self.next_token.fetch_add(1, Ordering::Relaxed);
        pending.insert(token, Pending { missing, answers: Vec::with_capacity(missing), done });
        Ok(Entry { router: self, token })
    }

    /// Nothing that holds the lock can panic half-way.
    fn pending(&self) -> MutexGuard<'_, HashMap<u64, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call's place in the table; given up with the call, also where its request is dropped.
struct Entry<'a> {
    router: &'a Router,
    token: u64,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.router.pending().remove(&self.token);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A router whose shards answer at once with what `answer` says; `None`: never.
    pub(crate) fn router(
        shards: u16,
        answer: impl Fn(ShardIndex, &Call) -> Option<Result<Answer, ErrorCode>> + Send + Sync + 'static,
    ) -> Arc<Router> {
        let (answers, receiver) = answers();
        let answer = Arc::new(answer);
        let shard = |shard: ShardIndex| -> SendToShard {
            let (answers, answer) = (answers.clone(), answer.clone());
            Box::new(move |command| {
                if let Some(result) = answer(shard, &command.call) {
                    answers.put(ControlAnswer { token: command.token, shard, result });
                }
                true
            })
        };
        let router = Router::with_deadline((0..shards).map(shard).collect(), Duration::from_millis(50));
        tokio::spawn(router.clone().deliver(receiver));
        router
    }

    fn stats(num_clients: u32) -> Option<Result<Answer, ErrorCode>> {
        Some(Ok(Answer::PresenceStats { num_clients, num_users: 0, partial: false }))
    }

    fn clients(answer: &Answer) -> u32 {
        match answer {
            Answer::PresenceStats { num_clients, .. } => *num_clients,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_channels_call_goes_to_its_home_and_a_users_to_all() {
        let router = router(8, |shard, _| stats(u32::from(shard)));
        for channel in ["a", "room:1", "room:2", "user:x"] {
            let call = Call::PresenceStats { channel: channel.into() };
            let answer = router.home(channel, call).await.unwrap();
            assert_eq!(clients(&answer), u32::from(home_of(channel, 8)), "{channel}");
        }
        let mut from: Vec<_> = router.each(Call::Info).await.unwrap().iter().map(clients).collect();
        from.sort_unstable();
        assert_eq!(from, (0..8).collect::<Vec<_>>());
        assert_eq!(router.calls(), 0);
    }

    #[tokio::test]
    async fn one_shards_refusal_is_the_calls() {
        let router = router(3, |shard, _| match shard {
            1 => Some(Err(ErrorCode::NotAvailable)),
            _ => stats(0),
        });
        assert_eq!(router.each(Call::Info).await.unwrap_err(), CallError::Refused(ErrorCode::NotAvailable));
    }

    #[tokio::test]
    async fn a_silent_shard_runs_into_the_deadline_and_leaves_nothing() {
        let router = router(2, |shard, _| if shard == 0 { stats(0) } else { None });
        assert_eq!(router.each(Call::Info).await.unwrap_err(), CallError::Deadline);
        assert_eq!(router.calls(), 0);
    }

    #[tokio::test]
    async fn a_full_inbox_is_busy_and_leaves_nothing() {
        let router = Router::new(vec![Box::new(|_| true), Box::new(|_| false)]);
        assert_eq!(router.each(Call::Info).await.unwrap_err(), CallError::Busy);
        assert_eq!(router.calls(), 0);
    }

    #[tokio::test]
    async fn the_table_holds_its_maximum_and_no_more() {
        let router = Router::new(vec![Box::new(|_| true)]);
        let mut entries = Vec::new();
        for _ in 0..CALLS_MAX {
            entries.push(router.enter(1, oneshot::channel().0).expect("there is room"));
        }
        assert_eq!(router.each(Call::Info).await.unwrap_err(), CallError::Busy);
        entries.pop();
        assert!(router.enter(1, oneshot::channel().0).is_ok());
    }

    #[tokio::test]
    async fn a_dropped_request_leaves_nothing() {
        let router = Router::new(vec![Box::new(|_| true)]);
        let mut call = Box::pin(router.each(Call::Info));
        assert!(futures_poll(&mut call).await.is_pending());
        assert_eq!(router.calls(), 1);
        drop(call);
        assert_eq!(router.calls(), 0);
    }

    /// Polls a future once.
    async fn futures_poll<F: Future + Unpin>(future: &mut F) -> std::task::Poll<F::Output> {
        std::future::poll_fn(|context| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context)))
            .await
    }
}
