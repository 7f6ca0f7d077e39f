//! NATS by the crate `async-nats`: core subjects, or a stream that publishes again what it has stored.
//!
//! Core publishes are confirmed by an echo behind each batch, those into a stream by the stream's acknowledgements.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use async_nats::{Client, ConnectOptions};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::pace::{Due, drive, over};
use super::{BusError, Flow, OPEN_MAX, Receiver, failed, payload};
use crate::plan::BusPlan;

/// What a stream keeps of each channel, as the demo's rooms do.
const HISTORY: u64 = 100;
/// Copies of a stream in a cluster that has as many servers.
const REPLICAS: u64 = 3;
/// Messages that a subscriber may be behind.
const BEHIND_MAX: usize = 1 << 20;

/// Batches that wait: answers that are missing, and whom to tell.
type Waiting = Rc<RefCell<VecDeque<(u64, oneshot::Sender<()>)>>>;

fn subject(plan: &BusPlan, side: &str, number: u64) -> String {
    format!("{}.{side}.{}", plan.prefix, number % plan.channels)
}

pub(super) async fn publish(plan: &BusPlan, flow: &Arc<Flow>) -> Result<(), BusError> {
    let client = connect(plan).await?;
    if plan.stored {
        make_stream(plan, &client).await?;
    }
    let echo = format!("{}.echo", plan.prefix);
    let mut answers = client.subscribe(echo.clone()).await.map_err(|error| failed("subscribe", error))?;
    let waiting = Waiting::default();
    let counted = async {
        while let Some(answer) = answers.next().await {
            if plan.stored && answer.payload.windows(8).any(|bytes| bytes == b"\"error\":") {
                flow.problem("a publish was refused by the stream");
            }
            let mut waiting = waiting.borrow_mut();
            let Some((missing, _)) = waiting.front_mut() else { continue };
            *missing -= 1;
            if *missing == 0
                && let Some((_, told)) = waiting.pop_front()
            {
                // Whoever waited may be gone at the end of a run.
                let _ = told.send(());
            }
        }
        Err(failed("subscribe", "the connection is gone"))
    };
    let published = drive(plan.pace, flow, |batch| send(plan, &client, &waiting, &echo, batch));
    let result = tokio::select! {
        result = counted => result,
        result = published => result,
    };
    if plan.stored {
        ask(&client, &format!("$JS.API.STREAM.DELETE.{}", plan.prefix), &json!({})).await?;
    }
    result
}

async fn send(
    plan: &BusPlan,
    client: &Client,
    waiting: &Waiting,
    echo: &str,
    batch: Vec<Due>,
) -> Result<u64, BusError> {
    let count = batch.len() as u64;
    let (told, answered) = oneshot::channel();
    waiting.borrow_mut().push_back((if plan.stored { count } else { 1 }, told));
    for due in batch {
        let payload = Bytes::from(payload(plan.size, due.meant_ns));
        let sent = if plan.stored {
            client.publish_with_reply(subject(plan, "in", due.number), echo.to_owned(), payload).await
        } else {
            client.publish(subject(plan, "out", due.number), payload).await
        };
        sent.map_err(|error| failed("publish", error))?;
    }
    if !plan.stored {
        let sent = client.publish(echo.to_owned(), Bytes::new()).await;
        sent.map_err(|error| failed("publish", error))?;
    }
    answered.await.map_err(|error| failed("publish", error))?;
    Ok(count)
}

pub(super) async fn subscribe(plan: &BusPlan, receiver: &mut Receiver) -> Result<(), BusError> {
    let client = connect(plan).await?;
    let all = client.subscribe(format!("{}.out.*", plan.prefix)).await;
    let mut messages = all.map_err(|error| failed("subscribe", error))?;
    // The answer to a request behind the subscription: the server has it.
    let own = client.new_inbox();
    let mut pong = client.subscribe(own.clone()).await.map_err(|error| failed("subscribe", error))?;
    client.publish(own, Bytes::new()).await.map_err(|error| failed("subscribe", error))?;
    pong.next().await;
    let flow = Arc::clone(&receiver.flow);
    flow.ready();
    let end = over(&flow);
    tokio::pin!(end);
    loop {
        tokio::select! {
            () = &mut end => return Ok(()),
            message = messages.next() => match message {
                Some(message) => receiver.take(&message.payload),
                None => return Err(failed("subscribe", "the connection is gone")),
            },
        }
    }
}

async fn connect(plan: &BusPlan) -> Result<Client, BusError> {
    let servers: Vec<String> = servers(&plan.url);
    let options = ConnectOptions::new().connection_timeout(OPEN_MAX).subscription_capacity(BEHIND_MAX);
    options.connect(servers).await.map_err(|error| failed("connect", error))
}

/// One URL for each server of a list; all with the first one's login.
fn servers(url: &str) -> Vec<String> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let rest = rest.split(['/', '?']).next().unwrap_or(rest);
    let (login, hosts) =
        rest.rsplit_once('@').map_or((String::new(), rest), |(login, hosts)| (format!("{login}@"), hosts));
    hosts.split(',').map(|host| format!("nats://{login}{host}")).collect()
}

async fn make_stream(plan: &BusPlan, client: &Client) -> Result<(), BusError> {
    let clustered = client.server_info().connect_urls.len() as u64 >= REPLICAS;
    let stream = json!({
        "name": plan.prefix,
        "subjects": [format!("{}.in.*", plan.prefix)],
        "storage": "file",
        "num_replicas": if clustered { REPLICAS } else { 1 },
        "max_msgs_per_subject": HISTORY,
        "republish": {"src": format!("{}.in.*", plan.prefix), "dest": format!("{}.out.{{{{wildcard(1)}}}}", plan.prefix)},
    });
    ask(client, &format!("$JS.API.STREAM.CREATE.{}", plan.prefix), &stream).await
}

/// A request to JetStream's API.
async fn ask(client: &Client, subject: &str, body: &Value) -> Result<(), BusError> {
    let asked = client.request(subject.to_owned(), body.to_string().into()).await;
    let answer = asked.map_err(|error| failed("JetStream", error))?;
    let answer: Value =
        serde_json::from_slice(&answer.payload).map_err(|error| failed("JetStream", error))?;
    match answer.get("error") {
        Some(error) => Err(failed("JetStream", error)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_servers_shares_its_login() {
        assert_eq!(servers("nats://a:1,b:2"), ["nats://a:1", "nats://b:2"]);
        assert_eq!(servers("nats://u:p@a:1,b:2/x?y=1"), ["nats://u:p@a:1", "nats://u:p@b:2"]);
    }
}
