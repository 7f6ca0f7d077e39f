//! Latency end to end at fixed rates, and what a publication costs there.

use comfy_table::Table;
use serde_json::{Value, json};

use super::trial::{Setting, Trial};
use super::{Bench, Contestant, Rounds, differences, ratio_text, series, text};
use crate::command::CommandError;
use crate::measure::series::Series;
use crate::plan::Pace;
use crate::run::RunError;

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

/// A rate is found to this part of itself.
const RATE_GRAIN: f64 = 0.1;

pub(super) fn run(bench: &mut Bench<'_>) -> Result<(Vec<Table>, Value), CommandError> {
    let (mut tables, mut results) = (Vec::new(), Vec::new());
    let mut rates: Vec<(f64, Option<u32>)> = bench.args.rates.iter().map(|&rate| (rate, None)).collect();
    if let Some(percent) = bench.args.busy_max
        && let Some(rate) = rate_within(bench, percent)?
    {
        rates.retain(|(other, _)| *other != rate);
        rates.push((rate, Some(percent)));
    }
    for (rate, within) in rates {
        if crate::io::signals::interrupted() {
            break;
        }
        let setting = at(rate);
        let rounds = bench.rounds(&format!("{rate:.0}/s"), setting)?;
        tables.push(latency_table(rate, within, &rounds));
        tables.push(cost_table(&format!("{rate:.0}/s"), &rounds));
        results.push(json!({
            "rate": rate, "busy_max_percent": within, "nodes": rounds[0], "bare": rounds[1],
            "comparison": comparison(&rounds),
        }));
    }
    Ok((tables, Value::from(results)))
}

fn at(rate: f64) -> Setting {
    Setting { pace: Pace::PerSecond(rate), subscribe: true }
}

/// The highest rate at which the machine is at most so busy under the nodes' load, by halving; none if it is below a
/// tenth of the highest that was named.
fn rate_within(bench: &mut Bench<'_>, percent: u32) -> Result<Option<f64>, CommandError> {
    let highest = bench.args.rates.iter().copied().fold(0.0, f64::max);
    let (mut within, mut above, mut tried) = (0.0, f64::INFINITY, highest);
    while !crate::io::signals::interrupted() {
        bench.progress.set_prefix(format!("cross: how busy at {tried:.0}/s"));
        let trial = match bench.trial(Contestant::Nodes, at(tried)) {
            Err(CommandError::Run(RunError::Interrupted)) => return Ok(None),
            other => other?,
        };
        let is_within = trial.busy.is_some_and(|busy| busy * 100.0 <= f64::from(percent))
            && trial.per_second >= tried * (1.0 - RATE_GRAIN);
        *if is_within { &mut within } else { &mut above } = tried;
        if within == highest || above - within <= RATE_GRAIN * above || above <= RATE_GRAIN * highest {
            break;
        }
        tried = f64::midpoint(within, above);
    }
    Ok((within > 0.0).then_some(within))
}

fn latency_table(rate: f64, within: Option<u32>, [nodes, bare]: &Rounds) -> Table {
    let mut table = Table::new();
    let names = PERCENTILES.iter().map(|(name, _)| (*name).to_owned());
    let title = match within {
        None => format!("latency at {rate:.0}/s"),
        Some(percent) => format!("latency at {rate:.0}/s, the highest with at most {percent} % busy"),
    };
    let columns = [title, "reached/s".into(), "all cores busy".into()];
    table.set_header(columns.into_iter().chain(names));
    let of = |trials: &[Trial], value: fn(&Trial) -> f64| series(trials, |trial| Some(value(trial)));
    for (title, trials) in [("nodes", nodes), ("bare client", bare)] {
        let reached = Series::of(&series(trials, |trial| Some(trial.per_second)));
        let reached = reached.map_or("unknown".into(), |reached| format!("{:.0}", reached.median));
        let busy = Series::of(&series(trials, |trial| trial.busy));
        let busy = busy.map_or("unknown".into(), |busy| format!("{:.0} %", busy.median * 100.0));
        let cells = PERCENTILES.iter().map(|(_, value)| brief(&of(trials, *value)));
        table.add_row([title.to_owned(), reached, busy].into_iter().chain(cells));
    }
    let compared = |compare: fn(&[f64], &[f64]) -> String| {
        PERCENTILES.map(|(_, value)| compare(&of(nodes, value), &of(bare, value)))
    };
    let row = |title: &str| [title.to_owned(), String::new(), String::new()].into_iter();
    let added = compared(|nodes, bare| brief(&differences(nodes, bare)));
    table.add_row(row("added").chain(added));
    table.add_row(row("ratio").chain(compared(ratio_text)));
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
