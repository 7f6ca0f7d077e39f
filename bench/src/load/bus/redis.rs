//! Redis by the crate `redis`: multiplexed connections and pipelines; sharded pub/sub in a cluster.

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, PushKind, Value};
use tokio::sync::mpsc;

use super::pace::{Due, drive, over};
use super::{BusError, Flow, OPEN_MAX, Receiver, channel, failed, payload};
use crate::measure::broker::redis_url;
use crate::plan::BusPlan;

/// What a stream keeps, as the demo's rooms do.
const HISTORY: u64 = 100;

/// The servers that channels are on; one without a cluster.
struct Masters {
    connections: Vec<MultiplexedConnection>,
    /// By number of the channel.
    of_channel: Vec<usize>,
    clustered: bool,
}

pub(super) async fn publish(plan: &BusPlan, flow: &Arc<Flow>) -> Result<(), BusError> {
    let (pushes, _unused) = mpsc::unbounded_channel();
    let masters = connect(plan, pushes).await?;
    let result = drive(plan.pace, flow, |batch| send(plan, &masters, batch)).await;
    if plan.stored {
        for number in 0..plan.channels {
            let mut connection = masters.connections[masters.of_channel[number as usize]].clone();
            let gone = redis::cmd("DEL").arg(stream(plan, number)).exec_async(&mut connection).await;
            gone.map_err(|error| failed("DEL", error))?;
        }
    }
    result
}

/// One pipeline for each server.
fn send(
    plan: &BusPlan,
    masters: &Masters,
    batch: Vec<Due>,
) -> impl Future<Output = Result<u64, BusError>> + use<> {
    let mut pipes = vec![redis::pipe(); masters.connections.len()];
    let command = if masters.clustered { "SPUBLISH" } else { "PUBLISH" };
    let count = batch.len() as u64;
    for due in batch {
        let number = due.number % plan.channels;
        let pipe = &mut pipes[masters.of_channel[number as usize]];
        let payload = payload(plan.size, due.meant_ns);
        if plan.stored {
            let key = stream(plan, number);
            pipe.cmd("XADD")
                .arg(key)
                .arg("MAXLEN")
                .arg("~")
                .arg(HISTORY)
                .arg("*")
                .arg("d")
                .arg(&payload)
                .ignore();
        }
        pipe.cmd(command).arg(channel(plan, number)).arg(payload).ignore();
    }
    let under_way: Vec<_> = pipes
        .into_iter()
        .zip(&masters.connections)
        .filter(|(pipe, _)| !pipe.is_empty())
        .map(|(pipe, connection)| {
            let mut connection = connection.clone();
            async move { pipe.exec_async(&mut connection).await }
        })
        .collect();
    async move {
        let all = futures_util::future::try_join_all(under_way).await;
        all.map(|_| count).map_err(|error| failed("a pipeline", error))
    }
}

pub(super) async fn subscribe(plan: &BusPlan, receiver: &mut Receiver) -> Result<(), BusError> {
    let (pushes, mut pushed) = mpsc::unbounded_channel();
    let masters = connect(plan, pushes).await?;
    let command = if masters.clustered { "SSUBSCRIBE" } else { "SUBSCRIBE" };
    for number in 0..plan.channels {
        let mut connection = masters.connections[masters.of_channel[number as usize]].clone();
        let subscribed = redis::cmd(command).arg(channel(plan, number)).exec_async(&mut connection).await;
        subscribed.map_err(|error| failed("subscribe", error))?;
    }
    let flow = Arc::clone(&receiver.flow);
    flow.ready();
    let end = over(&flow);
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => return Ok(()),
            push = pushed.recv() => match push {
                Some(push) if matches!(push.kind, PushKind::Message | PushKind::SMessage) => {
                    let Some(Value::BulkString(payload)) = push.data.last() else { continue };
                    receiver.take(payload);
                }
                Some(push) if push.kind == PushKind::Disconnection => {
                    return Err(failed("subscribe", "the server closed the connection"));
                }
                Some(_) => {}
                None => return Err(failed("subscribe", "the connection is gone")),
            },
        }
    }
}

/// The key of a channel's stream; in its channel's slot, which the name alone decides.
fn stream(plan: &BusPlan, number: u64) -> String {
    channel(plan, number)
}

type Pushes = mpsc::UnboundedSender<redis::PushInfo>;

async fn connect(plan: &BusPlan, pushes: Pushes) -> Result<Masters, BusError> {
    let mut first = open(&redis_url(&plan.url, None), &pushes).await?;
    let clustered = plan.url.starts_with("redis+cluster://");
    if !clustered {
        let of_channel = vec![0; plan.channels as usize];
        return Ok(Masters { connections: vec![first], of_channel, clustered });
    }
    let slots: Value = redis::cmd("CLUSTER")
        .arg("SLOTS")
        .query_async(&mut first)
        .await
        .map_err(|error| failed("CLUSTER SLOTS", error))?;
    let ranges = ranges(&slots);
    let mut masters = Masters { connections: Vec::new(), of_channel: Vec::new(), clustered };
    let mut addresses: Vec<&String> = Vec::new();
    for number in 0..plan.channels {
        let slot: u64 = redis::cmd("CLUSTER")
            .arg("KEYSLOT")
            .arg(channel(plan, number))
            .query_async(&mut first)
            .await
            .map_err(|error| failed("CLUSTER KEYSLOT", error))?;
        let of = ranges.iter().find(|(from, to, _)| (*from..=*to).contains(&slot));
        let (_, _, address) = of.ok_or_else(|| failed("CLUSTER SLOTS", format!("nobody has slot {slot}")))?;
        let index = match addresses.iter().position(|known| *known == address) {
            Some(index) => index,
            None => {
                masters.connections.push(open(&redis_url(&plan.url, Some(address)), &pushes).await?);
                addresses.push(address);
                addresses.len() - 1
            }
        };
        masters.of_channel.push(index);
    }
    Ok(masters)
}

async fn open(url: &str, pushes: &Pushes) -> Result<MultiplexedConnection, BusError> {
    let client = Client::open(url).map_err(|error| failed("the URL", error))?;
    let config = AsyncConnectionConfig::new()
        .set_push_sender(pushes.clone())
        .set_connection_timeout(Some(OPEN_MAX))
        .set_response_timeout(Some(OPEN_MAX));
    let opened = client.get_multiplexed_async_connection_with_config(&config).await;
    opened.map_err(|error| failed("connect", error))
}

/// Slots from, to, and their master's address, as CLUSTER SLOTS answers.
fn ranges(slots: &Value) -> Vec<(u64, u64, String)> {
    let Value::Array(ranges) = slots else { return Vec::new() };
    let range = |range: &Value| {
        let Value::Array(parts) = range else { return None };
        let [Value::Int(from), Value::Int(to), Value::Array(master), ..] = &parts[..] else { return None };
        let [host, Value::Int(port), ..] = &master[..] else { return None };
        let host: String = redis::from_redis_value(host.clone()).ok()?;
        Some((*from as u64, *to as u64, format!("{host}:{port}")))
    };
    ranges.iter().filter_map(range).collect()
}
