//! Which master a request goes to, and the lives of the sessions.
//!
//! Owns: domains, their sessions, publications between two tries. Must not know: what goes over a connection.
//!
//! A *domain* is the place of a master: when another server takes its hash slots over, the domain goes on with that
//! server, after a `Lost` and a `Back`. A domain whose slots went elsewhere is `Back` once, so that its channels are
//! subscribed where they live now, and is used again.
//!
//! Invariants: no request is routed to a session that is not up; every `Lost` is followed by a `Back` as soon as the
//! domain's slots have a session, or are others'.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::backend::{BackendEnds, Domain, Reply, Request};
use crate::backoff::Backoff;
use crate::redis::context::{Context, Publication, RETRY_MAX};
use crate::redis::session::{self, Job, Post, Word};
use crate::redis::topology::{Master, Topology};
use crate::redis::wire::Dialer;
use crate::types::PublishError;

/// Time between two looks at publications that wait for another try.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// First and longest pause before a master is dialed again.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(500);

struct Live {
    jobs: mpsc::UnboundedSender<Job>,
    /// Dropped or used: the session ends.
    stop: Option<oneshot::Sender<()>>,
    is_up: bool,
}

struct Place {
    /// Of the master, as they are now; its session looks at it.
    replicas: Rc<Cell<usize>>,
    /// Who owns it now; `None`: nobody, its slots are others'.
    master: Option<Master>,
    live: Option<Live>,
    backoff: Backoff,
    /// `Lost` was told and no `Back` since.
    is_lost: bool,
    /// Why the last session did not begin, so that it is logged once.
    failure: Option<session::Reason>,
}

impl Place {
    fn count_replicas(&self, master: &Master) {
        if let Some(replicas) = master.replicas {
            self.replicas.set(replicas);
        }
    }
}

pub(super) struct Router {
    context: Rc<Context>,
    dialer: Dialer,
    places: Vec<Place>,
    words: mpsc::UnboundedSender<Word>,
    reachable: bool,
}

/// Serves until the hub is gone.
pub(super) async fn run(
    context: Rc<Context>,
    dialer: Dialer,
    mut requests: mpsc::UnboundedReceiver<Request>,
    mut seen: mpsc::UnboundedReceiver<Topology>,
) {
    let (words, mut said) = mpsc::unbounded_channel();
    let mut router = Router { context, dialer, places: Vec::new(), words, reachable: false };
    let mut retries = tokio::time::interval(RETRY_EVERY);
    retries.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some(word) = said.recv() => router.hear(word).await,
            Some(topology) = seen.recv() => router.see(topology).await,
            request = requests.recv() => match request {
                Some(request) => router.route(Job::Request(request)).await,
                None => return,
            },
            _ = retries.tick() => router.retry().await,
        }
    }
}

/// What a request is about, if it is about a channel.
fn name_of(job: &Job) -> &std::sync::Arc<str> {
    match job {
        Job::Again(publication) => &publication.target.name,
        Job::Request(request) => &request.target().name,
    }
}

impl Router {
    /// The session that is up for a slot.
    fn live(&self, slot: u16) -> Option<&Live> {
        let owns = |place: &&Place| place.master.as_ref().is_some_and(|master| master.owns(slot));
        self.places.iter().find(owns)?.live.as_ref().filter(|live| live.is_up)
    }

    async fn route(&self, job: Job) {
        let slot =
            if self.context.options.is_cluster() { self.context.script.place(name_of(&job)).slot } else { 0 };
        let refused = match self.live(slot) {
            None => Some(job),
            Some(live) => live.jobs.send(job).err().map(|unsent| unsent.0),
        };
        if let Some(job) = refused {
            session::refuse(&self.context, job).await;
        }
    }

    /// Publications whose first try has no answer that can be believed.
    async fn retry(&self) {
        let orphans = std::mem::take(&mut *self.context.orphans.borrow_mut());
        for publication in orphans {
            let Publication { asked, target, .. } = &publication;
            if asked.elapsed() >= RETRY_MAX {
                self.context.answer(&publication, Err(PublishError::Unknown)).await;
            } else if self.live(self.context.script.place(&target.name).slot).is_some() {
                self.route(Job::Again(publication)).await;
            } else {
                self.context.orphans.borrow_mut().push(publication);
            }
        }
    }

