//! How a session begins: fresh connections, a master, a canary there and back, and the kept acks of earlier lives.
//!
//! Owns: the order of these steps. Must not know: what comes after.
//! Invariant: when the router hears of a session, its life is settled (L10) and every kept ack of its channels was
//! judged by a read in that life (L17).

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::{PushKind, Value};

use super::{CANARY, Ears, Ending, Post, Replicas, Session};
use crate::epoch::Position;
use crate::lineage::KeptAck;
use crate::redis::canary;
use crate::redis::context::{Context, Kept};
use crate::redis::script::{Answer, BATCH_MAX, Heard, LUA, Life, Operation, answers, heard};
use crate::redis::topology::text;
use crate::redis::wire::Connection;
use crate::types::HistoryQuery;

/// Longest time from the first dial to the first canary's return.
const BEGIN_MAX: Duration = Duration::from_millis(2_000);

pub(super) async fn begin(post: Post) -> Result<Session, Ending> {
    let settled = tokio::time::timeout(BEGIN_MAX, settle(&post)).await;
    let mut session = settled.map_err(|_| Ending::because("slow"))??;
    match mend(&mut session, &post).await {
        Ok(()) => {
            let now = Instant::now();
            session.canary_due = now + CANARY;
            Ok(session)
        }
        Err(ending) => {
            session.end().await;
            Err(ending)
        }
    }
}

async fn settle(post: &Post) -> Result<Session, Ending> {
    let Post { context, dialer, domain, master, replicas } = post;
    let mut link = dialer.server(&master.address).await?;
    let Value::Array(role) = link.ask(&redis::cmd("ROLE")).await? else {
        return Err(Ending::because("protocol"));
    };
    if role.first().and_then(text).as_deref() != Some("master") {
        return Err(Ending::because("not a master"));
    }
    let loaded = link.ask(redis::cmd("SCRIPT").arg("LOAD").arg(LUA)).await?;
    let sha = text(&loaded).ok_or(Ending::because("protocol"))?;
    let canary_key =
        context.script.names.canary(|slot| master.owns(slot)).ok_or(Ending::because("owns nothing"))?;
    let connection = dialer.server(&master.address).await?;
    let (names, cluster) = (context.script.names.clone(), context.options.is_cluster());
    let mut ears = Ears::new(connection, names, cluster, &canary_key);
    let life = first_canary(context, &mut link, &mut ears, &sha, &canary_key).await?;
    let now = Instant::now();
    Ok(Session {
        context: Rc::clone(context),
        domain: *domain,
        link,
        ears,
        sha,
        life,
        canary_key,
        replicas: replicas.clone(),
        flights: VecDeque::new(),
        groups: Default::default(),
        restless: Vec::new(),
        muted: None,
        confirmer: Replicas::new(dialer.server(&master.address).await?),
        confirming: VecDeque::new(),
        marks: Default::default(),
        kept: VecDeque::new(),
        kept_from: 0,
        touches: Default::default(),
        canary_sequence: 0,
        canary_due: now,
        unheard: VecDeque::new(),
        silent_turns: 0,
    })
}

/// Waits for the canary's subscription, sounds it, and waits for it to be heard.
async fn first_canary(
    context: &Context,
    link: &mut Connection,
    ears: &mut Ears,
    sha: &str,
    key: &str,
) -> Result<Life, Ending> {
    loop {
        match ears.next().await? {
            Value::Push { kind: PushKind::Subscribe | PushKind::SSubscribe, .. } => break,
            Value::ServerError(_) => return Err(Ending::because("subscription refused")),
            _ => (),
        }
    }
    let payload = canary::encode(context.incarnation, 0, std::iter::empty());
    let operation = context.script.canary(key, context.nonce(), payload);
    let Some(Answer::Canary(life, _)) = call(context, link, sha, &[operation]).await?.pop() else {
        return Err(Ending::because("canary refused"));
    };
    loop {
        let Value::Push { kind: PushKind::Message | PushKind::SMessage, data } = ears.next().await? else {
            continue;
        };
        let Some(Value::BulkString(bytes)) = data.into_iter().nth(1) else { continue };
        let Some(Heard::Canary { life: heard, payload }) = heard(&bytes) else { continue };
        let is_ours = canary::decode(payload).is_some_and(|(whose, ..)| whose == context.incarnation);
        if heard == life && is_ours {
            return Ok(life);
        }
    }
}

/// One call of the script on a connection with nothing in flight.
async fn call(
    context: &Context,
    link: &mut Connection,
    sha: &str,
    operations: &[Operation],
) -> Result<Vec<Answer>, Ending> {
    let value = link.ask(&context.script.call(sha, operations)).await?;
    answers(value).filter(|answers| answers.len() == operations.len()).ok_or(Ending::because("protocol"))
}

/// Judges the kept acks of the channels that live here now, and publishes again what is lost.
async fn mend(session: &mut Session, post: &Post) -> Result<(), Ending> {
    let context = &post.context;
    let here = |name: &Arc<str>| post.master.owns(context.script.place(name).slot);
    let names: Vec<Arc<str>> = context.kept.borrow().keys().filter(|name| here(name)).cloned().collect();
    for name in names {
        let mut kept = context.kept.borrow().get(&name).cloned().unwrap_or_default();
        mend_channel(session, &mut kept).await?;
        context.kept.borrow_mut().remove(&name);
        if session.replicas.get() > 0 {
            session.kept.extend(kept);
        } else {
            kept.iter().for_each(|kept| context.let_go(kept));
        }
    }
    Ok(())
}

async fn mend_channel(session: &mut Session, kept: &mut [Kept]) -> Result<(), Ending> {
    let context = session.context.clone();
    let Some(target) = kept.first().map(|kept| kept.target.clone()) else { return Ok(()) };
    let read = context.script.read(&target, &HistoryQuery::TOP, context.epoch());
    let answer = call(&context, &mut session.link, &session.sha, &[read]).await?.pop();
    let Some(Answer::Page { key, floor, .. }) = answer else { return Err(Ending::because("mending failed")) };
    if key.replid != session.life.replid {
        return Err(Ending::because("another life"));
    }
    let mut lost: Vec<&mut Kept> =
        kept.iter_mut().filter_map(|kept| kept.ack.is_lost(&key, floor).then_some(kept)).collect();
    if !lost.is_empty() {
        tracing::info!(count = lost.len(), "publishing again what a failover took");
    }
    for batch in lost.chunks_mut(BATCH_MAX) {
        let again = |kept: &&mut Kept| {
            context.script.publish(&kept.target, &kept.id, kept.envelope.clone(), context.epoch())
        };
        let operations: Vec<Operation> = batch.iter().map(again).collect();
        let answers = call(&context, &mut session.link, &session.sha, &operations).await?;
        for (kept, answer) in batch.iter_mut().zip(answers) {
            let Answer::Published { key, offset, .. } = answer else {
                return Err(Ending::because("mending failed"));
            };
            if key.replid != session.life.replid {
                return Err(Ending::because("another life"));
            }
            kept.ack = KeptAck::new(Position::new(key.epoch, offset), &key);
        }
    }
    Ok(())
}
