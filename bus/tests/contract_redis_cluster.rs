//! The contract suite on a real Redis cluster of six: three masters and their replicas.

mod live;
#[path = "live/redis.rs"]
mod servers;

use live::Live;
use ringmain_bus::backend::Interest;
use servers::{Kind, Redises, Shared, shared_cluster};

/// Nothing fails.
mod whole {
    use super::*;

    fn cluster() -> Live<Shared> {
        Live::new(Shared::new(shared_cluster(Kind::Redis)), 3)
    }

    ringmain_bus::contract_suite!(cluster());
    ringmain_bus::contract_suite_late!(cluster());
}

/// The same with interest by slot.
mod slots {
    use super::*;

    fn cluster() -> Live<Shared> {
        let mut options = shared_cluster(Kind::Redis);
        options.interest = Interest::Slots;
        options.prefix = "slots".to_owned();
        Live::new(Shared::new(options), 2)
    }

    ringmain_bus::contract_tests!(cluster();
        p1_all_nodes_see_one_order,
        p2_arrivals_chain_from_the_opened_position,
        p7_no_publication_between_the_opened_position_and_the_arrivals,
        p8_history_since_gives_all_after_it,
        e1_ephemeral_order_per_publisher,
        e3_a_channel_opened_again_at_once_misses_nothing,
        c5_a_closed_channel_is_quiet,
    );
}

/// Servers and ways to them fail.
mod faults {
    use super::*;

    fn cluster() -> Live<Redises> {
        Live::new(Redises::start(Kind::Redis, |_| ()), 3)
    }

    ringmain_bus::contract_suite_faults!(cluster());
}
