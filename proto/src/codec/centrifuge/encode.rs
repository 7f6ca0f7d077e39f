//! Replies and pushes to JSON.
//!
//! Straight appends. Within an object every field is written with a comma before it, and the first
//! comma becomes the opening brace at the end: so no field needs to know whether it is the first.

use super::usual::{publish_reply, usual_publication};
use crate::client::{CLIENT_ID_TEXT_BYTES, ClientId};
use crate::json::{write_raw, write_string};
use crate::message::{
    ClientInfo, ConnectResult, HistoryResult, Publication, Push, RefreshResult, Reply, SubscribeResult, Tags,
};

/// Room reserved for a message beside its payload: names, numbers, a channel, a user.
const ENVELOPE_BYTES: usize = 192;

/// Appends the reply to command `id`.
#[inline]
pub(in crate::codec) fn reply(id: u32, reply: &Reply<'_>, out: &mut Vec<u8>) {
    match reply {
        Reply::Publish if id != 0 => publish_reply(id, out),
        other => general_reply(id, other, out),
    }
}

pub(super) fn general_reply(id: u32, reply: &Reply<'_>, out: &mut Vec<u8>) {
    out.reserve(ENVELOPE_BYTES);
    let start = out.len();
    unsigned(out, ",\"id\":", u64::from(id));
    match reply {
        Reply::Error { code, message, temporary } => {
            key(out, ",\"error\":");
            object(out, |out| {
                unsigned(out, ",\"code\":", u64::from(*code));
                text(out, ",\"message\":", message);
                flag(out, ",\"temporary\":true", *temporary);
            });
        }
        Reply::Connect(result) => {
            key(out, ",\"connect\":");
            connect_result(out, result);
        }
        Reply::Subscribe(result) => {
            key(out, ",\"subscribe\":");
            subscribe_result(out, result);
        }
        Reply::Unsubscribe => key(out, ",\"unsubscribe\":{}"),
        Reply::Publish => key(out, ",\"publish\":{}"),
        Reply::Presence(members) => presence(out, members),
        Reply::PresenceStats { num_clients, num_users } => {
            key(out, ",\"presence_stats\":{\"num_clients\":");
            number(out, u64::from(*num_clients));
            key(out, ",\"num_users\":");
            number(out, u64::from(*num_users));
            out.push(b'}');
        }
        Reply::History(result) => history_result(out, result),
        Reply::Rpc { data } => {
            key(out, ",\"rpc\":");
            object(out, |out| raw(out, ",\"data\":", data));
        }
        Reply::Refresh(result) => {
            key(out, ",\"refresh\":");
            refresh_result(out, result, true);
        }
        Reply::SubRefresh(result) => {
            key(out, ",\"sub_refresh\":");
            refresh_result(out, result, false);
        }
    }
    close(out, start);
}

/// Appends a push.
#[inline]
pub(in crate::codec) fn push(push: &Push<'_>, out: &mut Vec<u8>) {
    match push {
        Push::Publication { channel, publication } if usual_publication(channel, publication, out) => {}
        other => general_push(other, out),
    }
}

pub(super) fn general_push(push: &Push<'_>, out: &mut Vec<u8>) {
    match push {
        Push::Publication { channel, publication } => {
            out.reserve(ENVELOPE_BYTES + publication.data.len());
            in_channel(out, channel, ",\"pub\":", |out| publication_object(out, publication));
        }
        Push::Join { channel, info } => {
            in_channel(out, channel, ",\"join\":{\"info\":", |out| {
                client_info(out, info);
                out.push(b'}');
            });
        }
        Push::Leave { channel, info } => {
            in_channel(out, channel, ",\"leave\":{\"info\":", |out| {
                client_info(out, info);
                out.push(b'}');
            });
        }
        Push::Unsubscribe { channel, code, reason } => in_channel(out, channel, ",\"unsubscribe\":", |out| {
            object(out, |out| {
                unsigned(out, ",\"code\":", u64::from(*code));
                text(out, ",\"reason\":", reason);
            });
        }),
        Push::Subscribe { channel, .. } => {
            in_channel(out, channel, ",\"subscribe\":", |out| subscribe_push(out, push));
        }
        Push::Message { data } => in_channel(out, "", ",\"message\":", |out| {
            object(out, |out| raw(out, ",\"data\":", data));
        }),
        Push::Disconnect { code, reason, reconnect } => in_channel(out, "", ",\"disconnect\":", |out| {
            object(out, |out| {
                unsigned(out, ",\"code\":", u64::from(*code));
                text(out, ",\"reason\":", reason);
                flag(out, ",\"reconnect\":true", *reconnect);
            });
        }),
        Push::Refresh { expires, ttl } => in_channel(out, "", ",\"refresh\":", |out| {
            object(out, |out| expiry(out, *expires, *ttl));
        }),
        Push::Connect(result) => in_channel(out, "", ",\"connect\":", |out| connect_push(out, result)),
        Push::Ping => out.extend_from_slice(b"{}"),
    }
}

