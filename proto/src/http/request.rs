//! Request heads.

use crate::limits::{HTTP_HEAD_BYTES_MAX, HTTP_HEADERS_MAX};

/// Where a request stands.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "lives on the stack for the length of one handshake")]
pub enum Head<'b> {
    /// More bytes are needed.
    Incomplete,
    /// The head is complete.
    Done {
        /// Its length in bytes; what follows is the body or, after an upgrade, frames.
        consumed: usize,
        /// The request.
        request: Request<'b>,
    },
}

/// Why a head was refused; always the peer's fault. Answer with [`HttpError::status`] and close.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpError {
    /// Not HTTP/1.x.
    #[error("malformed HTTP request")]
    Malformed,
    /// Larger than [`HTTP_HEAD_BYTES_MAX`], or more fields than [`HTTP_HEADERS_MAX`].
    #[error("HTTP request head too large")]
    TooLarge,
}

impl HttpError {
    /// Status code of the answer.
    pub const fn status(self) -> u16 {
        match self {
            Self::Malformed => 400,
            Self::TooLarge => 431,
        }
    }
}

/// A request head. Borrows from the received bytes.
#[derive(Clone, Debug)]
pub struct Request<'b> {
    method: &'b str,
    target: &'b str,
    minor_version: u8,
    headers: [httparse::Header<'b>; HTTP_HEADERS_MAX],
    header_count: usize,
}

/// Parses the head at the start of `bytes`: all that was received so far. Bytes that cannot begin an
/// HTTP request are refused at once; the rest is looked at when the head's end is there, so that a
/// head that trickles in is not parsed again for every byte.
pub fn parse_head(bytes: &[u8]) -> Result<Head<'_>, HttpError> {
    if !begins_like_a_request(bytes) {
        return Err(HttpError::Malformed);
    }
    let window = &bytes[..bytes.len().min(HTTP_HEAD_BYTES_MAX)];
    if !holds_empty_line(window) {
        return if bytes.len() > HTTP_HEAD_BYTES_MAX {
            Err(HttpError::TooLarge)
        } else {
            Ok(Head::Incomplete)
        };
    }
    let mut headers = [httparse::EMPTY_HEADER; HTTP_HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let consumed = match parsed.parse(window) {
        Ok(httparse::Status::Complete(consumed)) => consumed,
        Ok(httparse::Status::Partial) if bytes.len() > HTTP_HEAD_BYTES_MAX => {
            return Err(HttpError::TooLarge);
        }
        Ok(httparse::Status::Partial) => return Ok(Head::Incomplete),
        Err(httparse::Error::TooManyHeaders) => return Err(HttpError::TooLarge),
        Err(_) => return Err(HttpError::Malformed),
    };
    let (Some(method), Some(target), Some(minor_version)) = (parsed.method, parsed.path, parsed.version)
    else {
        return Err(HttpError::Malformed);
    };
    let header_count = parsed.headers.len();
    Ok(Head::Done { consumed, request: Request { method, target, minor_version, headers, header_count } })
}

/// Whether the first bytes are a method: letters, then a space (empty lines before it are allowed,
/// RFC 9112 section 2.2).
fn begins_like_a_request(bytes: &[u8]) -> bool {
    const METHOD_BYTES_MAX: usize = 16;
    let start = bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
    let method =
        bytes[start..].iter().take(METHOD_BYTES_MAX).take_while(|byte| byte.is_ascii_uppercase()).count();
    match bytes.get(start + method) {
        Some(b' ') => method > 0,
        Some(_) => false,
        None => true,
    }
}

/// Whether a line is followed by an empty one. Bare line feeds end lines too, as in httparse.
fn holds_empty_line(bytes: &[u8]) -> bool {
    memchr::memchr_iter(b'\n', bytes).any(|at| {
        let rest = &bytes[at + 1..];
        rest.starts_with(b"\r\n") || rest.starts_with(b"\n")
    })
}

