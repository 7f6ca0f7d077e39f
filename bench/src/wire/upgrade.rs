//! The HTTP upgrade of a client (RFC 6455 section 4.1), with a fixed key, so that request and answer are the same
//! bytes on every connection and a canned answer is a right one.

use thiserror::Error;

/// The nonce of RFC 6455 section 1.3 and the accept value that belongs to it.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
pub(crate) const ACCEPT: &str = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";

/// The longest response head that is read, in bytes; a longer one fails the connection.
pub(crate) const RESPONSE_HEAD_BYTES_MAX: usize = 8 << 10;

/// The server did not switch protocols. Retrying does not help; the head's first line is in the message.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum UpgradeError {
    #[error("the server answered the upgrade with {0:?}")]
    Refused(String),
    #[error("the server's Sec-WebSocket-Accept does not belong to the key that was sent")]
    WrongAccept,
    #[error("the server's response head is longer than {RESPONSE_HEAD_BYTES_MAX} bytes")]
    TooLong,
}

/// The request for `path`. The Host header does not name the port, so that the size is the same on every server.
pub(crate) fn request(path: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Key: {KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    .into_bytes()
}

/// Checks the response head at the start of `input` and says how many bytes it has. `Ok(None)`: more is needed.
pub(crate) fn response_bytes(input: &[u8]) -> Result<Option<usize>, UpgradeError> {
    let Some(end) = memchr::memmem::find(input, b"\r\n\r\n") else {
        return if input.len() > RESPONSE_HEAD_BYTES_MAX { Err(UpgradeError::TooLong) } else { Ok(None) };
    };
    let head = &input[..end + 4];
    if !head.starts_with(b"HTTP/1.1 101") {
        let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
        return Err(UpgradeError::Refused(String::from_utf8_lossy(line).into_owned()));
    }
    if memchr::memmem::find(head, ACCEPT.as_bytes()).is_none() {
        return Err(UpgradeError::WrongAccept);
    }
    Ok(Some(head.len()))
}

/// A plausible answer for a bare server that nobody taught one.
pub(crate) fn canned_response() -> Vec<u8> {
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Accept: {ACCEPT}\r\n\r\n"
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_exactly_the_head() {
        let mut input = canned_response();
        let head = input.len();
        for cut in 0..head {
            assert_eq!(response_bytes(&input[..cut]), Ok(None), "cut at {cut}");
        }
        input.extend_from_slice(&[0x81, 0]);
        assert_eq!(response_bytes(&input), Ok(Some(head)));
    }

    #[test]
    fn names_the_refusal() {
        let refused = response_bytes(b"HTTP/1.1 404 Not Found\r\nX: y\r\n\r\n");
        assert_eq!(refused, Err(UpgradeError::Refused("HTTP/1.1 404 Not Found".into())));
        let wrong = b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: nonsense\r\n\r\n";
        assert_eq!(response_bytes(wrong), Err(UpgradeError::WrongAccept));
        assert_eq!(response_bytes(&vec![b'x'; RESPONSE_HEAD_BYTES_MAX]), Ok(None));
        assert_eq!(response_bytes(&vec![b'x'; RESPONSE_HEAD_BYTES_MAX + 1]), Err(UpgradeError::TooLong));
    }

    #[test]
    fn the_request_names_the_path() {
        let request = String::from_utf8(request("/connection/websocket")).expect("ascii");
        assert!(request.starts_with("GET /connection/websocket HTTP/1.1\r\nHost: "));
        assert!(request.ends_with("\r\n\r\n"));
    }
}
