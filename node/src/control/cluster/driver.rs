//! Runs the services of a cluster on the control thread.
//!
//! Owns the loop around [`Cluster`]: the clock, the bus's bell, reports of shards, what the API asks, and the queues
//! to shards whose inbox is full. It must not know what any of it means.
//!
//! Bounds: [`ASKS_MAX`] of the API wait; [`QUEUED_MAX`] entries wait for one shard, beyond it that shard is told anew;
//! of commands about users the oldest is dropped there, and counted as an error.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use ringmain_bus::Bus;
use ringmain_proto::time::Now;
use tokio::sync::{Notify, mpsc, oneshot};

use super::commands::CommandError;
use super::message::{AnswerPart, NodeInfo, Question};
use super::{Cluster, ClusterOptions, Effect, Figures, PlaceError, Placement};
use crate::control::VERSION;
use crate::control::router::{CallError, Router};
use crate::control::state::NodeState;
use crate::core::api::{Answer, Call};
use crate::core::cluster::{ClusterCall, NodeId, Report};
use crate::core::engine::ShardIndex;

/// What the API asks and has not been looked at, at the most.
pub const ASKS_MAX: usize = 1_024;

/// What waits for one shard at the most: calls, items of presence, channels.
pub const QUEUED_MAX: usize = 262_144;

/// Other nodes' questions that this one's shards are asked at the same time at the most; beyond it the answer is that
/// there is none.
const OWN_ANSWERS_MAX: usize = 1_024;

/// Pause before a full inbox is tried again.
const INBOX_AGAIN: Duration = Duration::from_millis(5);

/// Of everything that has come, looked at between two polls at the most.
const PER_TURN_MAX: usize = 256;

/// The longest time between two looks at the node's load.
const LOAD_EVERY: Duration = Duration::from_millis(250);

enum Ask {
    Command(Call, oneshot::Sender<Result<(), CommandError>>),
    Survey(Question, oneshot::Sender<Surveyed>),
    Place(String, oneshot::Sender<Result<Placement, PlaceError>>),
    Leave(oneshot::Sender<()>),
}

/// What other nodes answered.
#[derive(Debug, Default)]
pub struct Surveyed {
    /// Their answers, in parts.
    pub parts: Vec<AnswerPart>,
    /// One did not answer in time.
    pub partial: bool,
}

/// The way of the API to the other nodes.
#[derive(Clone, Debug)]
pub struct Handle {
    asks: mpsc::Sender<Ask>,
    figures: Arc<Mutex<Figures>>,
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Ask::Command(..) => "Command",
            Ask::Survey(..) => "Survey",
            Ask::Place(..) => "Place",
            Ask::Leave(_) => "Leave",
        })
    }
}

impl Handle {
    /// Has every other node carry out a command about users; done when the bus has it.
    pub async fn command(&self, call: Call) -> Result<(), CommandError> {
        let (done, answered) = oneshot::channel();
        self.asks.try_send(Ask::Command(call, done)).map_err(|_| CommandError::Busy)?;
        answered.await.unwrap_or(Err(CommandError::Unknown))
    }

    /// Asks every other node.
    pub async fn survey(&self, question: Question) -> Surveyed {
        let nobody = Surveyed { parts: Vec::new(), partial: true };
        let (done, answered) = oneshot::channel();
        if self.asks.try_send(Ask::Survey(question, done)).is_err() {
            return nobody;
        }
        answered.await.unwrap_or(nobody)
    }

    /// Where a user belongs.
    pub async fn place(&self, user: String) -> Result<Placement, PlaceError> {
        let (done, answered) = oneshot::channel();
        self.asks.try_send(Ask::Place(user, done)).map_err(|_| PlaceError::Nowhere)?;
        answered.await.unwrap_or(Err(PlaceError::Nowhere))
    }

    /// Tells the other nodes that this one stops.
    pub async fn leave(&self) {
        let (done, left) = oneshot::channel();
        if self.asks.send(Ask::Leave(done)).await.is_ok() {
            // It is gone either way.
            let _ = left.await;
        }
    }

