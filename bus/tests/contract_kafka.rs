//! The contract suite on a real Kafka: three nodes on one broker. Tests that break the broker have it alone.

#[path = "live/kafka.rs"]
mod kafka;
mod live;

use kafka::{Kafka, NODES};
use live::Live;

fn shared() -> Live<Kafka> {
    Live::new(Kafka::shared(), NODES)
}

fn alone() -> Live<Kafka> {
    Live::new(Kafka::alone(), NODES)
}

ringmain_bus::contract_suite!(shared());
ringmain_bus::contract_suite_late!(shared());

mod faults {
    use super::*;

    ringmain_bus::contract_suite_faults!(alone());
}
