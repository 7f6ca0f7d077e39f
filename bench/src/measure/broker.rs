//! What a broker itself has counted: INFO of Redis, /varz of NATS. Kafka says nothing to clients.
//!
//! Figures are of all servers of a cluster together. Our own questions are in them: a few in a run.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use redis::Client;
use serde::Serialize;
use serde_json::Value;

use crate::server::parse_address;

/// One question, at most.
const ASK_MAX: Duration = Duration::from_secs(5);
/// The largest answer that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

/// Up to one moment, or between two.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct BrokerCounts {
    pub(crate) in_bytes: u64,
    pub(crate) out_bytes: u64,
    /// Commands (Redis, those within scripts counted too) or messages in and out (NATS).
    pub(crate) operations: u64,
    /// Which they were.
    pub(crate) by_kind: BTreeMap<String, u64>,
}

impl BrokerCounts {
    pub(crate) fn since(&self, earlier: &BrokerCounts) -> BrokerCounts {
        let before = |kind: &String| earlier.by_kind.get(kind).copied().unwrap_or(0);
        let by_kind =
            self.by_kind.iter().map(|(kind, count)| (kind.clone(), count.saturating_sub(before(kind))));
        BrokerCounts {
            in_bytes: self.in_bytes.saturating_sub(earlier.in_bytes),
            out_bytes: self.out_bytes.saturating_sub(earlier.out_bytes),
            operations: self.operations.saturating_sub(earlier.operations),
            by_kind: by_kind.filter(|(_, count)| *count > 0).collect(),
        }
    }

    fn count(&mut self, kind: &str, count: u64) {
        *self.by_kind.entry(kind.to_owned()).or_default() += count;
    }
}

/// Who is asked.
#[derive(Clone, Debug)]
pub(crate) enum Broker {
    /// URLs of all masters, which may hold a password.
    Redis(Vec<String>),
    /// Addresses of monitoring ports.
    Nats(Vec<String>),
    Unknown,
}

impl Broker {
    /// The broker of `url`; NATS is asked where `monitors` says. One that does not answer is unknown.
    pub(crate) fn of(url: &str, monitors: &[String]) -> Broker {
        match url.split_once("://").map_or("", |(scheme, _)| scheme) {
            "redis" => Broker::Redis(vec![redis_url(url, None)]),
            "redis+cluster" => Broker::Redis(masters(url).unwrap_or_default()),
            "nats" if !monitors.is_empty() => Broker::Nats(monitors.to_vec()),
            _ => Broker::Unknown,
        }
    }

    /// `None`: unknown.
    pub(crate) fn counts(&self) -> Option<BrokerCounts> {
        let mut counts = BrokerCounts::default();
        match self {
            Broker::Redis(urls) if !urls.is_empty() => {
                urls.iter().try_for_each(|url| redis(url, &mut counts))
            }
            Broker::Nats(monitors) => monitors.iter().try_for_each(|at| nats(at, &mut counts)),
            Broker::Redis(_) | Broker::Unknown => None,
        }
        .map(|()| counts)
    }
}

/// `url` as the crate `redis` takes it, with the first of its servers or another, speaking RESP3.
pub(crate) fn redis_url(url: &str, server: Option<&str>) -> String {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let (authority, path) = rest.split_once(['/', '?']).unwrap_or((rest, ""));
    let (login, servers) =
        authority.rsplit_once('@').map_or(("", authority), |(login, servers)| (login, servers));
    let server = server.unwrap_or_else(|| servers.split(',').next().unwrap_or(servers));
    let at = if login.is_empty() { "" } else { "@" };
    let database = path
        .split('?')
        .next()
        .filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    format!("redis://{login}{at}{server}/{}?protocol=resp3", database.unwrap_or("0"))
}

fn connection(url: &str) -> Option<redis::Connection> {
    let connection = Client::open(url).ok()?.get_connection_with_timeout(ASK_MAX).ok()?;
    connection.set_read_timeout(Some(ASK_MAX)).ok()?;
    Some(connection)
}

/// URLs of a cluster's masters.
fn masters(url: &str) -> Option<Vec<String>> {
    let text: String =
        redis::cmd("CLUSTER").arg("NODES").query(&mut connection(&redis_url(url, None))?).ok()?;
    let address = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (address, flags) = (fields.next()?, fields.next()?);
        flags.contains("master").then(|| address.split('@').next().unwrap_or(address).to_owned())
    };
    Some(text.lines().filter_map(address).map(|address| redis_url(url, Some(&address))).collect())
}

fn redis(url: &str, counts: &mut BrokerCounts) -> Option<()> {
    let mut connection = connection(url)?;
    let stats: String = redis::cmd("INFO").arg("stats").query(&mut connection).ok()?;
    let commands: String = redis::cmd("INFO").arg("commandstats").query(&mut connection).ok()?;
    let of = |name: &str| {
        let line = stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    counts.in_bytes += of("total_net_input_bytes");
    counts.out_bytes += of("total_net_output_bytes");
    for line in commands.lines() {
        let Some((name, rest)) = line.strip_prefix("cmdstat_").and_then(|line| line.split_once(":calls="))
        else {
            continue;
        };
        let calls = rest.split(',').next().and_then(|calls| calls.parse().ok()).unwrap_or(0);
        counts.operations += calls;
        counts.count(name, calls);
    }
    Some(())
}

fn nats(monitor: &str, counts: &mut BrokerCounts) -> Option<()> {
    let address = parse_address(monitor)?;
    let mut stream = TcpStream::connect_timeout(&address.into(), ASK_MAX).ok()?;
    stream.set_read_timeout(Some(ASK_MAX)).ok()?;
    write!(stream, "GET /varz HTTP/1.0\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.take(ANSWER_BYTES_MAX).read_to_string(&mut answer).ok()?;
    let varz: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
    let of = |name: &str| varz.get(name).and_then(Value::as_u64).unwrap_or(0);
    counts.in_bytes += of("in_bytes");
    counts.out_bytes += of("out_bytes");
    counts.operations += of("in_msgs") + of("out_msgs");
    counts.count("in", of("in_msgs"));
    counts.count("out", of("out_msgs"));
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_for_the_crate() {
        fn check(url: &str, server: Option<&str>, expected: &str) {
            assert_eq!(redis_url(url, server), format!("{expected}?protocol=resp3"), "{url}");
        }
        check("redis://h:1", None, "redis://h:1/0");
        check("redis://h:1/3?x=y", None, "redis://h:1/3");
        check("redis+cluster://u:p@h:1,g:2", None, "redis://u:p@h:1/0");
        check("redis+cluster://u:p@h:1,g:2", Some("k:3"), "redis://u:p@k:3/0");
    }

    #[test]
    fn differences() {
        let counts = |operations, pairs: &[(&str, u64)]| BrokerCounts {
            operations,
            by_kind: pairs.iter().map(|(kind, count)| ((*kind).to_owned(), *count)).collect(),
            ..BrokerCounts::default()
        };
        let since = counts(9, &[("get", 3), ("set", 6)]).since(&counts(4, &[("get", 3), ("set", 1)]));
        assert_eq!(since, counts(5, &[("set", 5)]));
        assert_eq!(Broker::of("kafka://a", &[]).counts(), None);
    }
}