/// The envelope of a push: channel (omitted when empty), then the body under `key`.
#[inline]
fn in_channel(out: &mut Vec<u8>, channel: &str, body_key: &str, body: impl FnOnce(&mut Vec<u8>)) {
    key(out, "{\"push\":{");
    if channel.is_empty() {
        key(out, &body_key[1..]);
    } else {
        key(out, "\"channel\":");
        write_string(out, channel);
        key(out, body_key);
    }
    body(out);
    key(out, "}}");
}

#[inline]
fn publication_object(out: &mut Vec<u8>, publication: &Publication<'_>) {
    object(out, |out| {
        raw(out, ",\"data\":", publication.data);
        if let Some(info) = &publication.info {
            key(out, ",\"info\":");
            client_info(out, info);
        }
        unsigned(out, ",\"offset\":", publication.offset);
        if !publication.tags.is_empty() {
            key(out, ",\"tags\":");
            tags_object(out, publication.tags);
        }
        if publication.time_ms != 0 {
            key(out, ",\"time\":");
            out.extend_from_slice(itoa::Buffer::new().format(publication.time_ms).as_bytes());
        }
        if let Some(epoch) = &publication.epoch {
            text(out, ",\"epoch\":", epoch);
        }
    });
}

fn tags_object(out: &mut Vec<u8>, tags: Tags<'_>) {
    object(out, |out| {
        for (name, value) in tags {
            out.push(b',');
            write_string(out, name);
            out.push(b':');
            write_string(out, value);
        }
    });
}

/// User and client are written even when empty.
#[inline]
fn client_info(out: &mut Vec<u8>, info: &ClientInfo<'_>) {
    key(out, "{\"user\":");
    write_string(out, info.user);
    key(out, ",\"client\":");
    client_id(out, info.client);
    raw(out, ",\"conn_info\":", info.conn_info.unwrap_or_default());
    raw(out, ",\"chan_info\":", info.chan_info.unwrap_or_default());
    out.push(b'}');
}

#[inline]
fn client_id(out: &mut Vec<u8>, client: ClientId) {
    let mut text = [b'"'; CLIENT_ID_TEXT_BYTES + 2];
    text[1..=CLIENT_ID_TEXT_BYTES].copy_from_slice(&client.text_bytes());
    out.extend_from_slice(&text);
}

fn publications(out: &mut Vec<u8>, publications: &[Publication<'_>]) {
    out.push(b'[');
    for (index, publication) in publications.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        publication_object(out, publication);
    }
    out.push(b']');
}

fn connect_result(out: &mut Vec<u8>, result: &ConnectResult<'_>) {
    object(out, |out| {
        text(out, ",\"client\":", result.client);
        text(out, ",\"version\":", result.version);
        expiry(out, result.expires, result.ttl);
        raw(out, ",\"data\":", result.data);
        connect_subs(out, result);
        unsigned(out, ",\"ping\":", u64::from(result.ping));
        flag(out, ",\"pong\":true", result.pong);
    });
}

/// The connect push has the fields of the result in another order.
fn connect_push(out: &mut Vec<u8>, result: &ConnectResult<'_>) {
    object(out, |out| {
        text(out, ",\"client\":", result.client);
        text(out, ",\"version\":", result.version);
        raw(out, ",\"data\":", result.data);
        connect_subs(out, result);
        expiry(out, result.expires, result.ttl);
        unsigned(out, ",\"ping\":", u64::from(result.ping));
        flag(out, ",\"pong\":true", result.pong);
    });
}

