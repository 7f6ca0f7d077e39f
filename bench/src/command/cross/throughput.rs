//! Throughput of publishing through one node, and what batches gain: a window of publications in flight, no subscriber.
//!
//! The node and the bare publisher are on the same core. With one in flight there are no batches; with more, both send
//! together what has come back meanwhile.

use comfy_table::Table;
use serde_json::{Value, json};

use super::latency::{brief, of_two_digits};
use super::trial::{Setting, Trial};
use super::{Bench, Rounds, ratio_text, series};
use crate::command::CommandError;
use crate::measure::series::Series;
use crate::plan::Pace;

pub(super) fn run(bench: &mut Bench<'_>) -> Result<(Option<Table>, Value), CommandError> {
    let (mut measured, mut results) = (Vec::new(), Vec::new());
    for window in bench.args.windows.clone() {
        if crate::io::signals::interrupted() {
            break;
        }
        let setting = Setting { pace: Pace::Window(window), subscribe: false };
        let rounds = bench.rounds(&format!("window {window}"), setting)?;
        let [nodes, bare] = [rate(&rounds[0]), rate(&rounds[1])];
        results.push(json!({
            "window": window, "nodes": rounds[0], "bare": rounds[1], "nodes_per_second": Series::of(&nodes),
            "bare_per_second": Series::of(&bare), "ratio": Series::of_ratios(&nodes, &bare),
        }));
        measured.push((window, rounds));
    }
    Ok(((!measured.is_empty()).then(|| table(&measured)), Value::from(results)))
}

fn rate(trials: &[Trial]) -> Vec<f64> {
    series(trials, |trial| Some(trial.per_second))
}

fn table(measured: &[(u32, Rounds)]) -> Table {
    let mut table = Table::new();
    table.set_header([
        "publishing, in flight",
        "nodes /s",
        "bare /s",
        "nodes / bare",
        "nodes: x the first",
        "bare: x the first",
        "CPU us nodes / bare",
        "broker operations nodes / bare",
        "segments nodes / bare",
    ]);
    for (window, [nodes, bare]) in measured {
        let first = &measured[0].1;
        let both = |value: &dyn Fn(&Trial) -> Option<f64>| {
            format!("{} / {}", of_two_digits(&series(nodes, value)), of_two_digits(&series(bare, value)))
        };
        table.add_row([
            window.to_string(),
            brief(&rate(nodes)),
            brief(&rate(bare)),
            ratio_text(&rate(nodes), &rate(bare)),
            ratio_text(&rate(nodes), &rate(&first[0])),
            ratio_text(&rate(bare), &rate(&first[1])),
            both(&|trial| trial.cpu_us.first().copied()),
            both(&|trial| trial.broker_operations),
            both(&|trial| trial.sent_segments),
        ]);
    }
    table
}
