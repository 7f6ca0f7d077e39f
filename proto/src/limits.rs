//! Named maxima of the wire formats, each with its unit and its reason.
//!
//! Owns the numbers that a parser needs to stay bounded. What a deployment may configure is a default
//! here and an argument where it is used.

/// Default largest WebSocket message from a client, in bytes of payload (exact: this many are
/// accepted, one more closes with 1009). The limit of the official servers.
pub const MESSAGE_BYTES_MAX: usize = 65_536;

/// Largest channel name, in bytes. Centrifugo's default.
pub const CHANNEL_BYTES_MAX: usize = 255;

/// Largest payload of a WebSocket control frame, in bytes (RFC 6455 section 5.5).
pub const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;

/// Largest reason in a close frame, in bytes: a control payload less the two bytes of the code.
pub const CLOSE_REASON_BYTES_MAX: usize = CONTROL_PAYLOAD_BYTES_MAX - 2;

/// Largest HTTP request head, in bytes, request line and final empty line included.
pub const HTTP_HEAD_BYTES_MAX: usize = 8 * 1024;

/// Most header fields of an HTTP request.
pub const HTTP_HEADERS_MAX: usize = 64;

/// Largest PROXY header that is read, in bytes: v2 may carry TLVs (certificates names and the like).
pub const PROXY_HEADER_BYTES_MAX: usize = 2 * 1024;

/// Deepest nesting of arrays and objects in a JSON command, the command itself counted.
pub const JSON_DEPTH_MAX: u32 = 128;

/// Most server-side subscriptions that one connect command may name.
pub const CONNECT_SUBS_MAX: usize = 512;

/// Largest `info` of a connection or of a subscription, in bytes of JSON. Presence holds both for every
/// member, and every publication, join and leave of theirs carries them: hence less than a message may be,
/// which is all that bounds them in Centrifugo. A token with more is not valid.
pub const INFO_BYTES_MAX: usize = 4 * 1024;

/// Largest packed list of tags of one publication, in bytes.
pub const TAGS_BYTES_MAX: usize = 16 * 1024;

const _: () = assert!(CLOSE_REASON_BYTES_MAX == 123);
const _: () = assert!(TAGS_BYTES_MAX <= u16::MAX as usize, "lengths within a record are 16 bits");
const _: () = assert!(HTTP_HEAD_BYTES_MAX <= u16::MAX as usize);
