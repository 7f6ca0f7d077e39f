//! The methods of the server API.
//!
//! Owns what each call means in terms of [`Call`]s: which shards are asked, how answers are added up,
//! and what is refused before a shard is asked. It knows no HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesOrdered;
use ringmain_proto::close::{CloseReason, ErrorCode};
use ringmain_proto::limits::CLOSE_REASON_BYTES_MAX;
use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};

use super::requests::{self, Json, Request};
use super::results::{self, ErrorObject, Outcome, Reply};
use crate::control::cluster::commands::CommandError;
use crate::control::cluster::driver::{self, Surveyed};
use crate::control::cluster::message::{AnswerPart, NodeInfo, Question};
use crate::control::cluster::{PlaceError, Placement};
use crate::control::router::{CallError, Router};
use crate::control::state::NodeState;
use crate::core::api::{Answer, Call, SubscribeOptions, UserSelector};
use crate::core::config::CoreConfig;

/// Commands of one batch, and channels of one broadcast, at the most (above: 106).
pub const ITEMS_MAX: usize = 10_000;

/// Commands of a parallel batch, and publications of a broadcast, under way at once. 64 fill the way to
/// the shards and back; more only fill their inboxes.
pub const PARALLEL_MAX: usize = 64;

/// The longest idempotency key, in bytes (above: 107).
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// Where calls are carried out.
pub(super) struct Methods {
    pub router: Arc<Router>,
    pub config: Arc<CoreConfig>,
    pub node: Arc<NodeState>,
}

/// Why a call gave no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MethodError {
    /// An error object.
    Code(ErrorCode),
    /// Too much is under way: 503, or error 111 inside a batch.
    Busy,
    /// The broker cannot be reached, and nothing was accepted: 503, or error 100 inside a batch.
    Unavailable,
}

impl From<ErrorCode> for MethodError {
    fn from(code: ErrorCode) -> Self {
        Self::Code(code)
    }
}

impl From<CallError> for MethodError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Busy => Self::Busy,
            CallError::Deadline => Self::Code(ErrorCode::Internal),
            CallError::Refused(ErrorCode::BusUnavailable) => Self::Unavailable,
            CallError::Refused(code) => Self::Code(code),
        }
    }
}

/// The connections of this node were served; a repetition harms nobody.
impl From<CommandError> for MethodError {
    fn from(error: CommandError) -> Self {
        match error {
            CommandError::Unavailable => Self::Unavailable,
            CommandError::Busy => Self::Busy,
            CommandError::Unknown => Self::Code(ErrorCode::OutcomeUnknown),
            CommandError::TooLarge => Self::Code(ErrorCode::LimitExceeded),
        }
    }
}

impl MethodError {
    /// The error object.
    pub(super) fn object(self) -> ErrorObject {
        let code = match self {
            Self::Code(code) => code,
            Self::Busy => ErrorCode::TooManyRequests,
            Self::Unavailable => ErrorCode::BusUnavailable,
        };
        ErrorObject { code: code.code(), message: code.message() }
    }
}

/// A result as JSON, or why there is none.
pub(super) type MethodResult = Result<Box<RawValue>, MethodError>;

fn encode(result: &impl Serialize) -> MethodResult {
    to_raw_value(result).map_err(|_| ErrorCode::Internal.into())
}

/// A shard answered something that belongs to another call: a bug.
fn unexpected(answer: &Answer) -> MethodError {
    tracing::error!(?answer, "a shard answered another call");
    ErrorCode::Internal.into()
}

impl Methods {
    /// Carries out one call.
    pub(super) async fn call(&self, request: Request<'_>) -> MethodResult {
        match request {
            Request::Publish(request) => self.publish(request).await,
            Request::Broadcast(request) => self.broadcast(request).await,
            Request::Subscribe(request) => self.subscribe(request).await,
            Request::Unsubscribe(request) => self.unsubscribe(request).await,
            Request::Disconnect(request) => self.disconnect(request).await,
            Request::Refresh(request) => self.refresh(request).await,
            Request::Presence(request) => self.presence(&request.channel).await,
            Request::PresenceStats(request) => self.presence_stats(&request.channel).await,
            Request::History(request) => self.history(request).await,
            Request::HistoryRemove(request) => self.history_remove(&request.channel).await,
            Request::Channels(request) => self.channels(&request.pattern).await,
            Request::Info => self.info().await,
            Request::Rpc(request) if request.method.is_empty() => Err(ErrorCode::BadRequest.into()),
            // Nothing can be called yet.
            Request::Rpc(_) => Err(ErrorCode::MethodNotFound.into()),
        }
    }

