//! The contract suite on a real Redis server, and on a master with a replica behind one address.

mod live;
#[path = "live/redis.rs"]
mod servers;

use live::Live;
use ringmain_bus::backend::Interest;
use servers::{Kind, Pair, Shared, shared_single};

/// Three nodes on one server.
mod single {
    use super::*;

    fn cluster() -> Live<Shared> {
        Live::new(Shared::new(shared_single()), 3)
    }

    ringmain_bus::contract_suite!(cluster());
    ringmain_bus::contract_suite_late!(cluster());
}

/// The same with interest by slot.
mod slots {
    use super::*;

    fn cluster() -> Live<Shared> {
        let mut options = shared_single();
        options.interest = Interest::Slots;
        options.prefix = "slots".to_owned();
        Live::new(Shared::new(options), 2)
    }

    ringmain_bus::contract_suite!(cluster());
}

/// A master that fails, and its replica.
mod pair {
    use super::*;

    fn cluster() -> Live<Pair> {
        Live::new(Pair::start(Kind::Redis, |_| ()), 3)
    }

    ringmain_bus::contract_suite_faults!(cluster());
}
