//! Pauses between attempts to reach a broker: doubled up to a maximum, with jitter, so that the nodes of a system do not
//! come back all at once.

use std::time::Duration;

/// The pauses of one thing that is tried again and again.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    least: Duration,
    most: Duration,
    attempts: u32,
}

impl Backoff {
    /// Pauses from `least` to `most`.
    pub(crate) const fn new(least: Duration, most: Duration) -> Backoff {
        Backoff { least, most, attempts: 0 }
    }

    /// It was reached: the next pause is the first again.
    pub(crate) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// The next pause: between half and all of the doubled one, by a random number.
    pub(crate) fn next(&mut self, random: u64) -> Duration {
        let full = (self.least * 2u32.pow(self.attempts.min(16))).min(self.most);
        self.attempts = self.attempts.saturating_add(1);
        full / 2 + full / 2 * (random % 1024) as u32 / 1024
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_maximum() {
        let (least, most) = (Duration::from_millis(20), Duration::from_millis(500));
        let mut backoff = Backoff::new(least, most);
        let pauses: Vec<Duration> = (0..1000u64).map(|random| backoff.next(random)).collect();
        assert!(pauses[0] >= least / 2 && pauses[0] <= least);
        assert!(pauses[20..].iter().all(|pause| *pause >= most / 2 && *pause <= most));
        backoff.reset();
        assert!(backoff.next(1023) <= least);
    }
}
