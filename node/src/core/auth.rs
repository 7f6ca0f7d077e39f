//! Tokens: verifying connection and subscription JWTs.
//!
//! Owns the keys and the claims. Signatures are `jsonwebtoken`'s work; times are compared here against
//! the `now` given, to the second: a token whose `exp` equals now is expired, one whose `nbf` lies
//! ahead is answered like an expired one.

use std::collections::HashMap;

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use ringmain_proto::time::Now;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::config::{CoreConfig, TokenConfig};

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TokenError {
    /// It was good, or will be: the client may fetch another.
    #[error("token expired")]
    Expired,
    /// Malformed, signed by somebody else, or for somebody else.
    #[error("token invalid")]
    Invalid,
}

/// A key of the configuration that cannot be used. The operator's fault.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {source}")]
pub struct KeyError {
    /// Path of the configuration key.
    pub key: String,
    /// What is wrong with it.
    pub source: jsonwebtoken::errors::Error,
}

/// Claims of a connection token.
#[derive(Debug)]
pub(crate) struct ConnectionClaims {
    pub(crate) sub: String,
    pub(crate) exp: Option<u64>,
    pub(crate) info: Option<Box<[u8]>>,
    /// Channels to subscribe to on connect.
    pub(crate) channels: Vec<String>,
    /// The same with options.
    pub(crate) subs: Vec<(String, ClaimedSub)>,
}

/// Options of a channel in the `subs` claim.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ClaimedSub {
    pub(crate) info: Option<Box<RawValue>>,
    #[serde(rename = "override")]
    pub(crate) overrides: Option<Overrides>,
}

/// Options of the namespace that a token may override.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Overrides {
    pub(crate) presence: Option<BoolValue>,
    pub(crate) join_leave: Option<BoolValue>,
    pub(crate) force_push_join_leave: Option<BoolValue>,
    pub(crate) force_recovery: Option<BoolValue>,
    pub(crate) force_positioning: Option<BoolValue>,
}

/// A boolean that is distinguished from an absent one, as Centrifugo writes it.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct BoolValue {
    pub(crate) value: bool,
}

/// Claims of a subscription token.
#[derive(Debug)]
pub(crate) struct SubscriptionClaims {
    pub(crate) sub: String,
    pub(crate) client: String,
    pub(crate) channel: String,
    /// When the subscription expires.
    pub(crate) exp: Option<u64>,
    pub(crate) info: Option<Box<[u8]>>,
}

#[derive(Deserialize)]
struct RawClaims {
    #[serde(default)]
    sub: String,
    #[serde(default)]
    client: String,
    #[serde(default)]
    channel: String,
    exp: Option<serde_json::Number>,
    nbf: Option<serde_json::Number>,
    expire_at: Option<serde_json::Number>,
    info: Option<Box<RawValue>>,
    #[serde(default)]
    channels: Vec<String>,
    #[serde(default)]
    subs: HashMap<String, ClaimedSub>,
}

impl RawClaims {
    fn in_time(&self, now: Now) -> Result<Option<u64>, TokenError> {
        let exp = self.exp.as_ref().map(seconds).transpose()?;
        let nbf = self.nbf.as_ref().map(seconds).transpose()?;
        if exp.is_some_and(|exp| exp <= now.unix_s()) || nbf.is_some_and(|nbf| nbf > now.unix_s()) {
            return Err(TokenError::Expired);
        }
        Ok(exp)
    }
}

/// A NumericDate (RFC 7519 section 2) in whole seconds.
fn seconds(number: &serde_json::Number) -> Result<u64, TokenError> {
    match (number.as_u64(), number.as_f64()) {
        (Some(seconds), _) => Ok(seconds),
        (None, Some(seconds)) if seconds >= 0.0 => Ok(seconds as u64),
        (None, Some(_)) => Ok(0),
        _ => Err(TokenError::Invalid),
    }
}

fn raw(info: Option<Box<RawValue>>) -> Option<Box<[u8]>> {
    info.filter(|info| info.get() != "null").map(|info| Box::from(info.get().as_bytes()))
}

/// The keys of one kind of tokens.
#[derive(Default)]
struct Keys {
    by_family: Vec<(Vec<Algorithm>, DecodingKey)>,
    audience: Option<String>,
    issuer: Option<String>,
}

