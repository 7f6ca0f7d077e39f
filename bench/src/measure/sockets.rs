//! Bytes on the sockets between processes and a broker, whichever it is, as the kernel counts them.
//!
//! Read by `ss` (iproute2); where that is missing the figures are unknown. A connection that ends between two samples
//! takes its counts with it; those to a broker live as long as a run.

use std::collections::BTreeMap;
use std::process::Command;

use serde::Serialize;

/// Bytes and segments of one process, up to one moment or between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Traffic {
    pub(crate) sent_bytes: u64,
    pub(crate) received_bytes: u64,
    /// TCP segments with data, sent: how often something was written, at least.
    pub(crate) sent_segments: u64,
}

impl Traffic {
    pub(crate) fn since(&self, earlier: &Traffic) -> Traffic {
        Traffic {
            sent_bytes: self.sent_bytes.saturating_sub(earlier.sent_bytes),
            received_bytes: self.received_bytes.saturating_sub(earlier.received_bytes),
            sent_segments: self.sent_segments.saturating_sub(earlier.sent_segments),
        }
    }

    pub(crate) fn add(&mut self, other: Traffic) {
        self.sent_bytes += other.sent_bytes;
        self.received_bytes += other.received_bytes;
        self.sent_segments += other.sent_segments;
    }
}

/// Of each of `pids`, all connections but those to its own ports `served`: what it says to a broker.
pub(crate) fn outward(pids: &[u32], served: &[u16]) -> Option<BTreeMap<u32, Traffic>> {
    let output = Command::new("ss").args(["-tinpH", "state", "established"]).output().ok()?;
    output.status.success().then(|| parse(&String::from_utf8_lossy(&output.stdout), pids, served))
}

/// Each socket is a line of addresses and processes, and an indented one of figures.
fn parse(text: &str, pids: &[u32], served: &[u16]) -> BTreeMap<u32, Traffic> {
    let mut traffic: BTreeMap<u32, Traffic> = pids.iter().map(|&pid| (pid, Traffic::default())).collect();
    let mut of = None;
    for line in text.lines() {
        if !line.starts_with(char::is_whitespace) {
            of = owner(line, served);
            continue;
        }
        if let Some(traffic) = of.and_then(|pid| traffic.get_mut(&pid)) {
            traffic.add(Traffic {
                sent_bytes: figure(line, "bytes_sent:"),
                received_bytes: figure(line, "bytes_received:"),
                sent_segments: figure(line, "data_segs_out:"),
            });
        }
    }
    traffic
}

/// Whose a socket is, unless a client of ours is at its other end.
fn owner(line: &str, served: &[u16]) -> Option<u32> {
    let local = line.split_ascii_whitespace().find(|part| part.contains(':'))?;
    let port: u16 = local.rsplit_once(':')?.1.parse().ok()?;
    let (_, rest) = line.split_once("pid=")?;
    let digits = rest.split(|byte: char| !byte.is_ascii_digit()).next()?;
    (!served.contains(&port)).then(|| digits.parse().ok()).flatten()
}

fn figure(line: &str, name: &str) -> u64 {
    let value = line.split_ascii_whitespace().find_map(|part| part.strip_prefix(name));
    value.and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
0      0      127.0.0.1:50000  127.0.0.1:6379   users:((\"ringmain\",pid=7,fd=9))
\t cubic wscale:7,7 bytes_sent:100 bytes_acked:100 bytes_received:30 segs_out:9 data_segs_out:4 data_segs_in:3
0      0      127.0.0.1:8000   127.0.1.1:40000  users:((\"ringmain\",pid=7,fd=10))
\t cubic bytes_sent:9999 bytes_received:9999 data_segs_out:99
0      0      127.0.0.1:50001  127.0.0.1:6379   users:((\"ringmain\",pid=7,fd=11),(\"x\",pid=9,fd=1))
\t cubic bytes_sent:1 bytes_acked:1 bytes_received:2 data_segs_out:3
0      0      127.0.0.1:50002  127.0.0.1:6379   users:((\"other\",pid=8,fd=1))
\t cubic bytes_sent:5
0      0      127.0.0.1:50003  127.0.0.1:6379
\t cubic bytes_sent:6
";

    #[test]
    fn counts_what_processes_say_to_others() {
        let found = parse(TEXT, &[7, 5], &[8000]);
        let expected = Traffic { sent_bytes: 101, received_bytes: 32, sent_segments: 7 };
        assert_eq!(found, BTreeMap::from([(5, Traffic::default()), (7, expected)]));
        let since = expected.since(&Traffic { sent_bytes: 1, received_bytes: 40, sent_segments: 7 });
        assert_eq!(since, Traffic { sent_bytes: 100, received_bytes: 0, sent_segments: 0 });
    }
}
