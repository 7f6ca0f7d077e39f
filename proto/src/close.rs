//! Why a connection, a command or a subscription ends, and how that is said on the wire.
//!
//! Owns the one mapping from a failure to its wire code, text, reconnect advice and metric label.
//! Codes and texts are those of Centrifugo, so that the official SDKs act on them. Must not know how
//! a close travels (close frame, disconnect push) nor who decided on it.

/// Whether a client comes back after a close code, by the rule of the official SDKs: 3500–3999 and
/// 4500–4999 are terminal, and so is 1009; everything else reconnects.
pub const fn reconnects_after(code: u16) -> bool {
    !matches!(code, 1009 | 3500..=3999 | 4500..=4999)
}

/// Declares an enum whose variants carry (code, text, label) in one table.
macro_rules! close_reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal, $label:literal;)*) => {
        /// Why the server closes a connection.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum CloseReason {
            $($(#[$doc])* $name,)*
        }

        impl CloseReason {
            /// Every reason, in the order of their codes: the index of a reason is its discriminant.
            pub const ALL: &'static [CloseReason] = &[$(CloseReason::$name,)*];

            /// WebSocket close code.
            pub const fn code(self) -> u16 {
                match self { $(Self::$name => $code,)* }
            }

            /// Reason text of the close frame, at most 123 bytes.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Value of the `reason` label in metrics; unique for each variant.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }
        }
    };
}

close_reasons! {
    /// Clean end: the answer to a client's close frame.
    Normal = 1000, "", "normal";
    /// The peer broke a rule of RFC 6455 (framing, masking, opcodes, close codes).
    WsProtocol = 1002, "protocol error", "ws_protocol";
    /// A frame type that the negotiated protocol does not use: binary on a JSON connection.
    UnsupportedData = 1003, "unsupported data", "unsupported_data";
    /// Text that is not UTF-8.
    InvalidUtf8 = 1007, "invalid utf-8", "invalid_utf8";
    /// A slow sender made room for others: its partial frame held a pool's memory longest.
    SlowFrame = 1008, "slow frame", "slow_frame";
    /// A message larger than the limit.
    MessageTooBig = 1009, "message too big", "message_too_big";
    /// Closed by the server without any further advice.
    ConnectionClosed = 3000, "connection closed", "connection_closed";
    /// The node drains.
    Shutdown = 3001, "shutdown", "shutdown";
    /// The server failed.
    ServerError = 3004, "internal server error", "server_error";
    /// The connection token expired and was not refreshed.
    Expired = 3005, "connection expired", "expired";
    /// A subscription expired where the protocol cannot end it alone.
    SubscriptionExpired = 3006, "subscription expired", "subscription_expired";
    /// The client does not read what it is sent.
    Slow = 3008, "slow", "slow";
    /// The socket failed while writing.
    WriteError = 3009, "write error", "write_error";
    /// The client's position in a stream cannot be kept.
    InsufficientState = 3010, "insufficient state", "insufficient_state";
    /// The server asked for a new connection.
    ForceReconnect = 3011, "force reconnect", "force_reconnect";
    /// No answer to a ping.
    NoPong = 3012, "no pong", "no_pong";
    /// Too many commands in a time.
    TooManyRequests = 3013, "too many requests", "too_many_requests";
    /// The connection token is not valid, or a subscription token is for something else.
    InvalidToken = 3500, "invalid token", "invalid_token";
    /// A malformed command or one out of order.
    BadRequest = 3501, "bad request", "bad_request";
    /// Not authenticated in time.
    Stale = 3502, "stale", "stale";
    /// The server asked the client to go and stay away.
    ForceDisconnect = 3503, "force disconnect", "force_disconnect";
    /// Too many connections.
    ConnectionLimit = 3504, "connection limit", "connection_limit";
    /// Too many channels on one connection.
    ChannelLimit = 3505, "channel limit", "channel_limit";
    /// Data that this client's protocol cannot carry.
    InappropriateProtocol = 3506, "inappropriate protocol", "inappropriate_protocol";
    /// Not allowed to connect.
    PermissionDenied = 3507, "permission denied", "permission_denied";
    /// What was asked for is not there (as `send` without a taker).
    NotAvailable = 3508, "not available", "not_available";
    /// Too many errors on one connection.
    TooManyErrors = 3509, "too many errors", "too_many_errors";
}

impl CloseReason {
    /// Whether an official SDK reconnects by itself after this close.
    pub const fn reconnect(self) -> bool {
        reconnects_after(self.code())
    }
}

