//! The PROXY protocol, versions 1 and 2 (HAProxy's `proxy-protocol.txt`).
//!
//! Owns finding the header at the start of a connection, whole or in pieces, and the source address
//! in it. Must not know which listeners expect one: where it is expected, its absence is an error
//! (section 2 of the specification forbids guessing). TLVs are skipped, destinations ignored.

use std::net::SocketAddr;

use crate::limits::PROXY_HEADER_BYTES_MAX;

/// Longest version 1 header, in bytes, line end included (section 2.1).
const V1_BYTES_MAX: usize = 107;

/// Fixed part of a version 2 header, in bytes: signature, version, family, length.
const V2_FIXED_BYTES: usize = 16;

const V1_PREFIX: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8] = ppp::v2::PROTOCOL_PREFIX;
const V2_LOCAL: u8 = 0x20;

const _: () = assert!(V1_BYTES_MAX <= PROXY_HEADER_BYTES_MAX);

/// Where the start of a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyHeader {
    /// More bytes are needed.
    Incomplete,
    /// The header is complete.
    Done {
        /// Length of the header in bytes; the client's own bytes follow.
        consumed: usize,
        /// The client's address; `None` for health checks of the proxy itself (LOCAL), for UNKNOWN
        /// and for address families other than IP: the socket's own peer counts then.
        source: Option<SocketAddr>,
    },
}

/// The connection does not begin with a PROXY header: the proxy's misconfiguration, or somebody who
/// goes past it. The connection is closed without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    /// Other bytes, or a header with errors.
    #[error("not a PROXY header")]
    Malformed,
    /// Longer than [`PROXY_HEADER_BYTES_MAX`] (version 1: than the specification's 107 bytes).
    #[error("PROXY header too long")]
    TooLong,
}

/// Reads the header at the start of `bytes`: all that was received so far. Errors show as soon as no
/// continuation could mend them.
pub fn parse(bytes: &[u8]) -> Result<ProxyHeader, ProxyError> {
    if is_start_of(bytes, V2_SIGNATURE) {
        return parse_v2(bytes);
    }
    if is_start_of(bytes, V1_PREFIX) {
        return parse_v1(bytes);
    }
    Err(ProxyError::Malformed)
}

/// Whether `bytes` begin with `prefix`, as far as they go.
fn is_start_of(bytes: &[u8], prefix: &[u8]) -> bool {
    let common = bytes.len().min(prefix.len());
    bytes[..common] == prefix[..common]
}

fn parse_v1(bytes: &[u8]) -> Result<ProxyHeader, ProxyError> {
    let window = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    let Some(line_end) = memchr::memchr(b'\n', window) else {
        return if window.len() == V1_BYTES_MAX {
            Err(ProxyError::TooLong)
        } else {
            Ok(ProxyHeader::Incomplete)
        };
    };
    let consumed = line_end + 1;
    if !bytes[..consumed].ends_with(b"\r\n") {
        return Err(ProxyError::Malformed);
    }
    let header = ppp::v1::Header::try_from(&bytes[..consumed]).map_err(|_| ProxyError::Malformed)?;
    let source = match header.addresses {
        ppp::v1::Addresses::Unknown => None,
        ppp::v1::Addresses::Tcp4(ip) => Some((ip.source_address, ip.source_port).into()),
        ppp::v1::Addresses::Tcp6(ip) => Some((ip.source_address, ip.source_port).into()),
    };
    Ok(ProxyHeader::Done { consumed, source })
}