    /// Carries out a batch: in order, or [`PARALLEL_MAX`] at a time.
    pub(super) async fn batch(&self, batch: requests::Batch<'_>) -> Result<results::Replies, MethodError> {
        if batch.commands.len() > ITEMS_MAX {
            return Err(ErrorCode::LimitExceeded.into());
        }
        let at_once = if batch.parallel { PARALLEL_MAX } else { 1 };
        let mut replies = Vec::with_capacity(batch.commands.len());
        let mut under_way = FuturesOrdered::new();
        for command in batch.commands {
            if under_way.len() == at_once {
                replies.extend(under_way.next().await);
            }
            under_way.push_back(self.command(command));
        }
        while let Some(reply) = under_way.next().await {
            replies.push(reply);
        }
        Ok(results::Replies { replies })
    }

    async fn command(&self, command: requests::Command<'_>) -> BTreeMap<&'static str, Reply> {
        let error = |error: MethodError| ("error", Reply::Error(error.object()));
        let entry = match command.request() {
            None => error(ErrorCode::MethodNotFound.into()),
            Some(request) => {
                let method = request.method();
                match self.call(request).await {
                    Ok(result) => (method, Reply::Result(result)),
                    Err(failed) => error(failed),
                }
            }
        };
        BTreeMap::from([entry])
    }

    /// Refuses what is no channel (107) and what has no namespace (102).
    fn check_channel(&self, channel: &str) -> Result<(), MethodError> {
        if channel.is_empty() || channel.len() > self.config.client.channel_bytes_max as usize {
            return Err(ErrorCode::BadRequest.into());
        }
        self.config.namespace_of(channel).map(|_| ()).ok_or(ErrorCode::UnknownChannel.into())
    }

    async fn publish(&self, request: requests::Publish<'_>) -> MethodResult {
        self.check_channel(&request.channel)?;
        let publication = Publication::of(
            data(request.data, &request.b64data)?,
            request.tags,
            request.skip_history,
            &request.idempotency_key,
            request.version,
        )?;
        self.publish_to(&request.channel, &publication).await
    }

    async fn publish_to(&self, channel: &str, publication: &Publication) -> MethodResult {
        let answer = self.router.home(channel, publication.call(channel)).await?;
        // What has no place in history does not go over the bus as others do.
        if publication.skip_history
            && let Some(cluster) = self.router.cluster()
        {
            cluster.command(publication.call(channel)).await?;
        }
        match answer {
            Answer::Published { offset, epoch } => encode(&results::Published { offset, epoch }),
            other => Err(unexpected(&other)),
        }
    }

    async fn broadcast(&self, request: requests::Broadcast<'_>) -> MethodResult {
        if request.channels.is_empty() {
            return Err(ErrorCode::BadRequest.into());
        }
        if request.channels.len() > ITEMS_MAX {
            return Err(ErrorCode::LimitExceeded.into());
        }
        let publication = Publication::of(
            data(request.data, &request.b64data)?,
            request.tags,
            request.skip_history,
            &request.idempotency_key,
            request.version,
        )?;
        let mut responses = Vec::with_capacity(request.channels.len());
        let mut under_way = FuturesOrdered::new();
        for channel in &request.channels {
            if under_way.len() == PARALLEL_MAX {
                responses.extend(under_way.next().await);
            }
            under_way.push_back(self.publish_one_of_many(channel, &publication));
        }
        while let Some(response) = under_way.next().await {
            responses.push(response);
        }
        encode(&results::Broadcasted { responses })
    }

    async fn publish_one_of_many(&self, channel: &str, publication: &Publication) -> Outcome {
        let result = match self.check_channel(channel) {
            Ok(()) => self.publish_to(channel, publication).await,
            Err(error) => Err(error),
        };
        result.map_or_else(|error| Outcome::Error(error.object()), Outcome::Result)
    }

    async fn subscribe(&self, request: requests::Subscribe<'_>) -> MethodResult {
        self.check_channel(&request.channel)?;
        let overrides = request.overrides.unwrap_or_default();
        let value = |value: Option<requests::BoolValue>| value.map(|value| value.value);
        let options = SubscribeOptions {
            info: optional_data(request.info, &request.b64info)?,
            data: optional_data(request.data, &request.b64data)?,
            expire_at: seconds(request.expire_at)?,
            presence: value(overrides.presence),
            join_leave: value(overrides.join_leave),
            push_join_leave: value(overrides.force_push_join_leave),
            position: value(overrides.force_positioning),
            recover: value(overrides.force_recovery),
            recover_since: request.recover_since.map(|since| (since.offset, since.epoch)),
        };
        let selector = selector(&request.user, &request.client, Vec::new(), &request.session)?;
        self.done(Call::Subscribe { selector, channel: (&*request.channel).into(), options }).await
    }

    async fn unsubscribe(&self, request: requests::Unsubscribe<'_>) -> MethodResult {
        if !request.channel.is_empty() {
            self.check_channel(&request.channel)?;
        }
        let selector = selector(&request.user, &request.client, Vec::new(), &request.session)?;
        self.done(Call::Unsubscribe { selector, channel: (&*request.channel).into() }).await
    }

    async fn disconnect(&self, request: requests::Disconnect<'_>) -> MethodResult {
        let default = CloseReason::ForceDisconnect;
        let (code, reason) = match &request.disconnect {
            Some(with) => (close_code(with.code)?, &*with.reason),
            None => (default.code(), default.text()),
        };
        if reason.len() > CLOSE_REASON_BYTES_MAX {
            return Err(ErrorCode::BadRequest.into());
        }
        let whitelist = request.whitelist.unwrap_or_default();
        let selector = selector(&request.user, &request.client, whitelist, &request.session)?;
        self.done(Call::Disconnect { selector, code, reason: reason.into() }).await
    }

    async fn refresh(&self, request: requests::Refresh<'_>) -> MethodResult {
        // A new `info` would change what others see of the connection: not built.
        if request.info.is_some() {
            return Err(ErrorCode::NotAvailable.into());
        }
        let expire_at = seconds(request.expire_at)?;
        let selector = selector(&request.user, &request.client, Vec::new(), &request.session)?;
        self.done(Call::Refresh { selector, expired: request.expired, expire_at }).await
    }

    /// Asks every shard, here and then on every other node, for something that has no result.
    async fn done(&self, call: Call) -> MethodResult {
        self.router.each(call.clone()).await?;
        if let Some(cluster) = self.router.cluster() {
            cluster.command(call).await?;
        }
        encode(&results::Empty {})
    }

    async fn presence(&self, channel: &str) -> MethodResult {
        self.check_channel(channel)?;
        match self.router.home(channel, Call::Presence { channel: channel.into() }).await? {
            Answer::Presence { members, partial } => {
                let members = members.iter();
                let presence: Option<_> = members
                    .map(|member| Some((member.client.to_string(), results::member(member)?)))
                    .collect();
                encode(&results::Presence { presence: presence.ok_or(ErrorCode::Internal)?, partial })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn presence_stats(&self, channel: &str) -> MethodResult {
        self.check_channel(channel)?;
        match self.router.home(channel, Call::PresenceStats { channel: channel.into() }).await? {
            Answer::PresenceStats { num_clients, num_users, partial } => {
                encode(&results::PresenceStats { num_clients, num_users, partial })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn history(&self, request: requests::History<'_>) -> MethodResult {
        let channel = &*request.channel;
        self.check_channel(channel)?;
        let call = Call::History {
            channel: channel.into(),
            limit: request.limit,
            since: request.since.map(|since| (since.offset, since.epoch)),
            reverse: request.reverse,
        };
        match self.router.home(channel, call).await? {
            Answer::History { records, offset, epoch } => {
                let publications = results::publications(&records).ok_or(ErrorCode::Internal)?;
                encode(&results::History { publications, epoch: &epoch, offset })
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn history_remove(&self, channel: &str) -> MethodResult {
        self.check_channel(channel)?;
        self.router.home(channel, Call::HistoryRemove { channel: channel.into() }).await?;
        encode(&results::Empty {})
    }

    async fn channels(&self, pattern: &str) -> MethodResult {
        let question = Question::Channels { pattern: pattern.to_owned() };
        let (own, others) = tokio::join!(driver::channels(&self.router, pattern), self.survey(question));
        let mut channels = BTreeMap::<String, results::ChannelFigures>::new();
        let others = others.parts.into_iter().filter_map(|part| match part {
            AnswerPart::Channels(channels) => Some(channels),
            AnswerPart::Info(_) | AnswerPart::Nothing => None,
        });
        for (channel, clients) in own?.into_iter().chain(others.flatten()) {
            channels.entry(channel).or_default().num_clients += clients;
        }
        encode(&results::Channels { channels })
    }

    async fn info(&self) -> MethodResult {
        let (own, others) =
            tokio::join!(driver::node_info(&self.router, &self.node), self.survey(Question::Info));
        let others = others.parts.into_iter().filter_map(|part| match part {
            AnswerPart::Info(info) => Some(info),
            AnswerPart::Channels(_) | AnswerPart::Nothing => None,
        });
        let nodes: Vec<NodeInfo> = std::iter::once(own?).chain(others).collect();
        encode(&results::Info { nodes: nodes.iter().map(results::Node::of).collect() })
    }

    /// Asks the other nodes, if there are any.
    async fn survey(&self, question: Question) -> Surveyed {
        match self.router.cluster() {
            Some(cluster) => cluster.survey(question).await,
            None => Surveyed::default(),
        }
    }

    /// Where a user belongs. `None`: this node has no others beside it.
    pub(super) async fn place(&self, user: String) -> Option<Result<Placement, PlaceError>> {
        Some(self.router.cluster()?.place(user).await)
    }
}

/// What is published, to one channel or to many.
struct Publication {
    data: Arc<[u8]>,
    tags: Vec<(String, String)>,
    skip_history: bool,
    idempotency_key: Option<String>,
}

impl Publication {
    fn of(
        data: Vec<u8>,
        tags: Option<BTreeMap<String, String>>,
        skip_history: bool,
        idempotency_key: &str,
        version: u64,
    ) -> Result<Self, MethodError> {
        // A version would have the node drop publications of an older one: not built.
        if version > 0 {
            return Err(ErrorCode::NotAvailable.into());
        }
        if idempotency_key.len() > IDEMPOTENCY_KEY_BYTES_MAX {
            return Err(ErrorCode::BadRequest.into());
        }
        let idempotency_key = Some(idempotency_key).filter(|key| !key.is_empty()).map(str::to_owned);
        let tags = tags.unwrap_or_default().into_iter().collect();
        Ok(Self { data: data.into(), tags, skip_history, idempotency_key })
    }

    fn call(&self, channel: &str) -> Call {
        Call::Publish {
            channel: channel.into(),
            data: self.data.clone(),
            tags: self.tags.clone(),
            skip_history: self.skip_history,
            idempotency_key: self.idempotency_key.clone(),
        }
    }
}

/// The payload of a publication; without any: 107.
fn data(data: Json<'_>, b64data: &str) -> Result<Vec<u8>, MethodError> {
    optional_data(data, b64data)?.ok_or(ErrorCode::BadRequest.into())
}

/// A JSON value, as it is or as Base64, byte for byte but for one thing: line breaks between its tokens
/// become spaces, because the client protocol ends a message at a line break. Base64 of anything but
/// JSON is 107: there is no protocol here yet that could carry it.
fn optional_data(data: Json<'_>, b64data: &str) -> Result<Option<Vec<u8>>, MethodError> {
    let mut json = if b64data.is_empty() {
        let Some(data) = data else { return Ok(None) };
        data.get().as_bytes().to_vec()
    } else {
        let decoded = BASE64_STANDARD.decode(b64data).map_err(|_| ErrorCode::BadRequest)?;
        results::raw(&decoded).ok_or(ErrorCode::BadRequest)?;
        decoded
    };
    for byte in &mut json {
        if matches!(byte, b'\n' | b'\r') {
            *byte = b' ';
        }
    }
    Ok(Some(json))
}

/// Seconds since 1970; zero and absent are the same, as in Centrifugo.
fn seconds(expire_at: i64) -> Result<Option<u64>, MethodError> {
    let seconds = u64::try_from(expire_at).map_err(|_| ErrorCode::BadRequest)?;
    Ok(Some(seconds).filter(|seconds| *seconds > 0))
}

/// A code that an application may close a WebSocket with (RFC 6455 section 7.4.2), as Centrifugo limits
/// them further: 3000 to 4999.
fn close_code(code: u32) -> Result<u16, MethodError> {
    u16::try_from(code).ok().filter(|code| (3_000..5_000).contains(code)).ok_or(ErrorCode::BadRequest.into())
}

/// The connections that a call is about. Sessions of emulated transports do not exist here, so that
/// naming one selects nothing that there is: 107.
fn selector(
    user: &str,
    client: &str,
    whitelist: Vec<String>,
    session: &str,
) -> Result<UserSelector, MethodError> {
    if !session.is_empty() {
        return Err(ErrorCode::BadRequest.into());
    }
    let client = Some(client).filter(|client| !client.is_empty()).map(str::to_owned);
    Ok(UserSelector { user: user.into(), client, whitelist })
}
