//! One line of JSON to a command.

use std::borrow::Cow;
use std::mem::discriminant;

use crate::codec::DecodeError;
use crate::json::Scanner;
use crate::limits::CONNECT_SUBS_MAX;
use crate::message::{Command, ConnectRequest, Request, SincePosition, SubscribeRequest};

type Result<T> = std::result::Result<T, DecodeError>;

/// Decodes one command. Unknown fields are validated and ignored, `null` is absence, and of equal
/// keys the last counts; two different requests in one command are an error.
pub(in crate::codec) fn command(line: &str) -> Result<Command<'_>> {
    let mut scanner = Scanner::new(line);
    let mut id = 0;
    let mut request: Option<Request<'_>> = None;
    scanner.object(|scanner, key| {
        if key == "id" {
            id = scanner.u32()?;
            return Ok(());
        }
        let Some(method) = method(key) else {
            return Ok(scanner.skip()?);
        };
        if scanner.null()? {
            return Ok(());
        }
        let next = method(scanner)?;
        match &request {
            Some(previous) if discriminant(previous) != discriminant(&next) => Err(DecodeError::Ambiguous),
            _ => {
                request = Some(next);
                Ok(())
            }
        }
    })?;
    scanner.end()?;
    let request = request.unwrap_or(if id == 0 { Request::Pong } else { Request::Empty });
    Ok(Command { id, request })
}

/// `type` of what goes to a map channel.
const KIND_MAP: i32 = 1;

type Method = for<'a> fn(&mut Scanner<'a>) -> Result<Request<'a>>;

/// How the body under this key of a command is decoded.
fn method(key: &str) -> Option<Method> {
    Some(match key {
        "publish" => publish,
        "subscribe" => |scanner| Ok(Request::Subscribe(Box::new(subscribe(scanner)?))),
        "connect" => |scanner| Ok(Request::Connect(Box::new(connect(scanner)?))),
        "unsubscribe" => |scanner| Ok(Request::Unsubscribe { channel: one_string(scanner, "channel")? }),
        "presence" => |scanner| Ok(Request::Presence { channel: one_string(scanner, "channel")? }),
        "presence_stats" => |scanner| Ok(Request::PresenceStats { channel: one_string(scanner, "channel")? }),
        "history" => history,
        "rpc" => rpc,
        "send" => send,
        "refresh" => |scanner| Ok(Request::Refresh { token: one_string(scanner, "token")? }),
        "sub_refresh" => sub_refresh,
        "ping" => ping,
        _ => return None,
    })
}

fn publish<'a>(scanner: &mut Scanner<'a>) -> Result<Request<'a>> {
    let mut channel = Cow::Borrowed("");
    let mut data = "";
    let (mut kind, mut removed) = (0, false);
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "channel" => channel = scanner.string()?,
            "data" => data = scanner.raw()?,
            "type" => kind = scanner.i32()?,
            "removed" => removed = scanner.boolean()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    let data = data.as_bytes();
    Ok(match kind {
        KIND_MAP => Request::MapPublish { channel, data, removed },
        _ => Request::Publish { channel, data },
    })
}

fn connect<'a>(scanner: &mut Scanner<'a>) -> Result<ConnectRequest<'a>> {
    let mut request = ConnectRequest::default();
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "token" => request.token = scanner.string()?,
            "data" => request.data = scanner.raw()?.as_bytes(),
            "name" => request.name = scanner.string()?,
            "version" => request.version = scanner.string()?,
            "flag" => request.flag = scanner.i64()?,
            "subs" => request.subs = connect_subs(scanner)?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(request)
}

/// `connect.subs`: each channel once, at most [`CONNECT_SUBS_MAX`].
fn connect_subs<'a>(scanner: &mut Scanner<'a>) -> Result<Vec<(Cow<'a, str>, SubscribeRequest<'a>)>> {
    let mut subs = Vec::new();
    if scanner.null()? {
        return Ok(subs);
    }
    scanner.map(|scanner, channel| -> Result<()> {
        let request = if scanner.null()? { SubscribeRequest::default() } else { subscribe(scanner)? };
        if subs.len() == CONNECT_SUBS_MAX {
            return Err(DecodeError::Limit);
        }
        subs.push((channel, request));
        Ok(())
    })?;
    keep_last_of_equal_channels(&mut subs);
    Ok(subs)
}

