//! Responses.

use std::io::Write;

/// A response with a body that is known whole.
#[derive(Clone, Copy, Debug)]
pub struct Response<'r> {
    /// Status code.
    pub status: u16,
    /// Further fields; the length and `Connection` are written by themselves. Neither names nor
    /// values may come from a peer.
    pub headers: &'r [(&'r str, &'r str)],
    /// The body.
    pub body: &'r [u8],
    /// Whether the connection stays open for another request; otherwise it must be closed after this.
    pub keep_alive: bool,
    /// The answer to HEAD: everything but the body itself.
    pub head_only: bool,
}

impl Response<'_> {
    /// A response without body and further fields that closes the connection.
    pub const fn closing(status: u16) -> Response<'static> {
        Response { status, headers: &[], body: &[], keep_alive: false, head_only: false }
    }

    /// Appends the response to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let reason = reason_phrase(self.status);
        // Writing into a vector cannot fail.
        let _ = write!(out, "HTTP/1.1 {} {reason}\r\n", self.status);
        for (name, value) in self.headers {
            debug_assert!(!value.contains(['\r', '\n']), "a field value is one line");
            let _ = write!(out, "{name}: {value}\r\n");
        }
        let connection = if self.keep_alive { "keep-alive" } else { "close" };
        let _ = write!(out, "Content-Length: {}\r\nConnection: {connection}\r\n\r\n", self.body.len());
        if !self.head_only {
            out.extend_from_slice(self.body);
        }
    }
}

/// The reason phrases of the codes that this server uses.
fn reason_phrase(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        426 => "Upgrade Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        505 => "HTTP Version Not Supported",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses() {
        let mut out = Vec::new();
        let headers = [("Content-Type", "application/json")];
        let response =
            Response { status: 200, headers: &headers, body: b"{}", keep_alive: true, head_only: false };
        response.write(&mut out);
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\n";
        assert_eq!(String::from_utf8(out).unwrap(), format!("{head}{{}}"));
        let mut out = Vec::new();
        Response { head_only: true, ..response }.write(&mut out);
        assert_eq!(String::from_utf8(out).unwrap(), head);
        let mut out = Vec::new();
        Response::closing(431).write(&mut out);
        let expected =
            "HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