    /// What was counted until lately.
    pub fn figures(&self) -> Figures {
        *self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the router leaves the reports of shards.
#[derive(Clone, Debug)]
pub struct Reports(mpsc::Sender<(ShardIndex, Arc<Report>)>);

impl Reports {
    /// Hands a report over. Where there is no room it comes again.
    pub fn put(&self, shard: ShardIndex, report: Arc<Report>) {
        let _ = self.0.try_send((shard, report));
    }
}

/// What the services run on.
pub struct Driver {
    router: Arc<Router>,
    node: Arc<NodeState>,
    asks: mpsc::Receiver<Ask>,
    reports: mpsc::Receiver<(ShardIndex, Arc<Report>)>,
    figures: Arc<Mutex<Figures>>,
    load: Box<dyn Fn() -> (u32, bool)>,
}

/// Prepares the services of a node. The handle and the reports go to [`Router::join_cluster`], the driver runs beside
/// it. `load` says how many connections the node has, and whether it takes more.
pub fn new(
    router: Arc<Router>,
    node: Arc<NodeState>,
    load: Box<dyn Fn() -> (u32, bool)>,
) -> (Handle, Reports, Driver) {
    let (asks, asked) = mpsc::channel(ASKS_MAX);
    // One report of a shard is under way at a time, and may come twice.
    let (reports, reported) = mpsc::channel(2 * usize::from(router.shards()));
    let figures = Arc::new(Mutex::new(Figures::default()));
    let handle = Handle { asks, figures: figures.clone() };
    (handle, Reports(reports), Driver { router, node, asks: asked, reports: reported, figures, load })
}

type OwnAnswer = Pin<Box<dyn Future<Output = (NodeId, u64, AnswerPart)>>>;

struct Running {
    cluster: Cluster,
    bus: Box<dyn Bus>,
    queues: Queues,
    drawn: u64,
    commands: HashMap<u64, oneshot::Sender<Result<(), CommandError>>>,
    surveys: HashMap<u64, oneshot::Sender<Surveyed>>,
    answers: FuturesUnordered<OwnAnswer>,
}

impl Driver {
    /// Runs until the router is gone. `rung` is notified when the bus has something for this port; `clock` is the one
    /// that the port is used with, in milliseconds.
    pub async fn run(
        mut self,
        options: ClusterOptions,
        bus: Box<dyn Bus>,
        rung: Arc<Notify>,
        clock: impl Fn() -> Now,
    ) {
        let mut running = Running {
            queues: Queues::new(options.shards),
            cluster: Cluster::new(options, clock()),
            bus,
            drawn: 0,
            commands: HashMap::new(),
            surveys: HashMap::new(),
            answers: FuturesUnordered::new(),
        };
        loop {
            let (connections, accepting) = (self.load)();
            running.cluster.set_load(connections, accepting);
            self.turn(&mut running, clock());
            *self.figures.lock().unwrap_or_else(PoisonError::into_inner) = running.cluster.figures();
            let wait = running.wait(clock());
            tokio::select! {
                () = rung.notified() => {}
                () = tokio::time::sleep(wait) => {}
                report = self.reports.recv() => match report {
                    Some((shard, report)) => running.cluster.report(clock(), shard, &report),
                    None => return,
                },
                ask = self.asks.recv() => match ask {
                    Some(ask) => running.ask(clock(), ask),
                    None => return,
                },
                Some((to, id, part)) = running.answers.next() => running.cluster.answer_survey(to, id, part),
            }
        }
    }

    /// Takes what has come, polls, and carries out what is to be done.
    fn turn(&mut self, running: &mut Running, now: Now) {
        for _ in 0..PER_TURN_MAX {
            let Ok((shard, report)) = self.reports.try_recv() else { break };
            running.cluster.report(now, shard, &report);
        }
        for _ in 0..PER_TURN_MAX {
            let Ok(ask) = self.asks.try_recv() else { break };
            running.ask(now, ask);
        }
        for effect in running.cluster.poll(now, &mut *running.bus) {
            self.carry_out(running, effect);
        }
        running.bus.flush();
        running.queues.flush(|shard, call| self.router.tell(shard, call));
        while let Some(shard) = running.queues.overrun() {
            running.cluster.shard_overrun(now, shard);
        }
    }

    fn carry_out(&self, running: &mut Running, effect: Effect) {
        match effect {
            Effect::Shard(shard, call) => running.queues.push(shard, Call::Cluster(call)),
            Effect::Command(shard, call) => running.queues.push(shard, call),
            Effect::Told { ticket, result } => {
                if let Some(done) = running.commands.remove(&ticket) {
                    // The request may have been given up.
                    let _ = done.send(result);
                }
            }
            Effect::Surveyed { ticket, parts, partial } => {
                if let Some(done) = running.surveys.remove(&ticket) {
                    let _ = done.send(Surveyed { parts, partial });
                }
            }
            Effect::Survey { to, id, .. } if running.answers.len() >= OWN_ANSWERS_MAX => {
                running.cluster.answer_survey(to, id, AnswerPart::Nothing);
            }
            Effect::Survey { to, id, question } => {
                let (router, node) = (self.router.clone(), self.node.clone());
                running.answers.push(Box::pin(async move {
                    (to, id, own_answer(&router, &node, question).await.unwrap_or(AnswerPart::Nothing))
                }));
            }
        }
    }
}

impl Running {
    fn ask(&mut self, now: Now, ask: Ask) {
        self.drawn += 1;
        let ticket = self.drawn;
        match ask {
            Ask::Command(call, done) => {
                self.commands.insert(ticket, done);
                self.cluster.command(now, ticket, &call);
            }
            Ask::Survey(question, done) => {
                self.surveys.insert(ticket, done);
                self.cluster.survey(now, &mut *self.bus, ticket, question);
            }
            Ask::Place(user, done) => {
                let _ = done.send(self.cluster.place(now, &user));
            }
            Ask::Leave(done) => {
                self.cluster.leave(now, &mut *self.bus);
                let _ = done.send(());
            }
        }
    }

    /// How long to wait for something to happen.
    fn wait(&self, now: Now) -> Duration {
        let bus = self.bus.next_deadline().unwrap_or(u64::MAX);
        let at_ms = self.cluster.next_deadline().min(bus);
        let wait = Duration::from_millis(at_ms.saturating_sub(now.mono_ms)).min(LOAD_EVERY);
        if self.queues.is_empty() { wait } else { wait.min(INBOX_AGAIN) }
    }
}

/// What waits for shards whose inbox is full.
struct Queues(Vec<Queue>);

#[derive(Default)]
struct Queue {
    calls: VecDeque<Call>,
    weight: usize,
    overrun: bool,
}

fn weight(call: &Call) -> usize {
    match call {
        Call::Cluster(ClusterCall::Told { items, .. }) => 1 + items.len(),
        Call::Cluster(ClusterCall::Tell { channels, .. }) => 1 + channels.len(),
        _ => 1,
    }
}

impl Queues {
    fn new(shards: u16) -> Self {
        Self((0..shards).map(|_| Queue::default()).collect())
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(|queue| queue.calls.is_empty())
    }

    fn push(&mut self, shard: ShardIndex, call: Call) {
        let Some(queue) = self.0.get_mut(usize::from(shard)) else { return };
        queue.weight += weight(&call);
        queue.calls.push_back(call);
        if queue.weight > QUEUED_MAX {
            // It is told anew; commands about users are not repeated, so they stay as long as they can.
            queue.calls.retain(|call| !matches!(call, Call::Cluster(_)));
            queue.overrun = true;
            let dropped = queue.calls.len().saturating_sub(QUEUED_MAX / 2);
            queue.calls.drain(..dropped);
            if dropped > 0 {
                tracing::error!(shard, dropped, "commands about users were dropped: the shard takes nothing");
            }
            queue.weight = queue.calls.len();
        }
    }

    fn flush(&mut self, tell: impl Fn(ShardIndex, Call) -> bool) {
        for (shard, queue) in self.0.iter_mut().enumerate() {
            while let Some(call) = queue.calls.front() {
                if !tell(shard as ShardIndex, call.clone()) {
                    break;
                }
                queue.weight -= weight(call);
                queue.calls.pop_front();
            }
        }
    }

    /// A shard that has lost what it was to be told, and takes something again.
    fn overrun(&mut self) -> Option<ShardIndex> {
        let lost = self.0.iter_mut().enumerate().find(|(_, queue)| queue.overrun && queue.calls.is_empty());
        lost.map(|(shard, queue)| {
            queue.overrun = false;
            shard as ShardIndex
        })
    }
}

/// This node's answer to a question.
async fn own_answer(router: &Router, node: &NodeState, question: Question) -> Result<AnswerPart, CallError> {
    Ok(match question {
        Question::Info => AnswerPart::Info(node_info(router, node).await?),
        Question::Channels { pattern } => AnswerPart::Channels(channels(router, &pattern).await?),
    })
}

/// The figures of this node.
pub async fn node_info(router: &Router, node: &NodeState) -> Result<NodeInfo, CallError> {
    let mut info = NodeInfo {
        uid: node.uid.clone(),
        name: node.name.clone(),
        version: VERSION.to_owned(),
        uptime: node.uptime().as_secs(),
        ..NodeInfo::default()
    };
    let mut users = std::collections::BTreeSet::new();
    for answer in router.each(Call::Info).await? {
        let Answer::Info { num_clients, user_hashes, num_channels, num_subs } = answer else {
            return Err(unexpected(&answer));
        };
        info.num_clients += num_clients;
        info.num_channels += num_channels;
        info.num_subs += num_subs;
        users.extend(user_hashes);
    }
    info.num_users = u32::try_from(users.len()).unwrap_or(u32::MAX);
    Ok(info)
}

/// The channels of this node with subscribers.
pub async fn channels(router: &Router, pattern: &str) -> Result<Vec<(String, u32)>, CallError> {
    let mut channels = Vec::new();
    for answer in router.each(Call::Channels { pattern: pattern.into() }).await? {
        let Answer::Channels(of_shard) = answer else { return Err(unexpected(&answer)) };
        channels.extend(of_shard.into_iter().map(|(channel, subs)| (channel.to_string(), subs)));
    }
    Ok(channels)
}

/// A shard answered something that belongs to another call: a bug.
fn unexpected(answer: &Answer) -> CallError {
    tracing::error!(?answer, "a shard answered another call");
    CallError::Refused(ringmain_proto::close::ErrorCode::Internal)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn told(items: usize) -> Call {
        let item = crate::core::cluster::PresenceItem::Whole {
            channel: "c".into(),
            members: Vec::new(),
            first: true,
            last: true,
        };
        Call::Cluster(ClusterCall::Told { peer: 1, items: vec![item; items] })
    }

    #[test]
    fn what_waits_for_a_shard_keeps_its_order_and_has_a_maximum() {
        let mut queues = Queues::new(2);
        queues.push(1, told(QUEUED_MAX - 2));
        queues.push(1, Call::Info);
        assert_eq!(queues.overrun(), None);
        queues.push(1, told(1));
        assert_eq!(queues.0[1].calls.len(), 1, "commands about users stay");
        queues.flush(|_, _| false);
        assert_eq!(queues.overrun(), None, "as long as it takes nothing it is told nothing");
        let taken = Cell::new(0);
        queues.flush(|shard, call| {
            assert!(shard == 1 && matches!(call, Call::Info));
            taken.set(taken.get() + 1);
            true
        });
        assert_eq!((taken.get(), queues.overrun(), queues.overrun()), (1, Some(1), None));
        assert!(queues.is_empty());
    }

    #[test]
    fn of_commands_the_oldest_goes() {
        let mut queues = Queues::new(1);
        (0..=QUEUED_MAX).for_each(|_| queues.push(0, Call::Info));
        assert_eq!((queues.0[0].calls.len(), queues.0[0].weight), (QUEUED_MAX / 2, QUEUED_MAX / 2));
    }

    /// Two nodes whose shards are stand-ins, on a simulated broker in real time.
    struct Two {
        nodes: Vec<(Arc<Router>, Handle)>,
        /// What each node's shards were told.
        told: Vec<Arc<Mutex<Vec<Call>>>>,
    }

    fn clock() -> impl Fn() -> Now {
        let origin = std::time::Instant::now();
        move || {
            let mono_ms = origin.elapsed().as_millis() as u64 + 1;
            Now { mono_ms, unix_ms: 1_790_000_000_000 + mono_ms }
        }
    }

    fn answer(call: &Call) -> Option<Result<Answer, ringmain_proto::close::ErrorCode>> {
        Some(Ok(match call {
            Call::Info => Answer::Info { num_clients: 2, user_hashes: vec![1], num_channels: 3, num_subs: 4 },
            Call::Channels { .. } => Answer::Channels(vec![("room:a".into(), 5)]),
            Call::Cluster(_) => return None,
            _ => Answer::Done,
        }))
    }

    fn two() -> Two {
        use ringmain_bus::sim::{SimBroker, SimOptions};
        let (mut broker, ports) = SimBroker::new(&SimOptions::new(1), 2);
        let clock = Arc::new(clock());
        let mut two = Two { nodes: Vec::new(), told: Vec::new() };
        for (index, port) in ports.into_iter().enumerate() {
            let told = Arc::new(Mutex::new(Vec::new()));
            let record = told.clone();
            let router = crate::control::router::tests::router(2, move |_, call| {
                record.lock().expect("not poisoned").push(call.clone());
                answer(call)
            });
            let name = format!("node-{index}");
            let node = Arc::new(NodeState::new(name.clone(), format!("uid-{index}")));
            let (handle, reports, driver) = new(router.clone(), node, Box::new(|| (7, true)));
            router.join_cluster(handle.clone(), reports);
            let options = ClusterOptions {
                node: index as NodeId + 1,
                address: format!("{name}.example"),
                name,
                capacity: 1,
                slot_groups: u32::from(crate::core::cluster::SLOTS),
                shards: 2,
                ticket_key: Some(crate::core::config::Secret("key".to_owned())),
            };
            let clock = clock.clone();
            let rung = Arc::new(Notify::new());
            tokio::task::spawn_local(driver.run(options, Box::new(port), rung, move || clock()));
            two.nodes.push((router, handle));
            two.told.push(told);
        }
        tokio::task::spawn_local(async move {
            loop {
                broker.step(clock().mono_ms);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        two
    }

    async fn until(mut holds: impl AsyncFnMut() -> bool) {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        while !holds().await {
            assert!(tokio::time::Instant::now() < deadline, "it never came to pass");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[test]
    fn what_the_api_asks_reaches_the_other_node_and_back() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(Default::default())
            .expect("a runtime");
        runtime.block_on(async {
            let two = two();
            let (router, handle) = &two.nodes[0];
            until(async || two.nodes.iter().all(|(_, handle)| handle.figures().peers == 1)).await;
            let call = Call::Publish {
                channel: "room:a".into(),
                data: b"1".as_slice().into(),
                tags: Vec::new(),
                skip_history: true,
                idempotency_key: None,
            };
            assert_eq!(handle.command(call).await, Ok(()));
            let delivered = |call: &Call| matches!(call, Call::Publish { skip_history: true, .. });
            let count = |node: usize| {
                two.told[node].lock().expect("not poisoned").iter().filter(|call| delivered(call)).count()
            };
            until(async || count(1) > 0).await;
            assert_eq!((count(0), count(1)), (0, 1), "by its home there, and nothing here");
            // A slow machine may make one answer late: then the question is asked again.
            until(async || {
                let surveyed = handle.survey(Question::Info).await;
                match &surveyed.parts[..] {
                    [AnswerPart::Info(info)] if !surveyed.partial => {
                        assert_eq!((&*info.name, info.num_clients, info.num_users), ("node-1", 4, 1));
                        true
                    }
                    _ => false,
                }
            })
            .await;
            until(async || {
                let surveyed = handle.survey(Question::Channels { pattern: String::new() }).await;
                let expected = AnswerPart::Channels(vec![("room:a".to_owned(), 5); 2]);
                surveyed.parts == [expected]
            })
            .await;
            let placed = handle.place("7".to_owned()).await.expect("a place");
            assert!(placed.address.starts_with("node-"));
            // What shards tell is taken and acknowledged.
            let stream = 1;
            let report =
                Report { stream, sequence: 1, lost: false, slots: vec![(5, true)], news: Vec::new() };
            let acked =
                |call: &Call| matches!(call, Call::Cluster(ClusterCall::Ack { stream: 1, sequence: 1 }));
            until(async || {
                router.settle_report(0, Arc::new(report.clone()));
                two.told[0].lock().expect("not poisoned").iter().any(acked)
            })
            .await;
            let node = Arc::new(NodeState::new("a".to_owned(), "b".to_owned()));
            let metrics = crate::control::admin::Metrics::new(node, router.clone(), Vec::new());
            let text = metrics.render().expect("it renders");
            assert!(text.contains("ringmain_cluster_peers 1\n"), "{text}");
            assert!(
                text.contains("ringmain_cluster_messages_dropped_total{reason=\"malformed\"} 0\n"),
                "{text}"
            );
            assert!(text.contains("ringmain_cluster_pauses_total "), "{text}");
            handle.leave().await;
            until(async || two.nodes[1].1.figures().peers == 0).await;
        });
    }
}
