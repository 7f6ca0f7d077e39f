//! When the bare clients publish, and how what they published comes back as confirmed.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use rustix::time::{ClockId, clock_gettime};
use tokio::io::unix::AsyncFd;

use super::{BusError, Flow};
use crate::io::alarm;
use crate::io::board::Phase;
use crate::measure::schedule::Schedule;
use crate::plan::Pace;

/// Messages of one batch, at most: what was due when the last one had left.
const BATCH_MAX: u64 = 256;
/// Messages without a confirmation in open loop, at most; above it they wait, and their latency counts the wait.
const UNCONFIRMED_MAX: u64 = 8_192;
/// A publisher looks for another phase this often.
const IDLE_NS: u64 = 2_000_000;

/// Nanoseconds of the monotonic clock.
pub(super) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// One message: its number and when it is meant to leave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Due {
    pub(super) number: u64,
    pub(super) meant_ns: u64,
}

/// Says what is to be published when.
pub(super) struct Pacer {
    pace: Pace,
    schedule: Option<Schedule>,
    published: u64,
    flow: Arc<Flow>,
}

impl Pacer {
    pub(super) fn new(pace: Pace, flow: &Arc<Flow>) -> Pacer {
        Pacer { pace, schedule: None, published: 0, flow: Arc::clone(flow) }
    }

    /// What is due now, and when to ask again; `None`: the run is over.
    pub(super) fn due(&mut self) -> Option<(Vec<Due>, u64)> {
        let now_ns = now_ns();
        match self.flow.phase() {
            Phase::Setup => return Some((Vec::new(), now_ns + IDLE_NS)),
            Phase::Finish => {
                if self.schedule.as_ref().is_some_and(|schedule| schedule.is_behind(now_ns)) {
                    self.flow.problem("the rate was not kept up");
                }
                return None;
            }
            Phase::Warmup | Phase::Measure => {}
        }
        let unconfirmed = self.published.saturating_sub(self.flow.confirmed.load(Ordering::Relaxed));
        let (most, batch_max) = match self.pace {
            // Two batches, so that one is under way while the other is made.
            Pace::Window(window) => (u64::from(window), u64::from(window).div_ceil(2)),
            Pace::PerSecond(_) => (UNCONFIRMED_MAX, BATCH_MAX),
        };
        if let (Pace::PerSecond(rate), None) = (self.pace, &self.schedule) {
            self.schedule = Some(Schedule::new(now_ns, rate));
        }
        let mut batch = Vec::new();
        let room = most.saturating_sub(unconfirmed).min(batch_max);
        while (batch.len() as u64) < room {
            let meant_ns = match &mut self.schedule {
                None => now_ns,
                Some(schedule) => match schedule.take_due(now_ns) {
                    Some(meant_ns) => meant_ns,
                    None => break,
                },
            };
            batch.push(Due { number: self.published, meant_ns });
            self.published += 1;
        }
        let has_room = unconfirmed + (batch.len() as u64) < most;
        let next_ns = match &self.schedule {
            Some(schedule) if has_room => schedule.next_ns(),
            None if has_room => now_ns,
            // A confirmation comes first.
            _ => now_ns + IDLE_NS,
        };
        Some((batch, next_ns))
    }
}

/// Publishes by `send`, whose future ends when the broker has confirmed its batch, until the run is over.
pub(super) async fn drive<F>(
    pace: Pace,
    flow: &Arc<Flow>,
    mut send: impl FnMut(Vec<Due>) -> F,
) -> Result<(), BusError>
where
    F: Future<Output = Result<u64, BusError>>,
{
    let timer = alarm::watched()?;
    let mut pacer = Pacer::new(pace, flow);
    let mut under_way = FuturesUnordered::new();
    flow.ready();
    while let Some((batch, next_ns)) = pacer.due() {
        if !batch.is_empty() {
            under_way.push(send(batch));
        }
        tokio::select! {
            Some(confirmed) = under_way.next(), if !under_way.is_empty() => {
                flow.confirmed.fetch_add(confirmed?, Ordering::Relaxed);
            }
            until = sleep_until(&timer, next_ns) => until?,
        }
    }
    Ok(())
}

async fn sleep_until(timer: &AsyncFd<OwnedFd>, at_ns: u64) -> Result<(), BusError> {
    if at_ns <= now_ns() {
        // Others must have their turn all the same.
        tokio::task::yield_now().await;
        return Ok(());
    }
    alarm::set(timer.get_ref(), at_ns)?;
    loop {
        let mut guard = timer.readable().await?;
        if now_ns() >= at_ns {
            return Ok(());
        }
        guard.clear_ready();
    }
}

/// The same for a thread that may block.
pub(super) fn block_until(timer: &OwnedFd, at_ns: u64) -> Result<(), BusError> {
    alarm::set(timer, at_ns)?;
    let mut waiting = [rustix::event::PollFd::new(timer, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut waiting, None)?;
    Ok(())
}

/// Ends when the run is over.
pub(super) async fn over(flow: &Flow) {
    while flow.phase() != Phase::Finish {
        tokio::time::sleep(Duration::from_nanos(IDLE_NS)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pacer(pace: Pace, phase: Phase) -> Pacer {
        let flow = Arc::new(Flow::default());
        flow.phase.store(phase as u64, Ordering::Relaxed);
        Pacer::new(pace, &flow)
    }

    #[test]
    fn a_window_goes_in_two_halves_and_opens_with_confirmations() {
        let mut pacer = pacer(Pace::Window(5), Phase::Measure);
        let mut batch = || pacer.due().map(|(batch, _)| batch.len());
        assert_eq!((batch(), batch(), batch()), (Some(3), Some(2), Some(0)));
        pacer.flow.confirmed.store(3, Ordering::Relaxed);
        assert_eq!(pacer.due().map(|(batch, _)| batch[0].number), Some(5));
    }

    #[test]
    fn nothing_leaves_before_the_warmup_or_after_the_end() {
        let mut early = pacer(Pace::Window(5), Phase::Setup);
        assert!(early.due().is_some_and(|(batch, _)| batch.is_empty()));
        assert!(pacer(Pace::PerSecond(5.0), Phase::Finish).due().is_none());
    }

    #[test]
    fn what_nobody_confirms_has_a_limit() {
        let mut pacer = pacer(Pace::PerSecond(1e7), Phase::Measure);
        let mut sent = 0;
        let end_ns = now_ns() + 50_000_000;
        while now_ns() < end_ns {
            sent += pacer.due().map_or(0, |(batch, _)| batch.len() as u64);
        }
        assert_eq!(sent, UNCONFIRMED_MAX);
    }
}
