//! Draining: sending the connections away before the process ends.
//!
//! Owns the timing: readiness is red first, for as long as a balancer takes to notice; then new
//! connections are refused and those there closed with 3001, at a pace that leaves a fifth of the time
//! for peers to take leave; what is left at the end is cut.

use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};

use super::shards::Shards;
use super::{ServeError, Signals};
use crate::control::config::ServerConfig;
use crate::control::router::{CallError, Router};
use crate::core::api::Call;
use crate::io::ShardEvent;

/// Closes per second of one shard at the least: few enough that other nodes take the clients up
/// without noticing (a connect costs them tens of microseconds).
const CLOSES_PER_SECOND_MIN: u32 = 1_000;

/// How long shards may take to end once they are asked to.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long to wait before a full control inbox is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// How a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Within its time.
    Drained,
    /// By a second signal.
    Cut {
        /// 128 and the signal's number, as a shell would say.
        exit_code: u8,
    },
}

/// Drains and stops the shards. A second signal ends it at once; a shard's failure is an error.
pub(super) async fn run(
    server: &ServerConfig,
    shards: &mut Shards,
    router: &Router,
    signals: &mut Signals,
) -> Result<Ending, ServeError> {
    let started = Instant::now();
    let deadline = started + Duration::from_millis(server.drain_timeout_ms);
    let delay = started + Duration::from_millis(server.drain_delay_ms);
    let drain = async {
        tokio::select! {
            () = sleep_until(delay) => {}
            failed = shards.failed() => return Err(failed),
        }
        send_away(shards, router, deadline).await
    };
    tokio::select! {
        result = drain => result?,
        (name, number) = signals.next() => {
            tracing::warn!(signal = name, "drain cut short");
            return Ok(Ending::Cut { exit_code: 128 + number });
        }
    }
    stop(shards).await;
    Ok(Ending::Drained)
}

async fn send_away(shards: &mut Shards, router: &Router, deadline: Instant) -> Result<(), ServeError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let closes_per_second = pace(shards.connections_max(), left);
    let told = async {
        while let Err(CallError::Busy) = router.each(Call::Drain { closes_per_second }).await {
            sleep(BUSY_PAUSE).await;
        }
    };
    let emptied = async {
        let mut empty = 0;
        while empty < shards.len() {
            match shards.event().await {
                ShardEvent::Drained(_) => empty += 1,
                ShardEvent::Stopped(shard) => return Err(shards.failure_of(shard)),
            }
        }
        Ok(())
    };
    let drained = async { tokio::join!(told, emptied).1 };
    tokio::select! {
        result = drained => result,
        () = sleep_until(deadline) => {
            tracing::warn!("drain timeout: what is still connected is cut");
            Ok(())
        }
    }
}

/// Closes per second that empty a shard of `connections` in four fifths of the time left.
fn pace(connections: u64, left: Duration) -> u32 {
    let window_ms = (left.as_millis() as u64 * 4 / 5).max(1);
    let needed = connections.saturating_mul(1_000).div_ceil(window_ms);
    u32::try_from(needed).unwrap_or(u32::MAX).max(CLOSES_PER_SECOND_MIN)
}

async fn stop(shards: &mut Shards) {
    shards.stop();
    let stopped = async {
        let mut left = shards.len();
        while left > 0 {
            if let ShardEvent::Stopped(_) = shards.event().await {
                left -= 1;
            }
        }
    };
    if tokio::time::timeout(STOP_TIMEOUT, stopped).await.is_err() {
        tracing::warn!("a shard did not end in time");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_empties_a_shard_in_four_fifths_of_the_time() {
        let check = |connections: u64, left_ms: u64, expected: u32| {
            assert_eq!(
                pace(connections, Duration::from_millis(left_ms)),
                expected,
                "{connections} in {left_ms}"
            );
        };
        check(0, 25_000, CLOSES_PER_SECOND_MIN);
        check(20_000, 25_000, 1_000);
        check(65_536, 25_000, 3_277);
        check(65_536, 0, 65_536_000);
        check(u64::MAX, 1, u32::MAX);
    }
}
