//! Latency end to end at fixed rates, and what a publication costs there.

use comfy_table::Table;
use serde_json::{Value, json};

use super::trial::{Setting, Trial};
use super::{Bench, Rounds, differences, ratio_text, series, text};
use crate::command::CommandError;
use crate::measure::series::Series;
use crate::plan::Pace;

type Percentile = (&'static str, fn(&Trial) -> f64);

const PERCENTILES: [Percentile; 5] = [
    ("p50 us", |trial| trial.latency.p50_us),
    ("p90 us", |trial| trial.latency.p90_us),
    ("p99 us", |trial| trial.latency.p99_us),
    ("p99.9 us", |trial| trial.latency.p999_us),
    ("max us", |trial| trial.latency.max_us),
];

/// A kind of operation is named in the table from so many for each publication on.
const NAMED_MIN: f64 = 0.05;

pub(super) fn run(bench: &mut Bench<'_>) -> Result<(Vec<Table>, Value), CommandError> {
    let (mut tables, mut results) = (Vec::new(), Vec::new());
    for rate in bench.args.rates.clone() {
        if crate::io::signals::interrupted() {
            break;
        }
        let setting = Setting { pace: Pace::PerSecond(rate), subscribe: true };
        let rounds = bench.rounds(&format!("{rate:.0}/s"), setting)?;
        tables.push(latency_table(rate, &rounds));
        tables.push(cost_table(&format!("{rate:.0}/s"), &rounds));
        results.push(json!({
            "rate": rate, "nodes": rounds[0], "bare": rounds[1], "comparison": comparison(&rounds),
        }));
    }
    Ok((tables, Value::from(results)))
}

fn latency_table(rate: f64, [nodes, bare]: &Rounds) -> Table {
    let mut table = Table::new();
    let names = PERCENTILES.iter().map(|(name, _)| (*name).to_owned());
    table.set_header([format!("latency at {rate:.0}/s"), "reached/s".into()].into_iter().chain(names));
    let of = |trials: &[Trial], value: fn(&Trial) -> f64| series(trials, |trial| Some(value(trial)));
    for (title, trials) in [("nodes", nodes), ("bare client", bare)] {
        let reached = Series::of(&series(trials, |trial| Some(trial.per_second)));
        let reached = reached.map_or("unknown".into(), |reached| format!("{:.0}", reached.median));
        let cells = PERCENTILES.iter().map(|(_, value)| brief(&of(trials, *value)));
        table.add_row([title.to_owned(), reached].into_iter().chain(cells));
    }
    let compared = |compare: fn(&[f64], &[f64]) -> String| {
        PERCENTILES.map(|(_, value)| compare(&of(nodes, value), &of(bare, value)))
    };
    let added = compared(|nodes, bare| brief(&differences(nodes, bare)));
    table.add_row(["added".to_owned(), String::new()].into_iter().chain(added));
    table.add_row(["ratio".to_owned(), String::new()].into_iter().chain(compared(ratio_text)));
    table
}

/// Whole numbers.
pub(super) fn brief(values: &[f64]) -> String {
    let text = |series: Series| format!("{:.0} ({:.0}–{:.0})", series.median, series.min, series.max);
    Series::of(values).map_or("unknown".into(), text)
}

/// What a publication costs, on average.
pub(super) fn cost_table(title: &str, rounds: &Rounds) -> Table {
    let mut table = Table::new();
    table.set_header([
        &format!("per publication at {title}"),
        "CPU us publishing",
        "CPU us subscribing",
        "bus bytes out / in",
        "segments out",
        "broker bytes in / out",
        "broker operations",
    ]);
    for (title, trials) in [("nodes", &rounds[0]), ("bare client", &rounds[1])] {
        let of = |value: &dyn Fn(&Trial) -> Option<f64>| series(trials, value);
        let one = |value: &dyn Fn(&Trial) -> Option<f64>| {
            Series::of(&of(value)).map_or("unknown".into(), |series| format!("{:.1}", series.median))
        };
        let second = text(&of(&|trial| trial.cpu_us.get(1).copied()));
        table.add_row([
            title.to_owned(),
            text(&of(&|trial| trial.cpu_us.first().copied())),
            if trials.iter().all(|trial| trial.cpu_us.len() == 1) { "in the same".into() } else { second },
            format!("{} / {}", one(&|trial| trial.sent_bytes), one(&|trial| trial.received_bytes)),
            of_two_digits(&of(&|trial| trial.sent_segments)),
            format!("{} / {}", one(&|trial| trial.broker_in_bytes), one(&|trial| trial.broker_out_bytes)),
            operations(trials),
        ]);
    }
    table
}

pub(super) fn of_two_digits(values: &[f64]) -> String {
    Series::of(values).map_or("unknown".into(), |series| format!("{:.2}", series.median))
}

/// `3.02: publish 1.00, xadd 1.00, …`, of the last round.
fn operations(trials: &[Trial]) -> String {
    let Some((trial, all)) = trials.last().and_then(|trial| Some((trial, trial.broker_operations?))) else {
        return "unknown".into();
    };
    let kinds = trial.broker_by_kind.iter().filter(|(_, count)| **count >= NAMED_MIN);
    let kinds: Vec<String> = kinds.map(|(kind, count)| format!("{kind} {count:.2}")).collect();
    format!("{all:.2}: {}", kinds.join(", "))
}

fn comparison([nodes, bare]: &Rounds) -> Value {
    let entries = PERCENTILES.map(|(name, value)| {
        let of = |trials: &[Trial]| series(trials, |trial| Some(value(trial)));
        let (nodes, bare) = (of(nodes), of(bare));
        let added = Series::of(&differences(&nodes, &bare));
        json!({
            "percentile": name, "nodes_us": Series::of(&nodes), "bare_us": Series::of(&bare),
            "added_us": added, "ratio": Series::of_ratios(&nodes, &bare),
        })
    });
    Value::from(entries.to_vec())
}
