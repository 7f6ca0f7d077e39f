//! The contract suite: the clauses of [`crate::contract`] as tests that every backend passes.
//!
//! Owns: what is checked. Must not know: which backend it is, or whether time is real. So nothing here
//! expects a moment: it settles until something holds, or fails when the cluster's patience ends.
//!
//! A backend's tests make a [`Cluster`] (and [`Faults`], if faults can be made there) and name the groups:
//!
//! ```text
//! ringmain_bus::contract_suite!(my_cluster());
//! ringmain_bus::contract_suite_late!(my_cluster());
//! ringmain_bus::contract_suite_faults!(my_cluster());
//! ```
//!
//! Every test's name begins with the clause that it is for. Beside its own assertions, [`Probe`] checks
//! with every single event, in every test: the chain (P2), the names of publications (P3), order and
//! repeats of ephemeral ones (E1, E2), one answer per command (C1), silence after close (C5), and one's own
//! publications (C6).

mod ephemeral;
mod faults;
mod general;
mod history;
mod late;
mod probe;
mod stream;

use ringmain_proto::time::Now;

use crate::contract::Bus;

pub use ephemeral::*;
pub use faults::*;
pub use general::*;
pub use history::*;
pub use late::*;
pub use probe::{Answer, Probe, Seen};
pub use stream::*;

/// Some nodes on one bus, as a backend's tests make them.
pub trait Cluster {
    /// Number of nodes, at least 1.
    fn nodes(&self) -> usize;

    /// A node's port.
    fn node(&mut self, node: usize) -> &mut dyn Bus;

    /// The time now.
    fn now(&self) -> Now;

    /// Lets time pass: until something may have happened, but no longer than `ms_max`, which is not 0.
    fn pass(&mut self, ms_max: u64);

    /// A number that no other run of the suite has on the same broker: channel names carry it.
    fn run_id(&self) -> u64;

    /// How long to wait for what must happen at last, in milliseconds: beyond the backend's slowest
    /// failover.
    fn patience_ms(&self) -> u64 {
        30_000
    }

    /// Largest record of one publication, in bytes.
    fn record_bytes_max(&self) -> usize;

    /// How much later than it should the machine has run things until now, in milliseconds: what it was late since a
    /// limit of time began is added to that limit. 0 on virtual time.
    fn late_ms(&self) -> u64 {
        0
    }
}

/// A cluster whose nodes answer late.
pub trait Late: Cluster {
    /// Commands of one node without an answer, above which they are refused.
    fn commands_max(&self) -> usize;

    /// Publications that make a node overrun which does not poll: so many, and its queues are full.
    fn overrun_publications(&self) -> usize;
}

/// A cluster of at least two nodes where faults can be made.
pub trait Faults: Late {
    /// The broker dies; its data survives.
    fn kill_broker(&mut self);

    /// The broker says nothing any more, and keeps its connections.
    fn pause_broker(&mut self);

    /// The broker is back after [`Faults::kill_broker`] or [`Faults::pause_broker`].
    fn restore_broker(&mut self);

    /// Whether a broker that was killed comes back as another life of its data, as Redis does (a new replication id):
    /// each is told as another epoch that came from the one before, and positions are good there.
    fn restart_is_a_new_life(&self) -> bool {
        false
    }

    /// The broker's data is gone.
    fn wipe(&mut self);

    /// What is published from now on is not on the replica ...
    fn stop_replication(&mut self);

    /// ... which takes the master's place now.
    fn fail_over(&mut self);

    /// Cuts a node's connections, which may be made again at once.
    fn cut(&mut self, node: usize);

    /// Cuts a node off ...
    fn isolate(&mut self, node: usize);

    /// ... until now.
    fn rejoin(&mut self, node: usize);

    /// The next `count` answers to a node's commands get lost.
    fn lose_answers(&mut self, node: usize, count: u32);

    /// The next `count` publications on their way to a node get lost.
    fn lose_arrivals(&mut self, node: usize, count: u32);
}

