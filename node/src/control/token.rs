//! Minting tokens: `ringmain token`.
//!
//! Owns the claims that a connection or subscription token of this node needs. Verification is the
//! core's; the two meet in the tests.

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde::Serialize;
use serde_json::value::RawValue;
use thiserror::Error;

use crate::core::config::CoreConfig;

/// What to put into a token.
#[derive(Clone, Debug, Default)]
pub struct TokenRequest {
    /// Claim `sub`.
    pub user: String,
    /// Seconds from now until it expires.
    pub ttl_s: Option<u64>,
    /// Expiry in seconds since 1970; wins over `ttl_s`.
    pub expire_at_s: Option<u64>,
    /// Makes a subscription token for this channel.
    pub channel: Option<String>,
    /// JSON for the claim `info`.
    pub info: Option<String>,
    /// HMAC secret; the configuration's if absent.
    pub secret: Option<String>,
}

/// Why no token was made. The operator's to mend.
#[derive(Debug, Error)]
pub enum TokenError {
    /// Neither a flag nor the configuration names a secret.
    #[error("no HMAC secret to sign with")]
    NoSecret,
    /// `--info` is not JSON.
    #[error("--info is not JSON: {0}")]
    Info(serde_json::Error),
    /// The signature failed.
    #[error("cannot sign: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

impl TokenError {
    /// What to do about it.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::NoSecret => Some(
                "give --secret, RINGMAIN_TOKEN_HMAC_SECRET or --config; the node needs the same".to_owned(),
            ),
            Self::Info(_) => Some("quote it for the shell: --info '{\"name\":\"Alice\"}'".to_owned()),
            Self::Sign(_) => None,
        }
    }
}

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    iat: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    channel: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    info: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aud: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    iss: Option<&'a str>,
}

/// Makes a token (HS256) that a node of this configuration accepts. `now_s` is in seconds since 1970.
pub fn mint(request: &TokenRequest, core: &CoreConfig, now_s: u64) -> Result<String, TokenError> {
    let keys = match (&request.channel, &core.subscription_token) {
        (Some(_), Some(subscription)) => subscription,
        _ => &core.token,
    };
    let configured = keys.hmac_secret.as_ref().map(|secret| secret.0.as_str());
    let secret = request.secret.as_deref().or(configured).ok_or(TokenError::NoSecret)?;
    let info = request.info.as_deref().map(serde_json::from_str::<&RawValue>);
    let claims = Claims {
        sub: &request.user,
        iat: now_s,
        exp: request.expire_at_s.or(request.ttl_s.map(|ttl| now_s.saturating_add(ttl))),
        channel: request.channel.as_deref(),
        info: info.transpose().map_err(TokenError::Info)?,
        aud: keys.audience.as_deref(),
        iss: keys.issuer.as_deref(),
    };
    let key = EncodingKey::from_secret(secret.as_bytes());
    Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key)?)
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD;

    use super::*;
    use crate::core::config::{Secret, TokenConfig};

    /// The claims of a token as JSON text.
    fn claims(token: &str) -> String {
        let part = token.split('.').nth(1).expect("three parts");
        String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(part).expect("base64")).expect("utf-8")
    }

    fn core() -> CoreConfig {
        let secret = |text: &str| Some(Secret(text.to_owned()));
        CoreConfig {
            token: TokenConfig { hmac_secret: secret("connections"), ..TokenConfig::default() },
            subscription_token: Some(TokenConfig {
                hmac_secret: secret("subscriptions"),
                audience: Some("aud".to_owned()),
                issuer: Some("iss".to_owned()),
                ..TokenConfig::default()
            }),
            ..CoreConfig::default()
        }
    }

    #[test]
    fn claims_are_those_asked_for() {
        let check = |request: TokenRequest, expected: &str| {
            assert_eq!(claims(&mint(&request, &core(), 1000).unwrap()), expected);
        };
        let user = || TokenRequest { user: "alice".to_owned(), ..TokenRequest::default() };
        check(user(), r#"{"sub":"alice","iat":1000}"#);
        check(TokenRequest { ttl_s: Some(60), ..user() }, r#"{"sub":"alice","iat":1000,"exp":1060}"#);
        check(TokenRequest { expire_at_s: Some(5), ..user() }, r#"{"sub":"alice","iat":1000,"exp":5}"#);
        check(
            TokenRequest { info: Some(r#"{"n":1.50}"#.to_owned()), ..user() },
            r#"{"sub":"alice","iat":1000,"info":{"n":1.50}}"#,
        );
        check(
            TokenRequest { channel: Some("room:1".to_owned()), ..user() },
            r#"{"sub":"alice","iat":1000,"channel":"room:1","aud":"aud","iss":"iss"}"#,
        );
    }

    #[test]
    fn the_secret_is_the_one_of_its_kind_unless_given() {
        let signature = |request: &TokenRequest| {
            let token = mint(request, &core(), 1000).unwrap();
            token.rsplit_once('.').unwrap().1.to_owned()
        };
        let request = TokenRequest { channel: Some("c".to_owned()), ..TokenRequest::default() };
        let given = |secret: &str| TokenRequest { secret: Some(secret.to_owned()), ..request.clone() };
        assert_eq!(signature(&request), signature(&given("subscriptions")));
        assert_ne!(signature(&request), signature(&given("connections")));
    }

    #[test]
    fn what_is_missing_or_wrong_is_refused() {
        let refused = |request: &TokenRequest, core: &CoreConfig| mint(request, core, 0).unwrap_err();
        assert!(matches!(refused(&TokenRequest::default(), &CoreConfig::default()), TokenError::NoSecret));
        let request = TokenRequest { info: Some("{".to_owned()), ..TokenRequest::default() };
        assert!(matches!(refused(&request, &core()), TokenError::Info(_)));
    }
}
