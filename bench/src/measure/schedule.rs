//! The open-loop schedule: when each operation was meant to happen, whatever the server does.
//!
//! Latency counted from the intended time makes a stalled server pay for every operation that it kept waiting
//! (coordinated omission). Operation k is meant for `start + k / rate`, computed from k each time, so no rounding adds
//! up over a run.

/// An operation this late says that the rate is not kept up.
const BEHIND_NS: u64 = 50_000_000;

/// A constant rate from a starting point. Times are nanoseconds of the monotonic clock.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    start_ns: u64,
    per_second: f64,
    next: u64,
}

impl Schedule {
    /// `per_second` must be above 0 (the command line sees to it).
    pub(crate) fn new(start_ns: u64, per_second: f64) -> Schedule {
        assert!(per_second > 0.0, "a rate of {per_second}");
        Schedule { start_ns, per_second, next: 0 }
    }

    /// The intended time of operation `k`.
    fn intended_ns(&self, k: u64) -> u64 {
        self.start_ns + (k as f64 * 1e9 / self.per_second) as u64
    }

    /// When the next operation is meant to happen.
    pub(crate) fn next_ns(&self) -> u64 {
        self.intended_ns(self.next)
    }

    /// Takes the next operation off the schedule if its time has come, and returns its intended time.
    pub(crate) fn take_due(&mut self, now_ns: u64) -> Option<u64> {
        let intended_ns = self.next_ns();
        if intended_ns > now_ns {
            return None;
        }
        self.next += 1;
        Some(intended_ns)
    }

    /// Whether more operations are overdue at `now_ns` than come in [`BEHIND_NS`]: the rate is not kept up.
    pub(crate) fn is_behind(&self, now_ns: u64) -> bool {
        self.intended_ns(self.next + 1) + BEHIND_NS < now_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intends_evenly_and_keeps_the_intended_time_when_late() {
        let mut schedule = Schedule::new(1_000, 4.0);
        assert_eq!(schedule.take_due(999), None);
        assert_eq!(schedule.take_due(1_000), Some(1_000));
        assert_eq!(schedule.take_due(250_000_999), None);
        // Two seconds later all that was missed comes with the time it was meant for.
        let late: Vec<u64> = std::iter::from_fn(|| schedule.take_due(2_000_001_000)).collect();
        let expected: Vec<u64> = (1..=8).map(|k| 1_000 + k * 250_000_000).collect();
        assert_eq!(late, expected);
    }

    #[test]
    fn does_not_drift() {
        let mut schedule = Schedule::new(0, 3.0);
        let taken = std::iter::from_fn(|| schedule.take_due(1_000_000_000_000)).count();
        assert_eq!(taken, 3001);
    }

    #[test]
    fn knows_when_it_is_behind() {
        let mut schedule = Schedule::new(0, 1000.0);
        assert!(!schedule.is_behind(1_000_000 + BEHIND_NS));
        assert!(schedule.is_behind(1_000_001 + BEHIND_NS));
        schedule.take_due(BEHIND_NS);
        assert!(!schedule.is_behind(1_000_001 + BEHIND_NS));
    }
}