/// Verifies both kinds of tokens.
#[derive(Default)]
pub(crate) struct Verifier {
    connection: Keys,
    subscription: Option<Keys>,
}

impl Keys {
    fn new(config: &TokenConfig, section: &str) -> Result<Self, KeyError> {
        use Algorithm::*;
        let named = |key: &str, result: Result<DecodingKey, jsonwebtoken::errors::Error>| {
            result.map_err(|source| KeyError { key: format!("{section}.{key}"), source })
        };
        let mut by_family = Vec::new();
        if let Some(secret) = config.hmac_secret.as_ref().filter(|secret| !secret.0.is_empty()) {
            by_family.push((vec![HS256, HS384, HS512], DecodingKey::from_secret(secret.0.as_bytes())));
        }
        if let Some(pem) = &config.rsa_public_key {
            let key = named("rsa_public_key", DecodingKey::from_rsa_pem(pem.as_bytes()))?;
            by_family.push((vec![RS256, RS384, RS512, PS256, PS384, PS512], key));
        }
        if let Some(pem) = &config.ecdsa_public_key {
            let key = named("ecdsa_public_key", DecodingKey::from_ec_pem(pem.as_bytes()))?;
            by_family.push((vec![ES256, ES384], key));
        }
        if let Some(pem) = &config.eddsa_public_key {
            let key = named("eddsa_public_key", DecodingKey::from_ed_pem(pem.as_bytes()))?;
            by_family.push((vec![EdDSA], key));
        }
        Ok(Self { by_family, audience: config.audience.clone(), issuer: config.issuer.clone() })
    }

    fn verify(&self, token: &str) -> Result<RawClaims, TokenError> {
        let header = decode_header(token).map_err(|_| TokenError::Invalid)?;
        let (algorithms, key) = self
            .by_family
            .iter()
            .find(|(algorithms, _)| algorithms.contains(&header.alg))
            .ok_or(TokenError::Invalid)?;
        let mut validation = Validation::new(header.alg);
        validation.algorithms.clone_from(algorithms);
        // Times are compared against the core's clock, not the system's.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.required_spec_claims.clear();
        validation.validate_aud = self.audience.is_some();
        if let Some(audience) = &self.audience {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".to_owned());
        }
        if let Some(issuer) = &self.issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".to_owned());
        }
        let data =
            decode::<RawClaims>(token.as_bytes(), key, &validation).map_err(|_| TokenError::Invalid)?;
        Ok(data.claims)
    }
}

impl Verifier {
    pub(crate) fn new(config: &CoreConfig) -> Result<Self, KeyError> {
        let connection = Keys::new(&config.token, "token")?;
        let subscription = config
            .subscription_token
            .as_ref()
            .map(|config| Keys::new(config, "subscription_token"))
            .transpose()?;
        Ok(Self { connection, subscription })
    }

    /// Claims of a connection token.
    pub(crate) fn connection(&self, token: &str, now: Now) -> Result<ConnectionClaims, TokenError> {
        let claims = self.connection.verify(token)?;
        let exp = claims.in_time(now)?;
        let mut subs: Vec<_> = claims.subs.into_iter().collect();
        subs.sort_by(|(a, _), (b, _)| a.cmp(b));
        let RawClaims { sub, info, channels, .. } = RawClaims { subs: HashMap::new(), ..claims };
        Ok(ConnectionClaims { sub, exp, info: raw(info), channels, subs })
    }

    /// Claims of a subscription token.
    pub(crate) fn subscription(&self, token: &str, now: Now) -> Result<SubscriptionClaims, TokenError> {
        let claims = self.subscription.as_ref().unwrap_or(&self.connection).verify(token)?;
        let exp = claims.in_time(now)?;
        // `expire_at` sets the subscription's expiry apart from the token's; 0: it does not expire.
        let exp = match claims.expire_at.as_ref().map(seconds).transpose()? {
            Some(0) => None,
            Some(at) => Some(at),
            None => exp,
        };
        let RawClaims { sub, client, channel, info, .. } = claims;
        Ok(SubscriptionClaims { sub, client, channel, exp, info: raw(info) })
    }
}
