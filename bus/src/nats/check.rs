//! What a NATS server's configuration gives up of the contract, found by asking it.
//!
//! Owns: the questions and the warnings. Must not know: a node's bus.

use std::sync::Arc;

use super::api::{Api, ApiError, Info};
use super::node::connect_options;
use super::options::NatsOptions;
use super::subjects::Subjects;
use crate::backend::Warning;

/// Asks each server and each stream.
pub async fn check(options: &NatsOptions) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let mut reached = None;
    for (host, port) in &options.servers {
        let connected = match connect_options(options, Arc::default()).await {
            Ok(connect) => {
                connect.connect(options.dialed(host, *port)).await.map_err(|error| error.to_string())
            }
            Err(error) => Err(format!("the credentials file cannot be read: {}", error.kind())),
        };
        match connected {
            Ok(client) => reached = Some(client),
            Err(error) => warnings.push(Warning::new(
                format!("the NATS server {host}:{port} cannot be used: {error}"),
                "start it, or take it out of the URL",
            )),
        }
    }
    let Some(client) = reached else { return warnings };
    let subjects = Subjects::new(options);
    for stream in 0..subjects.streams() {
        let name = subjects.stream_name(stream);
        match Api::new(client.clone(), name.clone()).info().await {
            Ok(info) => warnings.extend(of_stream(&name, &info, options)),
            // The first node makes it.
            Err(ApiError::NotFound) => (),
            Err(error) => warnings.push(Warning::new(
                format!("JetStream does not answer for stream {name}: {error}"),
                "configure `jetstream` on the servers, and see that most of them run",
            )),
        }
    }
    let power_cut = "a power cut of all servers may take acknowledged publications (it is told, not silent)";
    warnings.push(Warning::new(power_cut, "set `sync_interval: always` in the servers' `jetstream` section"));
    warnings
}

fn of_stream(name: &str, info: &Info, options: &NatsOptions) -> Vec<Warning> {
    let mut warnings = Vec::new();
    if let Some(streams) = info.other_streams(options) {
        warnings.push(Warning::new(
            format!(
                "stream {name} is of a bus with {streams} streams, not {}: no node gets ready",
                options.streams
            ),
            format!("write streams={streams} into the URL, or use another prefix"),
        ));
    }
    if info.replicas < 3 {
        warnings.push(Warning::new(
            format!(
                "stream {name} has {} copies: its server's loss is the loss of its history",
                info.replicas
            ),
            format!("nats stream edit {name} --replicas 3, in a cluster of three"),
        ));
    }
    if info.in_memory {
        warnings.push(Warning::new(
            format!("stream {name} is in memory: a restart of all servers loses it"),
            "remove the stream while the nodes are down; without storage=memory it is made anew in files",
        ));
    }
    let wanted = i64::from(options.history_size_max) + 2;
    if (0..wanted).contains(&info.per_subject_max) {
        warnings.push(Warning::new(
            format!(
                "stream {name} keeps {} messages of a channel, {wanted} are wanted",
                info.per_subject_max
            ),
            format!("nats stream edit {name} --max-msgs-per-subject {wanted}"),
        ));
    }
    if info.age_max_ms > 0 && info.age_max_ms < options.retention_ms {
        warnings.push(Warning::new(
            format!(
                "stream {name} keeps messages for {} s, less than positions shall last",
                info.age_max_ms / 1_000
            ),
            format!("nats stream edit {name} --max-age {}s", options.retention_ms / 1_000),
        ));
    }
    if info.bytes_max > 0 {
        warnings.push(Warning::new(
            format!("stream {name} drops its oldest messages above {} bytes", info.bytes_max),
            format!("nats stream edit {name} --max-bytes -1"),
        ));
    }
    if info.window_ms < options.idempotency_ms {
        warnings.push(Warning::new(
            format!("stream {name} remembers publication ids for {} ms only", info.window_ms),
            format!("nats stream edit {name} --dupe-window {}s", options.idempotency_ms.div_ceil(1_000)),
        ));
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_up_is_said() {
        let options = NatsOptions::default();
        let whole = Info {
            replicas: 3,
            per_subject_max: i64::from(options.history_size_max) + 2,
            bytes_max: -1,
            age_max_ms: options.retention_ms,
            window_ms: options.idempotency_ms,
            streams: Some(options.streams),
            ..Info::default()
        };
        assert_eq!(of_stream("s", &whole, &options), []);
        for poor in [
            Info { replicas: 1, ..whole.clone() },
            Info { in_memory: true, ..whole.clone() },
            Info { per_subject_max: 10, ..whole.clone() },
            Info { age_max_ms: 1, ..whole.clone() },
            Info { bytes_max: 1, ..whole.clone() },
            Info { window_ms: 0, ..whole.clone() },
            Info { streams: Some(options.streams + 1), ..whole.clone() },
        ] {
            assert_eq!(of_stream("s", &poor, &options).len(), 1, "{poor:?}");
        }
    }
}