/// Makes a test of each clause named, against the cluster that the expression gives.
#[macro_export]
macro_rules! contract_tests {
    ($cluster:expr; $($clause:ident),+ $(,)?) => {
        $(
            #[test]
            fn $clause() {
                $crate::suite::$clause($cluster);
            }
        )+
    };
}

/// The clauses for every backend, one node or many.
#[macro_export]
macro_rules! contract_suite {
    ($cluster:expr) => {
        $crate::contract_tests!($cluster;
            p1_all_nodes_see_one_order,
            p2_arrivals_chain_from_the_opened_position,
            p3_an_epoch_is_not_shared_by_channels,
            p4_what_was_accepted_is_read_back,
            p6_a_repeated_key_answers_the_first_position,
            p6_a_key_is_compared_within_its_channel,
            p7_no_publication_between_the_opened_position_and_the_arrivals,
            p8_history_since_gives_all_after_it,
            p8_history_is_limited_at_its_far_end,
            p8_history_reversed_goes_back_from_since,
            p9_history_since_a_trimmed_offset_gives_what_is_left,
            p9_history_since_above_the_top_gives_nothing,
            p10_a_wrong_epoch_is_an_error,
            p10_an_absent_epoch_is_not_compared,
            p11_after_clear_offsets_go_on_in_the_same_epoch,
            p12_history_keeps_its_size,
            p12_history_keeps_its_time,
            p12_the_position_outlives_the_history,
            e1_ephemeral_order_per_publisher,
            e3_ephemeral_publications_reach_all_nodes,
            e3_a_channel_opened_again_at_once_misses_nothing,
            e4_ephemeral_channels_have_no_position,
            c1_every_command_is_answered_once,
            c4_a_publication_at_the_limit_is_taken_and_above_it_refused,
            c4_a_key_at_the_limit_is_taken_and_above_it_refused,
            c5_a_closed_channel_is_quiet,
            c5_an_id_given_to_another_channel_is_that_channel,
            c6_ones_own_publication_comes_once,
            c7_commands_need_no_open,
            c7_opening_twice_answers_twice_and_closes_once,
        );
    };
}

/// The clauses for backends that answer late.
#[macro_export]
macro_rules! contract_suite_late {
    ($cluster:expr) => {
        $crate::contract_tests!($cluster;
            c1_commands_of_a_channel_closed_meanwhile_are_answered,
            c4_commands_at_the_limit_are_taken_and_above_it_refused,
            c4_a_node_that_does_not_poll_gets_all_or_is_told,
            c4_a_node_that_does_not_poll_is_told_of_ephemeral_loss,
        );
    };
}

/// The clauses about faults.
#[macro_export]
macro_rules! contract_suite_faults {
    ($cluster:expr) => {
        $crate::contract_tests!($cluster;
            p1_what_waits_for_the_broker_keeps_its_order,
            p2_a_hole_is_filled_from_history,
            p2_a_long_hole_is_filled_from_history,
            p2_a_lost_tail_is_found_without_a_later_message,
            p2_a_hole_beyond_history_is_told,
            p3_a_failover_reuses_no_name,
            p4_accepted_publications_that_a_failover_took_are_told,
            p5_a_lost_answer_is_unknown_or_the_publication_stands_once,
            p5_unknown_published_again_stands_once,
            p7_opening_during_faults_misses_nothing,
            p13_wiped_data_is_told_to_quiet_channels,
            p13_wiped_data_is_told_before_new_arrivals,
            e3_ephemeral_loss_is_told,
            e3_a_cut_is_told_to_ephemeral_channels,
            c1_commands_in_flight_at_a_loss_are_answered,
            c2_a_dead_broker_is_visible,
            c2_a_silent_broker_is_visible,
            c2_while_down_everything_fails_as_temporary,
            c3_a_cut_node_catches_up_by_itself,
            c3_all_is_whole_after_the_broker_is_back,
            c3_many_channels_come_back,
        );
    };
}
