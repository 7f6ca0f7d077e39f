//! Who may call the server API.
//!
//! Owns the comparison of keys. A key is never logged; a wrong one costs the same time as the right
//! one.

use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, ORIGIN};
use subtle::ConstantTimeEq as _;

use crate::core::config::Secret;

/// What the API asks for.
#[derive(Clone, Debug)]
pub enum Access {
    /// This key, as `X-API-Key` or as `Authorization: apikey`.
    Key(Secret),
    /// Nothing (the demo on loopback). Browsers are refused all the same: any page could call.
    Open,
    /// Nobody may call: no key is configured.
    Closed,
}

impl Access {
    /// Whether a request with these headers may call.
    pub fn allows(&self, headers: &HeaderMap) -> bool {
        match self {
            Self::Closed => false,
            Self::Open => !headers.contains_key(ORIGIN),
            Self::Key(key) => {
                given_key(headers).is_some_and(|given| bool::from(given.ct_eq(key.0.as_bytes())))
            }
        }
    }
}

fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    if let Some(key) = headers.get("x-api-key") {
        return Some(key.as_bytes());
    }
    let (scheme, key) = headers.get(AUTHORIZATION)?.as_bytes().split_at_checked("apikey ".len())?;
    scheme.eq_ignore_ascii_case(b"apikey ").then_some(key)
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn only_the_key_opens() {
        let key = Access::Key(Secret("sesame".to_owned()));
        let check = |access: &Access, headers: &[(&'static str, &'static str)], allowed: bool| {
            let headers: HeaderMap = headers
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .collect();
            assert_eq!(access.allows(&headers), allowed, "{access:?} {headers:?}");
        };
        check(&key, &[("x-api-key", "sesame")], true);
        check(&key, &[("authorization", "apikey sesame")], true);
        check(&key, &[("authorization", "ApiKey sesame")], true);
        check(&key, &[], false);
        check(&key, &[("x-api-key", "")], false);
        check(&key, &[("x-api-key", "sesam")], false);
        check(&key, &[("x-api-key", "sesame ")], false);
        check(&key, &[("x-api-key", "sesamo")], false);
        check(&key, &[("authorization", "Bearer sesame")], false);
        check(&key, &[("authorization", "apikey")], false);
        check(&Access::Open, &[], true);
        check(&Access::Open, &[("origin", "http://evil.example")], false);
        check(&Access::Closed, &[("x-api-key", "sesame")], false);
        check(&Access::Closed, &[("x-api-key", "")], false);
    }
}