fn connect_subs(out: &mut Vec<u8>, result: &ConnectResult<'_>) {
    if result.subs.is_empty() {
        return;
    }
    key(out, ",\"subs\":");
    object(out, |out| {
        for (channel, sub) in result.subs {
            out.push(b',');
            write_string(out, channel);
            out.push(b':');
            subscribe_result(out, sub);
        }
    });
}

fn subscribe_result(out: &mut Vec<u8>, result: &SubscribeResult<'_>) {
    object(out, |out| {
        expiry(out, result.expires, result.ttl);
        flag(out, ",\"recoverable\":true", result.recoverable);
        text(out, ",\"epoch\":", &result.epoch);
        if !result.publications.is_empty() {
            key(out, ",\"publications\":");
            publications(out, result.publications);
        }
        flag(out, ",\"recovered\":true", result.recovered);
        unsigned(out, ",\"offset\":", result.offset);
        flag(out, ",\"positioned\":true", result.positioned);
        raw(out, ",\"data\":", result.data);
        flag(out, ",\"was_recovering\":true", result.was_recovering);
        flag(out, ",\"delta\":true", result.delta);
    });
}

fn subscribe_push(out: &mut Vec<u8>, push: &Push<'_>) {
    let Push::Subscribe { recoverable, positioned, epoch, offset, data, .. } = push else { return };
    object(out, |out| {
        flag(out, ",\"recoverable\":true", *recoverable);
        text(out, ",\"epoch\":", epoch);
        unsigned(out, ",\"offset\":", *offset);
        flag(out, ",\"positioned\":true", *positioned);
        raw(out, ",\"data\":", data);
    });
}

/// All three fields are always there.
fn history_result(out: &mut Vec<u8>, result: &HistoryResult<'_>) {
    key(out, ",\"history\":{\"publications\":");
    publications(out, result.publications);
    key(out, ",\"epoch\":");
    write_string(out, &result.epoch);
    key(out, ",\"offset\":");
    number(out, result.offset);
    out.push(b'}');
}

/// Members by client id; empty, it is still an object.
fn presence(out: &mut Vec<u8>, members: &[ClientInfo<'_>]) {
    key(out, ",\"presence\":{\"presence\":");
    object(out, |out| {
        for info in members {
            out.push(b',');
            client_id(out, info.client);
            out.push(b':');
            client_info(out, info);
        }
    });
    out.push(b'}');
}

fn refresh_result(out: &mut Vec<u8>, result: &RefreshResult<'_>, with_client: bool) {
    object(out, |out| {
        if with_client {
            text(out, ",\"client\":", result.client);
            text(out, ",\"version\":", result.version);
        }
        expiry(out, result.expires, result.ttl);
    });
}

fn expiry(out: &mut Vec<u8>, expires: bool, ttl: u32) {
    flag(out, ",\"expires\":true", expires);
    unsigned(out, ",\"ttl\":", u64::from(ttl));
}

/// An object whose fields each begin with a comma.
#[inline]
fn object(out: &mut Vec<u8>, fields: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    fields(out);
    close(out, start);
}

/// Turns the comma at `start` into the brace that opens the object, and closes it.
#[inline]
fn close(out: &mut Vec<u8>, start: usize) {
    match out.get_mut(start) {
        Some(comma) => *comma = b'{',
        None => out.push(b'{'),
    }
    out.push(b'}');
}

#[inline]
fn key(out: &mut Vec<u8>, key: &str) {
    out.extend_from_slice(key.as_bytes());
}

/// A string field; empty ones are omitted.
#[inline]
fn text(out: &mut Vec<u8>, name: &str, value: &str) {
    if !value.is_empty() {
        key(out, name);
        write_string(out, value);
    }
}

/// A field that holds JSON already; absent ones (empty) are omitted.
#[inline]
fn raw(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    if !value.is_empty() {
        key(out, name);
        write_raw(out, value);
    }
}

/// A number field; zeros are omitted.
#[inline]
fn unsigned(out: &mut Vec<u8>, name: &str, value: u64) {
    if value != 0 {
        key(out, name);
        number(out, value);
    }
}

#[inline]
fn number(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// A boolean field, written whole when set.
#[inline]
fn flag(out: &mut Vec<u8>, field: &str, set: bool) {
    if set {
        key(out, field);
    }
}