    async fn hear(&mut self, word: Word) {
        match word {
            Word::Up(domain) => {
                let Some(place) = self.places.get_mut(domain.0 as usize) else { return };
                place.backoff.reset();
                place.failure = None;
                if let Some(live) = &mut place.live {
                    live.is_up = true;
                }
                tracing::info!(domain = domain.0, "a Redis master can be reached");
                // Before anything that is asked from now on: publications keep the order in which they were asked.
                self.retry().await;
                self.back(domain).await;
            }
            Word::Ended { domain, reason } => {
                let Some(place) = self.places.get_mut(domain.0 as usize) else { return };
                let was_up = place.live.take().is_some_and(|live| live.is_up);
                if !was_up && place.failure.as_ref() != Some(&reason) {
                    tracing::warn!(domain = domain.0, %reason, "a Redis master cannot be reached");
                    place.failure = Some(reason.clone());
                }
                if was_up {
                    tracing::warn!(domain = domain.0, %reason, "a Redis master is lost");
                    place.is_lost = true;
                    self.tell_reachable().await;
                    self.context.tell(Reply::Lost { domain }).await;
                }
                self.begin(domain).await;
            }
        }
        self.tell_reachable().await;
    }

    async fn back(&mut self, domain: Domain) {
        if let Some(place) = self.places.get_mut(domain.0 as usize) {
            place.is_lost = false;
        }
        self.context.tell(Reply::Back { domain }).await;
    }

    /// A new session for a domain that has none.
    async fn begin(&mut self, domain: Domain) {
        let Some(place) = self.places.get_mut(domain.0 as usize) else { return };
        let Some(master) = place.master.clone() else {
            if place.is_lost {
                self.back(domain).await;
            }
            return;
        };
        let (jobs, asked) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel();
        let pause = place.backoff.next(self.context.nonce());
        place.live = Some(Live { jobs, stop: Some(stop), is_up: false });
        let replicas = place.replicas.clone();
        let (context, dialer) = (self.context.clone(), self.dialer.clone());
        let post = Post { context, dialer, domain, master, replicas };
        tokio::task::spawn_local(session::run(post, pause, asked, stopped, self.words.clone()));
    }

    /// The topology as it is now.
    async fn see(&mut self, topology: Topology) {
        let mut unplaced: Vec<Master> = topology;
        let mut orphaned = Vec::new();
        for (index, place) in self.places.iter_mut().enumerate() {
            let Some(master) = &place.master else { continue };
            match unplaced.iter().position(|seen| seen.address == master.address) {
                Some(at) => {
                    let seen = unplaced.swap_remove(at);
                    let moved = seen.ranges != master.ranges;
                    place.count_replicas(&seen);
                    place.master = Some(seen);
                    if moved && let Some(live) = &mut place.live {
                        live.stop.take();
                    }
                }
                None => orphaned.push(index),
            }
        }
        for index in orphaned {
            let place = &mut self.places[index];
            let owned = |master: &Master| place.master.as_ref().map_or(0, |old| overlap(old, master));
            let heir = (0..unplaced.len()).max_by_key(|at| owned(&unplaced[*at]));
            let heir = heir.filter(|at| owned(&unplaced[*at]) > 0).map(|at| unplaced.swap_remove(at));
            if let Some(heir) = &heir {
                place.count_replicas(heir);
            }
            place.master = heir;
            place.backoff.reset();
            if let Some(live) = &mut place.live {
                live.stop.take();
            }
        }
        for master in unplaced {
            let free = self.places.iter().position(|place| place.master.is_none() && place.live.is_none());
            let place = Place {
                replicas: Rc::new(Cell::new(master.replicas.unwrap_or(0))),
                master: Some(master),
                live: None,
                backoff: Backoff::new(PAUSE_MIN, PAUSE_MAX),
                is_lost: false,
                failure: None,
            };
            let index = free.unwrap_or(self.places.len());
            match self.places.get_mut(index) {
                Some(free) => *free = place,
                None => self.places.push(place),
            }
            self.begin(Domain(index as u32)).await;
        }
        self.tell_reachable().await;
    }

    async fn tell_reachable(&mut self) {
        let mut owned = self.places.iter().filter(|place| place.master.is_some()).peekable();
        let is_up = |place: &Place| place.live.as_ref().is_some_and(|live| live.is_up);
        let reachable = owned.peek().is_some() && owned.all(is_up);
        self.context.urgent.set(!reachable);
        if std::mem::replace(&mut self.reachable, reachable) != reachable {
            self.context.tell(Reply::Reachable(reachable)).await;
        }
    }
}

/// Starts everything and serves until the hub is gone.
pub(super) async fn serve(context: Rc<Context>, dialer: Dialer, ends: BackendEnds) {
    let (topology, seen) = mpsc::unbounded_channel();
    let watch = crate::redis::topology::watch(context.clone(), dialer.clone(), topology);
    let serve = run(context, dialer, ends.requests, seen);
    tokio::select! {
        () = watch => (),
        () = serve => (),
    }
}

/// Slots that two masters have in common.
fn overlap(one: &Master, other: &Master) -> u32 {
    let common = |a: &(u16, u16), b: &(u16, u16)| {
        let (from, to) = (a.0.max(b.0), a.1.min(b.1));
        if from <= to { u32::from(to - from) + 1 } else { 0 }
    };
    one.ranges.iter().flat_map(|a| other.ranges.iter().map(move |b| common(a, b))).sum()
}
