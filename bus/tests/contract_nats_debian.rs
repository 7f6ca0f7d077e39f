//! The contract suite on the NATS server of Debian (2.9): three nodes on a server of each test's own.

mod live;
#[path = "live/nats.rs"]
mod nats;

use live::Live;
use nats::{Nats, Version};

const NODES: usize = 3;

fn cluster() -> Live<Nats> {
    Live::new(Nats::single(Version::Debian), NODES)
}

ringmain_bus::contract_suite!(cluster());
ringmain_bus::contract_suite_late!(cluster());
ringmain_bus::contract_suite_faults!(cluster());
ringmain_bus::contract_tests!(cluster(); c3_thousands_of_channels_come_back);
