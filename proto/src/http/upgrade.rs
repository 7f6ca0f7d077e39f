//! The opening handshake (RFC 6455 section 4.2).

use tungstenite::handshake::derive_accept_key;

use super::{AllowedOrigins, Request, Response};
use crate::codec::Codec;

/// A request that may be upgraded. permessage-deflate is not negotiated: offers of it are left
/// unanswered, which declines them (RFC 7692 section 5.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upgrade {
    /// Value of Sec-WebSocket-Accept.
    pub accept_key: String,
    /// Wire format of the connection.
    pub codec: Codec,
    /// Subprotocol to confirm; `None` when the client offered none that is known.
    pub subprotocol: Option<&'static str>,
    /// The client asked for WebSocket pings instead of those of the protocol
    /// (`?cf_ws_frame_ping_pong=true`).
    pub frame_ping_pong: bool,
}

/// Why a request is not upgraded; always the client's fault or the configuration's. Answer with
/// [`UpgradeError::write_response`] and close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UpgradeError {
    /// Not GET.
    #[error("the method must be GET")]
    Method,
    /// HTTP/1.0.
    #[error("the handshake needs HTTP/1.1")]
    HttpVersion,
    /// An ordinary request: no `Upgrade: websocket` with `Connection: Upgrade`.
    #[error("not a WebSocket handshake")]
    NotWebSocket,
    /// A version of the WebSocket protocol other than 13.
    #[error("unsupported WebSocket version")]
    WebSocketVersion,
    /// Sec-WebSocket-Key is missing, repeated, or not 16 bytes in base64.
    #[error("bad Sec-WebSocket-Key")]
    Key,
    /// A page of this origin may not connect.
    #[error("origin not allowed")]
    Origin,
    /// The client insists on a wire format that this server does not speak.
    #[error("unsupported wire format")]
    Format,
}

impl UpgradeError {
    /// Status code of the answer.
    pub const fn status(self) -> u16 {
        match self {
            Self::Method => 405,
            Self::HttpVersion => 505,
            Self::NotWebSocket | Self::WebSocketVersion => 426,
            Self::Key | Self::Format => 400,
            Self::Origin => 403,
        }
    }

    /// Value of the `reason` label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Method => "method",
            Self::HttpVersion => "http_version",
            Self::NotWebSocket => "not_websocket",
            Self::WebSocketVersion => "websocket_version",
            Self::Key => "websocket_key",
            Self::Origin => "origin",
            Self::Format => "format",
        }
    }

    /// Appends the response that tells the client.
    pub fn write_response(self, out: &mut Vec<u8>) {
        const TEXT: (&str, &str) = ("Content-Type", "text/plain; charset=utf-8");
        let headers: &[(&str, &str)] = match self {
            Self::Method => &[TEXT, ("Allow", "GET")],
            Self::NotWebSocket => &[TEXT, ("Upgrade", "websocket")],
            // RFC 6455 section 4.4: the versions that are spoken.
            Self::WebSocketVersion => &[TEXT, ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")],
            Self::HttpVersion | Self::Key | Self::Origin | Self::Format => &[TEXT],
        };
        let body = format!("{self}\n");
        Response { headers, body: body.as_bytes(), ..Response::closing(self.status()) }.write(out);
    }
}

/// Checks a request for the WebSocket endpoint.
pub fn check_upgrade(request: &Request<'_>, origins: &AllowedOrigins) -> Result<Upgrade, UpgradeError> {
    if request.method() != "GET" {
        return Err(UpgradeError::Method);
    }
    if !request.lists_token("upgrade", "websocket") || !request.lists_token("connection", "upgrade") {
        return Err(UpgradeError::NotWebSocket);
    }
    if request.is_http_1_0() {
        return Err(UpgradeError::HttpVersion);
    }
    if request.header("sec-websocket-version") != Some("13") {
        return Err(UpgradeError::WebSocketVersion);
    }
    let key = request.header("sec-websocket-key").filter(|key| is_key(key)).ok_or(UpgradeError::Key)?;
    if !origin_allowed(request, origins) {
        return Err(UpgradeError::Origin);
    }
    let (codec, subprotocol) = choose_format(request)?;
    Ok(Upgrade {
        accept_key: derive_accept_key(key.as_bytes()),
        codec,
        subprotocol,
        frame_ping_pong: request.query("cf_ws_frame_ping_pong") == Some("true"),
    })
}

impl Upgrade {
    /// Appends the response that completes the handshake; frames follow it.
    pub fn write_response(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ",
        );
        out.extend_from_slice(self.accept_key.as_bytes());
        if let Some(subprotocol) = self.subprotocol {
            out.extend_from_slice(b"\r\nSec-WebSocket-Protocol: ");
            out.extend_from_slice(subprotocol.as_bytes());
        }
        out.extend_from_slice(b"\r\n\r\n");
    }
}

/// Whether `key` is 16 bytes in base64: 22 digits and two fillers.
fn is_key(key: &str) -> bool {
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    match key.as_bytes().split_last_chunk::<2>() {
        Some((digits, filler)) => filler == b"==" && digits.len() == 22 && digits.iter().all(is_digit),
        None => false,
    }
}

/// A repeated Origin field is nobody's origin.
fn origin_allowed(request: &Request<'_>, origins: &AllowedOrigins) -> bool {
    let mut values = request.headers("origin");
    let origin = values.next();
    values.next().is_none() && origins.allows(origin, request.header("host"))
}

