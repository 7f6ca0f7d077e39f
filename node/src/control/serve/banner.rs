//! What a node says when it is ready.

use std::fmt::Write as _;
use std::net::SocketAddr;

use super::shards::host_text;
use crate::control::VERSION;
use crate::control::check::{Plan, mib};
use crate::control::config::BusUrl;
use crate::io::BoundAddress;

/// The path of the WebSocket endpoint.
const WEBSOCKET_PATH: &str = "/connection/websocket";

/// The block printed at the start: where to connect, what runs, and what deserves a look.
pub(super) fn text(plan: &Plan, addresses: &[BoundAddress], admin: SocketAddr) -> String {
    let mut out = format!("ringmain {VERSION} is ready\n");
    let mut line = |label: &str, text: &str| {
        let _ = writeln!(out, "  {label:<9}{text}");
    };
    for address in addresses {
        line("clients", &clients(address));
    }
    if plan.resolved.demo
        && let Some(BoundAddress::Tcp(address)) = addresses.first()
    {
        line("demo", &format!("open http://{}:{}/ in a browser", host_text(address.ip()), address.port()));
    }
    line(
        "admin",
        &format!("http://{}:{}  (/api, /health, /ready, /metrics)", host_text(admin.ip()), admin.port()),
    );
    let connections = plan.resolved.config.core.limits.connections_per_shard;
    let cpus = plan.cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    line("shards", &format!("{} on CPU {cpus}, {connections} connections each", plan.shards));
    let (total, budget) = (plan.memory.total_bytes(), plan.memory.budget_bytes);
    line("memory", &format!("{} at worst, of a budget of {}", mib(total), mib(budget)));
    let bus = &plan.resolved.config.node.bus.url;
    line("bus", &if *bus == BusUrl::Memory { "memory: this node alone".to_owned() } else { bus.shown() });
    for warning in plan.warnings() {
        line("WARNING", &warning);
    }
    // The empty line tells programs that the block is whole.
    out.push('\n');
    out
}

fn clients(address: &BoundAddress) -> String {
    match address {
        BoundAddress::Tcp(address) => format!("ws://{address}{WEBSOCKET_PATH}"),
        BoundAddress::Unix(path) => format!("unix:{}  ({WEBSOCKET_PATH})", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::check::tests::facts;
    use crate::control::config::tests::resolved;

    #[test]
    fn a_node_says_where_it_is_and_what_to_look_at() {
        let check = |demo: bool, listen: &str, parts: &[&str]| {
            let plan = Plan::new(resolved("", &[], &["server.shards=2"], demo).unwrap(), &facts());
            let address = BoundAddress::Tcp(listen.parse().unwrap());
            let text = text(
                &plan,
                &[address, BoundAddress::Unix("/run/r".into())],
                "127.0.0.1:8001".parse().unwrap(),
            );
            for part in parts {
                assert!(text.contains(part), "{part} in\n{text}");
            }
            assert_eq!(text.contains("demo"), demo);
        };
        check(
            false,
            "[::1]:8000",
            &[
                "ringmain 0.",
                "ws://[::1]:8000/connection/websocket",
                "unix:/run/r",
                "http://127.0.0.1:8001",
                "2 on CPU 0, 1",
                "WARNING  the server API refuses every call",
            ],
        );
        check(true, "0.0.0.0:8000", &["open http://localhost:8000/ in a browser", "WARNING  DEMO: anyone"]);
    }
}
