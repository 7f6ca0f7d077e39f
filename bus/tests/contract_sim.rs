//! The simulated broker passes the contract suite: three nodes, late answers, every fault; with ports that
//! try publishes again and with ports that leave it to the caller.

mod common;

use common::Simulated;
use ringmain_bus::sim::SimOptions;

mod retrying {
    use super::*;

    ringmain_bus::contract_suite!(Simulated::new(SimOptions::new(11)));
    ringmain_bus::contract_suite_late!(Simulated::new(SimOptions::new(12)));
    ringmain_bus::contract_suite_faults!(Simulated::new(SimOptions::new(13)));
}

mod not_retrying {
    use super::*;

    const OPTIONS: SimOptions = SimOptions { retries: false, ..SimOptions::new(14) };

    ringmain_bus::contract_suite!(Simulated::new(OPTIONS));
    ringmain_bus::contract_suite_late!(Simulated::new(OPTIONS));
    ringmain_bus::contract_suite_faults!(Simulated::new(OPTIONS));
}