/// The wire format: by the subprotocols offered, in the client's order, or by `?format=`. JSON without
/// either. A client that offers only `centrifuge-protobuf`, which is not spoken here yet, is refused
/// rather than misread.
fn choose_format(request: &Request<'_>) -> Result<(Codec, Option<&'static str>), UpgradeError> {
    let mut offers =
        request.headers("sec-websocket-protocol").flat_map(|value| value.split(',')).map(str::trim);
    if let Some(name) = Codec::Json.subprotocol()
        && offers.any(|offer| offer == name)
    {
        return Ok((Codec::Json, Some(name)));
    }
    let wants_protobuf = request.lists_token("sec-websocket-protocol", "centrifuge-protobuf");
    match request.query("format") {
        None | Some("json") if !wants_protobuf => Ok((Codec::Json, None)),
        _ => Err(UpgradeError::Format),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Head, parse_head};

    const VALID: &str = "GET /connection/websocket HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\n\
        Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

    fn check(head: &str) -> Result<Upgrade, UpgradeError> {
        let Ok(Head::Done { request, .. }) = parse_head(head.as_bytes()) else { panic!("{head}") };
        check_upgrade(&request, &AllowedOrigins::new(["https://*.example.com"]))
    }

    fn with(field: &str) -> Result<Upgrade, UpgradeError> {
        check(&VALID.replace("\r\n\r\n", &format!("\r\n{field}\r\n\r\n")))
    }

    fn replaced(from: &str, to: &str) -> Result<Upgrade, UpgradeError> {
        assert!(VALID.contains(from), "{from}");
        check(&VALID.replace(from, to))
    }

    #[test]
    fn the_example_of_the_rfc() {
        let upgrade = check(VALID).unwrap();
        assert_eq!(upgrade.accept_key, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let mut out = Vec::new();
        upgrade.write_response(&mut out);
        let expected = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
            Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }

    #[test]
    fn lists_and_cases() {
        assert!(replaced("Connection: Upgrade", "connection: keep-alive, UPGRADE").is_ok());
        assert!(replaced("Connection: Upgrade", "Connection: keep-alive\r\nConnection: upgrade").is_ok());
        assert!(replaced("Upgrade: websocket", "UPGRADE: h2c , WebSocket").is_ok());
    }

    #[test]
    fn refusals() {
        let version = "Sec-WebSocket-Version: 13";
        let key = "dGhlIHNhbXBsZSBub25jZQ==";
        for (from, to, error) in [
            ("GET", "POST", UpgradeError::Method),
            ("HTTP/1.1", "HTTP/1.0", UpgradeError::HttpVersion),
            ("Upgrade: websocket\r\n", "", UpgradeError::NotWebSocket),
            ("Connection: Upgrade", "Connection: close", UpgradeError::NotWebSocket),
            (version, "X: y", UpgradeError::WebSocketVersion),
            (version, "Sec-WebSocket-Version: 8", UpgradeError::WebSocketVersion),
            (version, "Sec-WebSocket-Version: 13, 8", UpgradeError::WebSocketVersion),
            (key, "", UpgradeError::Key),
            (key, "dGhlIHNhbXBsZSBub25jZQ", UpgradeError::Key),
            (key, "dGhlIHNhbXBsZSBub25jZQAA", UpgradeError::Key),
            (key, "dGhlIHNhbXBsZSBub25jZ===", UpgradeError::Key),
            (key, "dGhlIHNhbXBsZSBub25j!Q==", UpgradeError::Key),
            (key, "dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Key: x", UpgradeError::Key),
            ("websocket HTTP", "websocket?format=protobuf HTTP", UpgradeError::Format),
        ] {
            assert_eq!(replaced(from, to), Err(error), "{from} -> {to}");
        }
    }

    #[test]
    fn origins() {
        assert!(with("Origin: http://h").is_ok());
        assert!(with("Origin: https://app.example.com").is_ok());
        assert_eq!(with("Origin: https://evil.example"), Err(UpgradeError::Origin));
        assert_eq!(with("Origin: null"), Err(UpgradeError::Origin));
        assert_eq!(with("Origin: http://h\r\nOrigin: http://h"), Err(UpgradeError::Origin));
    }

    #[test]
    fn formats_and_parameters() {
        let offered = |offer: &str| with(&format!("Sec-WebSocket-Protocol: {offer}")).map(|u| u.subprotocol);
        assert_eq!(offered("centrifuge-json"), Ok(Some("centrifuge-json")));
        assert_eq!(offered("centrifuge-protobuf, centrifuge-json"), Ok(Some("centrifuge-json")));
        assert_eq!(offered("centrifuge-protobuf"), Err(UpgradeError::Format));
        assert_eq!(offered("soap"), Ok(None));
        let parameters = |query: &str| replaced("websocket HTTP", &format!("websocket?{query} HTTP"));
        assert!(!parameters("format=json").unwrap().frame_ping_pong);
        assert!(parameters("a=b&cf_ws_frame_ping_pong=true").unwrap().frame_ping_pong);
        let deflate = with("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits").unwrap();
        assert_eq!(deflate, check(VALID).unwrap());
    }

    #[test]
    fn answers_tell_what_would_do() {
        let answer = |error: UpgradeError| {
            let mut out = Vec::new();
            error.write_response(&mut out);
            String::from_utf8(out).unwrap()
        };
        let version = answer(UpgradeError::WebSocketVersion);
        assert!(version.starts_with("HTTP/1.1 426 Upgrade Required\r\n"), "{version}");
        assert!(version.contains("\r\nSec-WebSocket-Version: 13\r\n"), "{version}");
        assert!(answer(UpgradeError::Method).contains("\r\nAllow: GET\r\n"));
        let origin = answer(UpgradeError::Origin);
        assert!(origin.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{origin}");
        assert!(origin.ends_with("\r\nConnection: close\r\n\r\norigin not allowed\n"), "{origin}");
    }
}