/// Of entries with one channel the last stays. Sorting makes that linear-logarithmic in the number
/// of entries, which is the client's choice; the order of entries means nothing.
fn keep_last_of_equal_channels<'a>(subs: &mut Vec<(Cow<'a, str>, SubscribeRequest<'a>)>) {
    subs.reverse();
    subs.sort_by(|(a, _), (b, _)| a.cmp(b));
    subs.dedup_by(|(later, _), (earlier, _)| later == earlier);
}

fn subscribe<'a>(scanner: &mut Scanner<'a>) -> Result<SubscribeRequest<'a>> {
    let mut request = SubscribeRequest::default();
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "channel" => request.channel = scanner.string()?,
            "token" => request.token = scanner.string()?,
            "data" => request.data = scanner.raw()?.as_bytes(),
            "positioned" => request.positioned = scanner.boolean()?,
            "recoverable" => request.recoverable = scanner.boolean()?,
            "join_leave" => request.join_leave = scanner.boolean()?,
            "flag" => request.flag = scanner.i64()?,
            "recover" => request.recover = scanner.boolean()?,
            "offset" => request.offset = scanner.u64()?,
            "epoch" => request.epoch = scanner.string()?,
            "delta" => request.delta = scanner.string()?,
            "tf" => {
                let filter = scanner.raw()?;
                request.tags_filter = (filter != "null").then_some(filter.as_bytes());
            }
            "type" => request.kind = scanner.i64()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(request)
}

fn history<'a>(scanner: &mut Scanner<'a>) -> Result<Request<'a>> {
    let mut channel = Cow::Borrowed("");
    let (mut limit, mut since, mut reverse) = (0, None, false);
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "channel" => channel = scanner.string()?,
            "limit" => limit = scanner.i32()?,
            "since" => since = if scanner.null()? { None } else { Some(position(scanner)?) },
            "reverse" => reverse = scanner.boolean()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(Request::History { channel, limit, since, reverse })
}

fn position<'a>(scanner: &mut Scanner<'a>) -> Result<SincePosition<'a>> {
    let mut position = SincePosition::default();
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "offset" => position.offset = scanner.u64()?,
            "epoch" => position.epoch = scanner.string()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(position)
}

fn rpc<'a>(scanner: &mut Scanner<'a>) -> Result<Request<'a>> {
    let mut method = Cow::Borrowed("");
    let mut data = "";
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "method" => method = scanner.string()?,
            "data" => data = scanner.raw()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(Request::Rpc { method, data: data.as_bytes() })
}

fn send<'a>(scanner: &mut Scanner<'a>) -> Result<Request<'a>> {
    let mut data = "";
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "data" => data = scanner.raw()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(Request::Send { data: data.as_bytes() })
}

fn sub_refresh<'a>(scanner: &mut Scanner<'a>) -> Result<Request<'a>> {
    let (mut channel, mut token) = (Cow::Borrowed(""), Cow::Borrowed(""));
    scanner.object(|scanner, key| -> Result<()> {
        match key {
            "channel" => channel = scanner.string()?,
            "token" => token = scanner.string()?,
            _ => scanner.skip()?,
        }
        Ok(())
    })?;
    Ok(Request::SubRefresh { channel, token })
}

fn ping<'a>(scanner: &mut Scanner<'a>) -> Result<Request<'a>> {
    scanner.object(|scanner, _| -> Result<()> { Ok(scanner.skip()?) })?;
    Ok(Request::Ping)
}

/// An object of which one string field counts.
fn one_string<'a>(scanner: &mut Scanner<'a>, field: &str) -> Result<Cow<'a, str>> {
    let mut value = Cow::Borrowed("");
    scanner.object(|scanner, key| -> Result<()> {
        if key == field {
            value = scanner.string()?;
        } else {
            scanner.skip()?;
        }
        Ok(())
    })?;
    Ok(value)
}
