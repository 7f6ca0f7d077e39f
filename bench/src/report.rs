//! Results as people read them and as programs do.

use std::fs;
use std::path::Path;

use comfy_table::Table;
use serde::Serialize;
use serde_json::{Value, json};
use thiserror::Error;

use crate::measure::machine::Machine;
use crate::run::Outcome;

/// More foreign work than this on a core of the measurement is worth a word.
const FOREIGN_SHARE_MAX: f64 = 0.1;

/// The JSON file cannot be written; the table has been printed all the same.
#[derive(Debug, Error)]
#[error("cannot write {path}: {why}")]
pub(crate) struct ReportError {
    path: String,
    why: std::io::Error,
}

/// Prints the header, `tables` and notes, and writes the JSON file where one is wanted.
pub(crate) fn publish(
    machine: &Machine,
    tables: &[Table],
    notes: &[String],
    result: &impl Serialize,
    json_file: Option<&Path>,
) -> Result<(), ReportError> {
    println!("{}", machine.text());
    for table in tables {
        println!("{table}");
    }
    for note in notes {
        println!("{note}");
    }
    let Some(path) = json_file else { return Ok(()) };
    let document = json!({ "machine": machine, "result": result });
    let text = serde_json::to_string_pretty(&document).unwrap_or_default() + "\n";
    fs::write(path, text).map_err(|why| ReportError { path: path.display().to_string(), why })
}

/// A table of names and values.
pub(crate) fn pairs(title: &str, rows: &[(&str, String)]) -> Table {
    let mut table = Table::new();
    table.set_header([title, ""]);
    for (name, value) in rows {
        table.add_row([(*name).to_owned(), value.clone()]);
    }
    table
}

/// One run as rows; `unit` is what was counted, as "delivery".
pub(crate) fn outcome_rows(outcome: &Outcome, unit: &str) -> Vec<(&'static str, String)> {
    let known = |value: Option<String>| value.unwrap_or_else(|| "unknown (no --pid)".into());
    let latency = &outcome.latency;
    vec![
        ("server CPU", known(outcome.cpu_us_per_unit.map(|us| format!("{us:.3} us per {unit}")))),
        ("  of it in ksoftirqd", known(outcome.ksoftirqd_share.map(percent))),
        ("  server busy", known(outcome.server_busy.map(percent))),
        ("client busy", percent(outcome.client_busy)),
        ("rate", format!("{:.0} {unit} per s", outcome.units as f64 / outcome.seconds)),
        ("counted", format!("{} {unit} in {:.2} s", outcome.units, outcome.seconds)),
        (
            "latency us p50 / p90 / p99 / p99.9 / max",
            format!(
                "{:.0} / {:.0} / {:.0} / {:.0} / {:.0}",
                latency.p50_us, latency.p90_us, latency.p99_us, latency.p999_us, latency.max_us
            ),
        ),
        (
            "bytes per unit from / to the server",
            format!("{:.1} / {:.1}", outcome.bytes_in_per_unit, outcome.bytes_out_per_unit),
        ),
    ]
}

/// What went wrong, one line each; nothing when nothing did.
pub(crate) fn problem_notes(name: &str, outcome: &Outcome) -> Vec<String> {
    let mut notes: Vec<String> =
        outcome.problems.iter().map(|(what, count)| format!("PROBLEM {name}: {what} ({count}x)")).collect();
    if outcome.interrupted {
        notes.push(format!("{name}: interrupted; this is what there is"));
    }
    if outcome.units == 0 {
        notes.push(format!("PROBLEM {name}: nothing was counted"));
    }
    notes
}

/// Says so when other work ran on the cores of the measurement.
pub(crate) fn noise_note(outcomes: &[&Outcome]) -> Option<String> {
    let worst = |share: fn(&Outcome) -> Option<f64>| {
        outcomes.iter().filter_map(|outcome| share(outcome)).fold(0.0, f64::max)
    };
    let (server, client) =
        (worst(|outcome| outcome.server_core_foreign), worst(|outcome| outcome.client_core_foreign));
    (server.max(client) > FOREIGN_SHARE_MAX).then(|| {
        let (server, client) = (percent(server), percent(client));
        format!("NOISY: other work took up to {server} of the server's core and {client} of the client's")
    })
}

/// `12.3 %`.
pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// An outcome as JSON, with its name.
pub(crate) fn outcome_json(name: &str, outcome: &Outcome) -> Value {
    json!({ "server": name, "outcome": outcome })
}