/// Declares an enum whose variants carry (code, message, temporary) in one table.
macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $message:literal, $temporary:literal;)*) => {
        /// Why one command failed; the connection goes on.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorCode {
            $($(#[$doc])* $name,)*
        }

        impl ErrorCode {
            /// Every error, in the order of their codes.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$name,)*];

            /// Code in the error reply.
            pub const fn code(self) -> u32 {
                match self { $(Self::$name => $code,)* }
            }

            /// Message in the error reply.
            pub const fn message(self) -> &'static str {
                match self { $(Self::$name => $message,)* }
            }

            /// Whether the client should try the same again.
            pub const fn temporary(self) -> bool {
                match self { $(Self::$name => $temporary,)* }
            }
        }
    };
}

error_codes! {
    /// The server's fault.
    Internal = 100, "internal server error", true;
    /// The broker cannot be reached, and nothing was accepted.
    BusUnavailable = 100, "bus unavailable", true;
    /// Nobody knows whether the broker accepted the publication: to try again may publish it twice.
    OutcomeUnknown = 100, "outcome unknown", false;
    /// No or no sufficient credentials.
    Unauthorized = 101, "unauthorized", false;
    /// The channel's namespace does not exist.
    UnknownChannel = 102, "unknown channel", false;
    /// Not allowed.
    PermissionDenied = 103, "permission denied", false;
    /// The API method does not exist.
    MethodNotFound = 104, "method not found", false;
    /// A second subscribe to one channel.
    AlreadySubscribed = 105, "already subscribed", false;
    /// A limit of the server (channels, name length, page size).
    LimitExceeded = 106, "limit exceeded", false;
    /// A well-formed command with values that make no sense.
    BadRequest = 107, "bad request", false;
    /// Switched off for this channel or this server.
    NotAvailable = 108, "not available", false;
    /// The token expired: fetch a new one and try again.
    TokenExpired = 109, "token expired", false;
    /// The connection expired, no token involved.
    Expired = 110, "expired", false;
    /// Rate limited.
    TooManyRequests = 111, "too many requests", true;
    /// The stream does not hold what was asked for.
    UnrecoverablePosition = 112, "unrecoverable position", false;
}

impl ErrorCode {
    /// The error reply.
    pub const fn reply(self) -> crate::message::Reply<'static> {
        crate::message::Reply::Error {
            code: self.code(),
            message: self.message(),
            temporary: self.temporary(),
        }
    }
}

/// Why a subscription ended while its connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnsubscribeReason {
    /// The client asked for it (never sent).
    Client,
    /// The connection went away (never sent).
    Disconnect,
    /// The server asked for it.
    Server,
    /// The position is lost; the client subscribes again and may recover.
    InsufficientState,
    /// The subscription expired; the client subscribes again with a new token.
    Expired,
    /// What the client holds of the channel is no longer true; it starts afresh.
    StateInvalidated,
}

impl UnsubscribeReason {
    /// Code of the unsubscribe push; from 2500 on the client subscribes again.
    pub const fn code(self) -> u32 {
        match self {
            Self::Client => 0,
            Self::Disconnect => 1,
            Self::Server => 2000,
            Self::InsufficientState => 2500,
            Self::Expired => 2501,
            Self::StateInvalidated => 2502,
        }
    }

    /// Text of the unsubscribe push.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Client => "client unsubscribed",
            Self::Disconnect => "client disconnected",
            Self::Server => "server unsubscribe",
            Self::InsufficientState => "insufficient state",
            Self::Expired => "subscription expired",
            Self::StateInvalidated => "state invalidated",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::CLOSE_REASON_BYTES_MAX;

    #[test]
    fn reasons_are_sendable_and_distinguishable() {
        let mut labels = std::collections::HashSet::new();
        for (index, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index, "{reason:?} must be its own index");
            assert!(reason.text().len() <= CLOSE_REASON_BYTES_MAX, "{reason:?}");
            assert!(labels.insert(reason.label()), "label of {reason:?} is used twice");
        }
        assert!(CloseReason::ALL.is_sorted_by_key(|reason| reason.code()));
    }

    #[test]
    fn reconnect_advice_follows_the_code_ranges() {
        for (code, expected) in [
            (1000, true),
            (1009, false),
            (3000, true),
            (3499, true),
            (3500, false),
            (3999, false),
            (4000, true),
            (4499, true),
            (4500, false),
            (4999, false),
        ] {
            assert_eq!(reconnects_after(code), expected, "{code}");
        }
    }

    #[test]
    fn error_codes_are_dense_from_100() {
        let mut codes: Vec<u32> = ErrorCode::ALL.iter().map(|error| error.code()).collect();
        codes.dedup();
        assert!(codes.into_iter().eq(100..=112));
        let temporary: Vec<u32> = ErrorCode::ALL.iter().filter(|e| e.temporary()).map(|e| e.code()).collect();
        assert_eq!(temporary, [100, 100, 111]);
    }
}