impl<'b> Request<'b> {
    /// The method, in upper case as sent.
    pub fn method(&self) -> &'b str {
        self.method
    }

    /// Path of the target, without the query; undecoded.
    pub fn path(&self) -> &'b str {
        self.target.split_once('?').map_or(self.target, |(path, _)| path)
    }

    /// The value of a query parameter, undecoded; empty for one without `=`.
    pub fn query(&self, name: &str) -> Option<&'b str> {
        let (_, query) = self.target.split_once('?')?;
        query.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then_some(value)
        })
    }

    /// Whether it is HTTP/1.0 (no `Host`, no keep-alive by default).
    pub fn is_http_1_0(&self) -> bool {
        self.minor_version == 0
    }

    /// The values of all fields of this name (any case), in order; those that are not visible ASCII
    /// or UTF-8 are left out.
    pub fn headers<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'b str> + 's {
        self.headers[..self.header_count]
            .iter()
            .filter(move |header| header.name.eq_ignore_ascii_case(name))
            .filter_map(|header| std::str::from_utf8(header.value).ok())
            .map(str::trim)
    }

    /// The value of the one field of this name; `None` if there is none, or more than one.
    pub fn header(&self, name: &str) -> Option<&'b str> {
        let mut values = self.headers(name);
        values.next().filter(|_| values.next().is_none())
    }

    /// Whether a comma-separated field lists `token` (any case).
    pub fn lists_token(&self, name: &str, token: &str) -> bool {
        self.headers(name).any(|value| value.split(',').any(|item| item.trim().eq_ignore_ascii_case(token)))
    }

    /// Whether the connection may serve another request after this one.
    pub fn keep_alive(&self) -> bool {
        if self.has_body() || self.lists_token("connection", "close") {
            return false;
        }
        !self.is_http_1_0() || self.lists_token("connection", "keep-alive")
    }

    /// Whether a body follows the head.
    pub fn has_body(&self) -> bool {
        self.headers("content-length").any(|value| value != "0")
            || self.headers("transfer-encoding").next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(bytes: &[u8]) -> Request<'_> {
        match parse_head(bytes) {
            Ok(Head::Done { request, .. }) => request,
            other => panic!("{other:?}"),
        }
    }

    fn refused(bytes: &[u8], error: HttpError) {
        match parse_head(bytes) {
            Err(refused) => assert_eq!(refused, error, "{bytes:?}"),
            other => panic!("{other:?} for {bytes:?}"),
        }
    }

    #[test]
    fn a_head_is_complete_at_its_empty_line() {
        let head = b"GET /connection/websocket?format=json&x HTTP/1.1\r\nHost: a\r\nX: 1\r\nx:2 \r\n\r\n";
        for cut in 0..head.len() {
            assert!(matches!(parse_head(&head[..cut]), Ok(Head::Incomplete)), "cut at {cut}");
        }
        let with_more = [head.as_slice(), b"more"].concat();
        let Ok(Head::Done { consumed, request }) = parse_head(&with_more) else { panic!("complete") };
        assert_eq!(consumed, head.len());
        assert_eq!((request.method(), request.path()), ("GET", "/connection/websocket"));
        assert_eq!(request.query("format"), Some("json"));
        assert_eq!((request.query("x"), request.query("y")), (Some(""), None));
        assert_eq!(request.headers("X").collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!((request.header("host"), request.header("x")), (Some("a"), None));
        assert!(request.keep_alive() && !request.has_body() && !request.is_http_1_0());
    }

    #[test]
    fn health_checks_come_as_http_1_0_without_host() {
        let health = request(b"GET /health HTTP/1.0\r\n\r\n");
        assert!(health.is_http_1_0() && !health.keep_alive());
        assert!(request(b"OPTIONS / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").keep_alive());
        assert_eq!(request(b"\r\nGET / HTTP/1.1\n\n").path(), "/");
    }

    #[test]
    fn keep_alive_and_bodies() {
        assert!(!request(b"GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n").keep_alive());
        assert!(request(b"GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n").keep_alive());
        for field in ["Content-Length: 1", "Content-Length: x", "Transfer-Encoding: chunked"] {
            let head = format!("POST / HTTP/1.1\r\n{field}\r\n\r\n");
            let request = request(head.as_bytes());
            assert!(request.has_body() && !request.keep_alive(), "{field}");
        }
    }

    #[test]
    fn what_is_not_http_is_refused_early() {
        for bytes in [
            &b"\x16\x03\x01\x02"[..],
            b"get",
            b"GET\t",
            b" GET",
            b"ABCDEFGHIJKLMNOPQ",
            b"GET /\r\n\r\n",
            b"GET / HTTP/2.0\r\n\r\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET / HTTP/1.1\r\na\0: b\r\n\r\n",
        ] {
            refused(bytes, HttpError::Malformed);
        }
    }

    #[test]
    fn the_limits_are_exact() {
        let head_of = |len: usize| {
            let fixed = "GET / HTTP/1.1\r\nX: \r\n\r\n";
            format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(len - fixed.len())).into_bytes()
        };
        assert!(matches!(parse_head(&head_of(HTTP_HEAD_BYTES_MAX)), Ok(Head::Done { .. })));
        let too_large = head_of(HTTP_HEAD_BYTES_MAX + 1);
        assert!(matches!(parse_head(&too_large[..HTTP_HEAD_BYTES_MAX]), Ok(Head::Incomplete)));
        refused(&too_large, HttpError::TooLarge);
        refused(&[too_large.as_slice(), b"more"].concat(), HttpError::TooLarge);
        let fields = |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert_eq!(request(fields(HTTP_HEADERS_MAX).as_bytes()).headers("a").count(), HTTP_HEADERS_MAX);
        refused(fields(HTTP_HEADERS_MAX + 1).as_bytes(), HttpError::TooLarge);
        assert_eq!((HttpError::Malformed.status(), HttpError::TooLarge.status()), (400, 431));
    }
}
