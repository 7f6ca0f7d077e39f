//! The doorbell's protocol under a model checker, which runs every order of steps.

mod atomic {
    pub(super) use loom::sync::atomic::{AtomicU8, Ordering, fence};
}
#[allow(clippy::duplicate_mod, reason = "the same protocol under other atomics")]
#[path = "bell_flag.rs"]
mod bell_flag;

use std::sync::Arc;

use bell_flag::{Bell, BellFlag};
use loom::sync::Notify;
use loom::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn no_order_of_steps_loses_a_wake_up() {
    let mut model = loom::model::Builder::new();
    // Three preemptions reach every known shape of such a race; without a bound it takes minutes.
    model.preemption_bound = Some(3);
    model.check(|| {
        let flag = Arc::new(BellFlag::new());
        let work = Arc::new(AtomicUsize::new(0));
        let eventfd = Arc::new(Notify::new());
        let ringers: Vec<_> = (0..2)
            .map(|_| {
                let (flag, work, eventfd) = (flag.clone(), work.clone(), eventfd.clone());
                loom::thread::spawn(move || {
                    work.fetch_add(1, Ordering::Relaxed);
                    if flag.ring().is_some() {
                        eventfd.notify();
                    }
                })
            })
            .collect();
        // The shard takes what is there, and waits for the bell until all has come. A lost wake-up would
        // be a deadlock, which the checker reports.
        let mut taken = 0;
        while taken < 2 {
            flag.fall_asleep(Bell::Nap);
            if work.load(Ordering::Relaxed) == 0 {
                eventfd.wait();
            }
            flag.wake_up();
            taken += work.swap(0, Ordering::Relaxed);
        }
        ringers.into_iter().for_each(|ringer| ringer.join().unwrap());
    });
}