fn parse_v2(bytes: &[u8]) -> Result<ProxyHeader, ProxyError> {
    let Some(fixed) = bytes.first_chunk::<V2_FIXED_BYTES>() else {
        return Ok(ProxyHeader::Incomplete);
    };
    let consumed = V2_FIXED_BYTES + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if consumed > PROXY_HEADER_BYTES_MAX {
        return Err(ProxyError::TooLong);
    }
    if bytes.len() < consumed {
        return Ok(ProxyHeader::Incomplete);
    }
    // LOCAL: everything else in the header is to be skipped (section 2.2).
    if fixed[12] == V2_LOCAL {
        return Ok(ProxyHeader::Done { consumed, source: None });
    }
    let header = ppp::v2::Header::try_from(&bytes[..consumed]).map_err(|_| ProxyError::Malformed)?;
    let source = match header.addresses {
        ppp::v2::Addresses::IPv4(ip) => Some((ip.source_address, ip.source_port).into()),
        ppp::v2::Addresses::IPv6(ip) => Some((ip.source_address, ip.source_port).into()),
        ppp::v2::Addresses::Unspecified | ppp::v2::Addresses::Unix(_) => None,
    };
    Ok(ProxyHeader::Done { consumed, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(header: &[u8], source: Option<&str>) {
        let expected =
            ProxyHeader::Done { consumed: header.len(), source: source.map(|text| text.parse().unwrap()) };
        let with_more = [header, b"GET / HTTP/1.1\r\n"].concat();
        assert_eq!(parse(&with_more), Ok(expected), "{header:?}");
        for cut in 0..header.len() {
            assert_eq!(parse(&header[..cut]), Ok(ProxyHeader::Incomplete), "cut at {cut} of {header:?}");
        }
    }

    fn refused(bytes: &[u8], error: ProxyError) {
        assert_eq!(parse(bytes), Err(error), "{bytes:?}");
    }

    /// A version 2 header.
    fn v2(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let len = (rest.len() as u16).to_be_bytes();
        [V2_SIGNATURE, &[command, family], &len, rest].concat()
    }

    const IPV4: [u8; 12] = [192, 0, 2, 7, 192, 0, 2, 8, 0x12, 0x34, 0x01, 0xbb];

    #[test]
    fn version_1() {
        done(b"PROXY TCP4 192.0.2.7 192.0.2.8 56324 443\r\n", Some("192.0.2.7:56324"));
        done(b"PROXY TCP6 2001:db8::1 ::1 1 2\r\n", Some("[2001:db8::1]:1"));
        done(b"PROXY UNKNOWN\r\n", None);
        done(b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None);
    }

    #[test]
    fn version_1_errors() {
        for bad in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"PROXY TCP4 192.0.2.7 192.0.2.8 56324 443\n",
            b"PROXY TCP4 192.0.2.7 192.0.2.8 56324\r\n",
            b"PROXY TCP4 192.0.2.7 192.0.2.8 56324 443 9\r\n",
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP4 192.0.2.7 192.0.2.8 65536 443\r\n",
            b"PROXY UDP4 192.0.2.7 192.0.2.8 1 2\r\n",
            b"PROXY \r\n",
            b"PROXY \xff\r\n",
            b"P\r\n",
            b"\x16\x03\x01",
        ] {
            refused(bad, ProxyError::Malformed);
        }
        let line = |len: usize| format!("PROXY UNKNOWN {}\r\n", "x".repeat(len - 16));
        done(line(V1_BYTES_MAX).as_bytes(), None);
        refused(line(V1_BYTES_MAX + 1).as_bytes(), ProxyError::TooLong);
        refused(&line(V1_BYTES_MAX + 1).as_bytes()[..V1_BYTES_MAX], ProxyError::TooLong);
    }

    #[test]
    fn version_2() {
        done(&v2(0x21, 0x11, &IPV4), Some("192.0.2.7:4660"));
        let ipv6 = [[0u8; 15].as_slice(), &[1], &[0; 15], &[2], &[0, 80, 1, 187]].concat();
        done(&v2(0x21, 0x21, &ipv6), Some("[::1]:80"));
        let tlvs = [IPV4.as_slice(), &[0x04, 0, 3, 1, 2, 3], &[0x20, 0, 1]].concat();
        done(&v2(0x21, 0x11, &tlvs), Some("192.0.2.7:4660"));
        done(&v2(0x20, 0x00, &[]), None);
        done(&v2(0x20, 0x11, &[]), None);
        done(&v2(0x20, 0x00, &[0x04, 0, 0]), None);
        done(&v2(0x21, 0x00, &[]), None);
        done(&v2(0x21, 0x31, &[0; 216]), None);
    }

    #[test]
    fn version_2_errors() {
        refused(&v2(0x21, 0x11, &IPV4[..11]), ProxyError::Malformed);
        refused(&v2(0x11, 0x11, &IPV4), ProxyError::Malformed);
        refused(&v2(0x22, 0x11, &IPV4), ProxyError::Malformed);
        refused(&v2(0x21, 0x41, &IPV4), ProxyError::Malformed);
        refused(b"\r\n\r\n\0\r\nQUIT?", ProxyError::Malformed);
        let of =
            |len: usize| v2(0x21, 0x11, &[&IPV4, vec![0; len - V2_FIXED_BYTES - 12].as_slice()].concat());
        done(&of(PROXY_HEADER_BYTES_MAX), Some("192.0.2.7:4660"));
        let too_long = of(PROXY_HEADER_BYTES_MAX + 1);
        refused(&too_long[..V2_FIXED_BYTES], ProxyError::TooLong);
    }
}
