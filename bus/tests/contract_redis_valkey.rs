//! The contract suite on Valkey: a cluster of six, and a master with a replica behind one address that fail.

mod live;
#[path = "live/redis.rs"]
mod servers;

use live::Live;
use servers::{Kind, Pair, Shared, shared_cluster};

/// Nothing fails.
mod whole {
    use super::*;

    fn cluster() -> Live<Shared> {
        Live::new(Shared::new(shared_cluster(Kind::Valkey)), 2)
    }

    ringmain_bus::contract_suite!(cluster());
}

/// A master that fails, and its replica.
mod pair {
    use super::*;

    fn cluster() -> Live<Pair> {
        Live::new(Pair::start(Kind::Valkey, |_| ()), 2)
    }

    ringmain_bus::contract_suite_faults!(cluster());
}
