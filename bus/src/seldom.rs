//! What an operator is told again only after a while, for it would be told all the time. Reads the clock itself, so it
//! is for backends alone.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// How often the same thing is told.
const EVERY: Duration = Duration::from_secs(10);

/// When something was told last.
#[derive(Debug, Default)]
pub(crate) struct Seldom(Cell<Option<Instant>>);

impl Seldom {
    /// Whether it is to be told now; then it is not for a while.
    pub(crate) fn is_due(&self) -> bool {
        let is_due = self.0.get().is_none_or(|at| at.elapsed() >= EVERY);
        if is_due {
            self.0.set(Some(Instant::now()));
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_told_once_in_a_while() {
        let seldom = Seldom::default();
        assert_eq!((seldom.is_due(), seldom.is_due()), (true, false));
    }
}
