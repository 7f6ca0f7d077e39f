//! The rule of epochs, exhausted within larger bounds than the tests allow themselves.
//!
//! `cargo run --release -p ringmain-bus --example exhaust_epochs -- --publications 3`
//!
//! Each bound of `lineage::search::Bounds` is an option with a number (`--promotions 2`, `--old-disks 1`,
//! `--fresh 1`); without options: three servers, two publications, one promotion. `--without Renewal`
//! leaves a clause out, also several. `--breadth 1` finds the shortest run, and needs about ten times the
//! memory. 100 bytes a state and up; it gives up beyond `--states-max`.

use std::time::Instant;

use ringmain_bus::lineage::search::{Bounds, Clause, Order, Rule, search};

struct Arguments {
    bounds: Bounds,
    rule: Rule,
    order: Order,
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let bounds = Bounds { promotions: 1, states_max: 50_000_000, ..Bounds::CALM };
    let mut parsed = Arguments { bounds, rule: Rule::WHOLE, order: Order::Depth };
    while let Some(name) = words.next() {
        let value = words.next().ok_or_else(|| format!("{name} wants a value"))?;
        if name == "--without" {
            let clause = Clause::ALL.into_iter().find(|clause| format!("{clause:?}") == value);
            parsed.rule = parsed.rule.without(clause.ok_or_else(|| format!("no clause {value}"))?);
            continue;
        }
        let number: u32 = value.parse().map_err(|_| format!("{name} wants a number"))?;
        set(&mut parsed, &name, number)?;
    }
    Ok(parsed)
}

fn set(parsed: &mut Arguments, name: &str, number: u32) -> Result<(), String> {
    let bounds = &mut parsed.bounds;
    let small = match name {
        "--servers" => &mut bounds.servers,
        "--publications" => &mut bounds.publications,
        "--promotions" => &mut bounds.promotions,
        "--cuts" => &mut bounds.cuts,
        "--strays" => &mut bounds.strays,
        "--flushes" => &mut bounds.flushes,
        "--restarts" => &mut bounds.restarts,
        "--old-disks" => &mut bounds.old_disks,
        "--crashes" => &mut bounds.crashes,
        "--history" | "--fresh" | "--states-max" | "--breadth" => {
            match name {
                "--history" => bounds.history = u64::from(number),
                "--fresh" => bounds.fresh = number != 0,
                "--states-max" => bounds.states_max = number as usize,
                _ => parsed.order = if number == 0 { Order::Depth } else { Order::Breadth },
            }
            return Ok(());
        }
        _ => return Err(format!("unknown option {name}")),
    };
    *small = u8::try_from(number).map_err(|_| format!("{name} is too large"))?;
    Ok(())
}

fn main() -> Result<(), String> {
    let Arguments { bounds, rule, order } = parse(std::env::args().skip(1))?;
    println!("{bounds:?}");
    let start = Instant::now();
    let report = search(&bounds, rule, order);
    let (states, seconds) = (report.states, start.elapsed().as_secs_f64());
    let extent = if report.complete { "complete" } else { "given up" };
    println!("{states} states, {} transitions, {extent}, {seconds:.1} s", report.transitions);
    match report.violation {
        None => println!("{} quiescent, no violation", report.quiescent),
        Some((violation, steps)) => {
            println!("{violation:?} after {} steps", steps.len());
            steps.iter().for_each(|step| println!("  {step:?}"));
        }
    }
    Ok(())
}
